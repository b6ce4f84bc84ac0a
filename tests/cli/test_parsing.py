"""Command lines to settings: help, words, lists, and what is refused."""

import re
from dataclasses import dataclass, fields

import pytest

from improved_diffusion.cli.image_edit import COMMAND as EDIT
from improved_diffusion.cli.image_sample import COMMAND as SAMPLE
from improved_diffusion.cli.parsing import parse, split_lists
from improved_diffusion.config import EditConfig, ImagesConfig, RunConfig, SamplerConfig, UserError
from improved_diffusion.config.settings import ImageSampling, Settings

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
        default = "empty" if f.default == "" else f.default
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


def test_words_before_the_flags_are_for_one_option():
    def parsed(*argv):
        return parse(Searching, argv, words="images")

    assert parsed("a", "b", "--seed", "3").settings.images.images == "a,b"
    assert parsed("a,b").settings.images.images == "a,b" and parsed("a").given == {"images"}
    assert parsed("--images", "c", "--seed", "3").settings.images.images == "c"
    assert parsed("--seed", "3").settings.images.images == ""
    with pytest.raises(UserError, match="'b'"):
        parsed("a", "--seed", "3", "b")


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
