"""Command lines to settings: help, words, lists, and what is refused."""

import os
import re
import time
from dataclasses import dataclass, fields

import pytest

from improved_diffusion.cli.image_edit import COMMAND as EDIT
from improved_diffusion.cli.image_sample import COMMAND as SAMPLE
from improved_diffusion.cli.parsing import parse, split_lists
from improved_diffusion.config import EditConfig, ImagesConfig, RunConfig, SamplerConfig, UserError
from improved_diffusion.config.settings import Distilling, ImageSampling, ImageTraining, Settings

COMMANDS = {"sample": SAMPLE, **EDIT.commands}


@dataclass(frozen=True, kw_only=True)
class Searching(Settings):
    """Made up for these tests."""

    edit: EditConfig
    images: ImagesConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """Made up for these tests."""

    sampler: SamplerConfig
    run: RunConfig


def help_of(command, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(command.settings, [flag], program="prog", description=command.summary, first=command.first)
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text):
    return re.findall(r"^  --([\w-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_first_options_only(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    command = COMMANDS[name]
    text = help_of(command, "--help", capsys)
    assert sorted(flags_in(text)) == sorted(command.first) and 8 <= len(command.first) <= 10
    assert text == help_of(command, "-h", capsys)
    assert command.summary in text and "--help-all" in text and "prog [--flag value ...]" in text
    assert set(command.first) <= command.settings.options().keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_shows_every_option_once_with_its_default_below_its_group(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    kind = COMMANDS[name].settings
    text = help_of(COMMANDS[name], "--help-all", capsys)
    assert sorted(flags_in(text)) == sorted([*kind.options(), "preset", "config"])
    plain = " ".join(text.split())
    for option, f in kind.options().items():
        default = kind.shown_defaults.get(option, "empty" if f.default == "" else f.default)
        assert f"{f.metadata['help']} (default: {default})" in plain, option
    for group in kind.groups().values():
        title = group.__doc__.strip().splitlines()[0].rstrip(".")
        section = text[text.index(f"\n{title}:\n") :].split("\n\n")[0]
        assert set(flags_in(section)) == {f.name for f in fields(group)}


def test_what_is_given_is_kept_beside_the_settings():
    parsed = parse(Searching, ["--images", "a", "--seed=3"])
    assert parsed.settings.images.images == "a" and parsed.settings.run.seed == 3
    assert parsed.given == {"images", "seed"} and parsed.preset is None
    assert parse(ImageSampling, ["--preset", "cifar10-hybrid"]).preset == "cifar10-hybrid"
    assert "noise_schedule" in parse(ImageSampling, ["--preset", "cifar10-hybrid"]).given


@pytest.mark.parametrize("argv, culprits", [
    (["--imags", "a"], ["'--imags'", "did you mean --images"]),
    (["--strength", "1"], ["'--strength'"]),
    (["two"], ["'two'"]),
    (["--seed", "x"], ["--seed", "'x'"]),
    (["--seed"], ["--seed", "--help"]),
    (["--seed", "-1"], ["--seed -1"]),
])  # fmt: skip
def test_a_wrong_word_is_named(argv, culprits):
    with pytest.raises(UserError) as error:
        parse(Searching, argv)
    assert all(culprit in str(error.value) for culprit in culprits) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings, word, meant", [
    (Distilling, "--model_path", "--teacher"), (ImageSampling, "--teacher", "--model_path"),
    (ImageTraining, "--learning_rate", "--lr"), (ImageTraining, "--output_dir", "--out_dir"),
    (ImageTraining, "--epochs=3", "--max_steps"), (ImageTraining, "--batch", "--batch_size"),
    (Distilling, "--student", "--student_prediction"), (ImageSampling, "--to", "--steps"),
    (ImageSampling, "--class", "--classes"),
])  # fmt: skip
def test_a_flag_under_another_name_is_recognised(settings, word, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
        parse(settings, [word, "x"])
    with pytest.raises(UserError, match=rf"did you mean {meant.removeprefix('--')}\?"):
        settings.of({word.removeprefix("--").split("=")[0]: "x"})


def test_words_before_the_flags_are_for_one_option():
    def parsed(*argv):
        return parse(Searching, argv, words="images")

    assert parsed("a", "b", "--seed", "3").settings.images.images == "a,b"
    assert parsed("a,b").settings.images.images == "a,b" and parsed("a").given == {"images"}
    assert parsed("--images", "c", "--seed", "3").settings.images.images == "c"
    assert parsed("--seed", "3").settings.images.images == ""
    with pytest.raises(UserError, match="'b'"):
        parsed("a", "--seed", "3", "b")


@pytest.mark.parametrize("argv, culprits", [
    (["runs/c"], ["'runs/c'", "did you mean --images runs/c?"]),
    (["runs/c", "--seed", "3"], ["'runs/c'", "did you mean --images runs/c?"]),
    (["--seed", "3", "runs/c"], ["'runs/c'", "did you mean --images runs/c?"]),
    (["--classes", "cat", "dog"], ["'dog'", "--classes cat,dog"]),
    (["--classes=cat", "dog", "cat", "--seed", "1"], ["'dog'", "--classes cat,dog,cat"]),
    (["--seed", "1", "--images", "a", "b", "c"], ["'b'", "--images a,b,c", "quotes"]),
])  # fmt: skip
def test_a_word_that_is_no_value_is_told_how_to_become_one(argv, culprits):
    with pytest.raises(UserError) as error:
        parse(Searching, argv, first=("images", "seed"))
    assert all(culprit in str(error.value) for culprit in culprits)


@pytest.mark.parametrize("argv", [["My", "Photos", "2024"], ["--images", "My", "Photos", "2024", "--seed", "1"],
                                  ["--images=My", "Photos", "2024"]])  # fmt: skip
@pytest.mark.parametrize("words", ["images", ""])
def test_a_path_with_blanks_needs_quotes(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Photos 2024").mkdir()
    if argv[0] == "My" and not words:
        return
    with pytest.raises(UserError, match='put it in quotes, "My Photos 2024"'):
        parse(Searching, argv, words=words)
    for name in ("My", "Photos", "2024"):
        (tmp_path / name).mkdir()
    if argv[0] == "My":
        assert parse(Searching, argv, words=words).settings.images.images == "My,Photos,2024"


# Lists of values


def sweep(*argv):
    """(chosen values, settings, what was given) for each combination of steps and samplers."""
    combinations = split_lists(argv, ("sampler", "steps"))
    return [(chosen, (p := parse(Sampling, words)).settings, p.given) for chosen, words in combinations]


def test_listed_values_are_combined():
    found = sweep("--steps", "5, 10", "--seed", "3", "--sampler=ddim,heun")
    combinations = [("ddim", 5), ("ddim", 10), ("heun", 5), ("heun", 10)]
    assert [(settings.sampler.sampler, settings.sampler.steps) for _, settings, _ in found] == combinations
    for chosen, settings, given in found:
        assert chosen == {"sampler": settings.sampler.sampler, "steps": str(settings.sampler.steps)}
        assert settings.run.seed == 3 and given == {"sampler", "steps", "seed"}


@pytest.mark.parametrize("argv, steps, chosen", [
    (["--steps", "5"], [5], [{"steps": "5"}]),
    ([], [0], [{}]),
    (["--steps", "5,10,5,"], [5, 10], [{"steps": "5"}, {"steps": "10"}]),
    (["--steps", "5,10", "--steps", "20"], [20], [{"steps": "20"}]),  # the last one, as of any flag
])  # fmt: skip
def test_combinations_of_one_list(argv, steps, chosen):
    found = sweep(*argv)
    assert [settings.sampler.steps for _, settings, _ in found] == steps and [c for c, _, _ in found] == chosen


@pytest.mark.parametrize("argv, culprits", [
    (["--steps", "5,x"], ["--steps", "'x'"]),
    (["--steps", ","], ["--steps", "','"]),
    (["--steps", ""], ["--steps", "''"]),
    (["--steps"], ["--steps"]),
    (["--steps", "--sampler", "ddim,heun"], ["--steps"]),
    (["--seed", "1,2"], ["--seed", "'1,2'"]),
    (["--churn", "3", "--sampler", "euler,ddim"], ["--churn 3.0", "euler or heun"]),
])  # fmt: skip
def test_every_combination_is_checked(argv, culprits):
    with pytest.raises(UserError) as error:
        sweep(*argv)
    assert all(culprit in str(error.value) for culprit in culprits)


# Files from strangers


def write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--config", str(tmp_path / name)]


BOMB = "lr:\n  - &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"  - &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)
)


@pytest.mark.parametrize("name, content, culprit", [
    ("c.yaml", BOMB, "aliases"),
    ("c.yaml", "lr: &a 1\nseed: *a\n", "aliases"),
    ("c.yaml", "a: &a [*a]\n", "aliases"),
    ("c.yaml", "[" * 100_000, "nested"),
    ("c.yaml", "lr: " + "[" * 100_000, "nested"),
    ("c.yaml", "- " * 100_000, "nested"),
    ("c.json", "[" * 100_000, "nested"),
    ("c.json", '{"lr":' * 100_000, "nested"),
    ("c.yaml", "seed: 1\nlr: 2\nseed: 3\n", "'seed' stands there twice"),
    ("c.json", '{"seed": 1, "lr": 2, "seed": 3}', "'seed' stands there twice"),
    ("c.yaml", "x" * 2**21, "more than"),
    ("c.yaml", "", "names and values"),
    ("c.yaml", "# nothing\n", "names and values"),
    ("c.json", "", "not readable"),
    ("c.yaml", "- lr\n", "names and values"),
    ("c.json", "[1]", "names and values"),
    ("c.json", "null", "names and values"),
    ("c.yaml", "lr:\t1\n\tseed: 2\n", "cannot be read"),
    ("c.yaml", "a: b: c", "cannot be read"),
    ("c.yaml", "? [a]\n: 1\n", "cannot be read"),
    ("c.yaml", "lr: 1\n---\nlr: 2\n", "cannot be read"),
    ("c.yaml", b"data_dir: caf\xe9\n", "UTF-8"),
    ("c.yaml", "lr: 1\n".encode("utf-16"), "UTF-8"),
    ("c.json", b'{"data_dir": "caf\xe9"}', "not readable"),
    ("c.json", '{"data_dir": "\\ud800"}', "not readable"),
    ("c.json", '{"lr": NaN}', "NaN"),
    ("c.json", '{"lr": 1e999}', "1e999"),
    ("c.json", '{"lr": ' + "9" * 10_000 + "}", "not readable"),
    ("c.yaml", "lr:\n", "--lr None"),
    ("c.yaml", "data_dir: ~\n", "--data_dir None"),
    ("c.yaml", "ema_rate: [0.9, null]\n", "--ema_rate"),
    ("c.json", '{"data_dir": null}', "--data_dir None"),
    ("c.yaml", "seed: {a: 1}\n", "--seed"),
    ("c.yaml", "lr: .nan\n", "--lr"),
    ("c.yaml", "!!python/object/apply:os.system ['touch trace']", "names and values"),
    ("c.yaml", "<<: {lr: 1}\n", "'<<'"),
    ("c.yaml", "seed: 1\nmodel:\n  image_size: 32\n", "'model' holds further names"),
    ("c.json", '{"trainer": {"lr": 1}}', "'trainer' holds further names"),
    ("c.yaml", "sample_steps: 5\n", "'sample_steps': --help-all"),
    ("c.yaml", "1: 2\n", "'1'"),
    ("c.json", '{"lr": ' + "[" * 500 + "]" * 500 + "}", "--lr"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_short_message(tmp_path, name, content, culprit):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        parse(ImageTraining, write(tmp_path, name, content))
    assert culprit in str(error.value) and len(str(error.value)) < 2000 and str(error.value).isprintable()
    assert str(tmp_path / name) in str(error.value)
    assert time.monotonic() - start < 5


def test_a_flag_replaces_a_value_of_a_file_that_cannot_be(tmp_path):
    argv = write(tmp_path, "c.yaml", "lr: x\nseed: 3\n")
    settings = parse(ImageTraining, [*argv, "--lr", "0.5"]).settings.values()
    assert settings["lr"] == 0.5 and settings["seed"] == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="pipe"):
        parse(ImageTraining, ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(UserError, match="folder"):
        parse(ImageTraining, ["--config", str(tmp_path / "d.yaml")])


@pytest.mark.parametrize("yaml, name, expected", [
    ("lr: 1e-4", "lr", 1e-4), ("max_steps: 1e6", "max_steps", 10**6), ("image_size: 48x64", "image_size", "48x64"),
    ("image_size: [48, 64]", "image_size", "48x64"), ("data_dir: yes", "data_dir", "yes"),
    ("data_dir: 2024-01-01", "data_dir", "2024-01-01"), ("data_dir: 012", "data_dir", "012"),
    ("data_dir: 12:30", "data_dir", "12:30"), ("learn_sigma: yes", "learn_sigma", True),
    ("learn_sigma: off", "learn_sigma", None), ("ema_rate: [0.99, 0.9999]", "ema_rate", "0.99,0.9999"),
    ("ema_rate:\n- 0.99\n- 0.9999", "ema_rate", "0.99,0.9999"), ("channel_mult: [1,2,2]", "channel_mult", "1,2,2"),
    ("ema_rate: 0.90", "ema_rate", "0.90"), ("data_dir: ''", "data_dir", ""), ("data_dir: 'null'", "data_dir", "null"),
    ("\ufeffseed: 3", "seed", 3), ("data_dir: \u732b", "data_dir", "\u732b"),
])  # fmt: skip
def test_a_yaml_value_is_what_it_is_on_the_command_line(tmp_path, yaml, name, expected):
    argv = write(tmp_path, "c.YAML", yaml)
    if expected is None:
        with pytest.raises(UserError, match=f"--{name}"):
            parse(ImageTraining, argv)
    else:
        assert parse(ImageTraining, argv).settings.values()[name] == expected


@pytest.mark.parametrize("json, name, expected", [
    ('{"ema_rate": [0.99, 0.9999]}', "ema_rate", "0.99,0.9999"), ('{"image_size": [48, 64]}', "image_size", "48x64"),
    ('{"max_steps": 1e6}', "max_steps", 10**6), ('\ufeff{"seed": 3}', "seed", 3),
    ('{"channel_mult": [1, 2, 2]}', "channel_mult", "1,2,2"),
])  # fmt: skip
def test_json_lists_are_lists(tmp_path, json, name, expected):
    assert parse(ImageTraining, write(tmp_path, "c.json", json)).settings.values()[name] == expected


def test_classes_are_a_list(tmp_path):
    for name, text in (("c.yaml", "classes: [cat, dog]"), ("c.json", '{"classes": ["cat", "dog"]}')):
        assert parse(ImageSampling, write(tmp_path, name, text)).settings.sample.classes == "cat,dog"
    with pytest.raises(UserError, match=r"--classes .* comma"):
        parse(ImageSampling, write(tmp_path, "c.yaml", "classes: ['cat, black']"))


@pytest.mark.parametrize("kind, option, command", [
    (ImageSampling, "max_steps", "train"), (ImageTraining, "num_samples", "sample"), (ImageTraining, "mask", "edit"),
    (ImageSampling, "features", "evaluate"), (ImageTraining, "sigma_rel", "posthoc-ema"),
])  # fmt: skip
def test_an_option_of_another_command_is_named_with_the_command(tmp_path, kind, option, command):
    for argv in ([f"--{option}", "1"], [f"--{option}=1"], write(tmp_path, "c.yaml", f"{option}: 1")):
        with pytest.raises(UserError, match=rf"unknown .*{option}.* is an option of .*\b{command}\b"):
            parse(kind, argv)


@pytest.mark.parametrize(
    "argv", [["--" + "x" * 10**6, "1"], ["x" * 10**6], ["--lr", "x" * 10**6], ["--lr\n\x1b[2J", "1"]]
)
def test_what_is_wrong_is_shown_short_and_without_control_characters(argv):
    with pytest.raises(UserError) as error:
        parse(ImageTraining, argv)
    assert len(str(error.value)) < 2000 and str(error.value).isprintable()
