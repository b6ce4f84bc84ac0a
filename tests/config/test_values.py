"""Every option of every command with odd values, from flags, files and Python: a value of its type, or a UserError."""

import dataclasses
import datetime
import inspect
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from improved_diffusion.cli import parsing
from improved_diffusion.config import UserError, settings
from improved_diffusion.config.messages import shown
from improved_diffusion.config.settings import (
    ImageSampling,
    ImageTraining,
    Inpainting,
    Interpolation,
    PosthocEMA,
    Scoring,
    Settings,
)
from improved_diffusion.config.values import (
    LONGEST_TEXT,
    comma_list,
    number_list,
    path_of,
    plain_text,
    real_number,
    str2bool,
)

KINDS = [kind for _, kind in inspect.getmembers(settings, inspect.isclass)
         if issubclass(kind, Settings) and kind is not Settings]  # fmt: skip
TWICE = [0]
for _ in range(40):
    TWICE = [TWICE, TWICE]  # 2^40 items, if anyone spells them out
ODD = {
    "null": None, "empty": "", "blank": " ", "negative": -5, "zero": 0, "billion": 10**9, "huge": 10**30,
    "endless digits": 10**5000, "nan": math.nan, "inf": math.inf, "text nan": "nan", "text inf": "-inf", "letter": "a",
    "list": [], "list of null": [None], "list of huge": [10**5000], "nested": [[1]], "twice": TWICE, "dict": {},
    "fraction": 1.5, "text fraction": "2.5", "true": True, "surrogate": "\ud800", "nul": "a\0b", "newline": "a\nb",
    "long": "x" * 10**6, "long number": "9" * 10**6, "commas": ",", "gap": "1,,2", "twice the same": "0.9,0.90",
    "superscript": "\u00b2", "other digits": "\uff14", "tilde": "~nobody-of-that-name/x", "range": "5-10000000000",
    "bytes": b"a", "date": datetime.date(2024, 1, 1), "object": object(), "array": np.zeros(3),
    "numpy int": np.int64(3), "set": {1},
}  # fmt: skip


GROUPS = sorted({group for kind in KINDS for group in kind.groups().values()}, key=lambda group: group.__name__)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_an_odd_value_is_taken_in_the_options_type_or_refused_by_name(group):
    for f in dataclasses.fields(group):
        name = f.name
        for what, odd in ODD.items():
            start = time.monotonic()
            try:
                value = getattr(group(**{name: odd}), name)
            except UserError as error:
                assert f"--{name}" in str(error), (name, what)
                assert len(str(error)) < 1000 and str(error).isprintable(), (name, what)
            else:
                assert type(value) is type(f.default) or {type(value), type(f.default)} == {int, str}
                assert value == value and len(str(value)) <= LONGEST_TEXT, (name, what)
            assert time.monotonic() - start < 2, (name, what)


@pytest.mark.parametrize("kind, options", [
    (ImageTraining, {"batch_size": 0}), (ImageTraining, {"batch_size": 10**12}), (ImageTraining, {"microbatch": -2}),
    (ImageTraining, {"batch_size": 2.5}), (ImageTraining, {"batch_size": "2.5"}), (ImageTraining, {"batch_size": True}),
    (ImageTraining, {"save_interval": -1}), (ImageTraining, {"max_hours": "nan"}), (ImageTraining, {"lr": 0}),
    (ImageTraining, {"lr": -1}), (ImageTraining, {"dropout": 1.5}), (ImageTraining, {"label_drop": -0.1}),
    (ImageTraining, {"ema_rate": "0.9,0.90"}), (ImageTraining, {"ema_rate": "0.9,0.9"}),
    (ImageTraining, {"ema_rate": [0.9, 0.9]}), (ImageTraining, {"ema_rate": "1"}), (ImageTraining, {"ema_rate": "nan"}),
    (ImageTraining, {"ema_sigma_rel": "0.1,0.10"}), (ImageTraining, {"channel_mult": "nan"}),
    (ImageTraining, {"channel_mult": "1,inf"}), (ImageTraining, {"hang_timeout": 1e300}),
    (PosthocEMA, {"sigma_rel": "0.1,0.1"}), (ImageSampling, {"num_samples": 0}),
    (ImageSampling, {"num_samples": 10**12}), (ImageSampling, {"seeds": "1,,2"}), (ImageSampling, {"seeds": "1,1"}),
    (ImageSampling, {"seeds": "5-10000000000"}), (ImageSampling, {"seeds": "5-1"}), (ImageSampling, {"steps": -1}),
    (ImageSampling, {"classes": ","}), (ImageSampling, {"classes": []}), (ImageSampling, {"model_path": 5}),
    (ImageSampling, {"guidance_interval": "1,nan"}), (ImageSampling, {"churn": -1, "sampler": "heun"}),
    (Interpolation, {"seeds": "1"}), (Interpolation, {"frames": 1}), (Inpainting, {"resamplings": 0}),
    (Scoring, {"feature_batch": 0}), (Scoring, {"features": True}), (Scoring, {"resize": "0"}),
])  # fmt: skip
def test_a_value_that_cannot_work_is_refused(kind, options):
    with pytest.raises(UserError, match=f"--{next(iter(options))} "):
        kind.of(options)


@pytest.mark.parametrize("name, given, expected", [
    ("ema_rate", [0.99, 0.9999], "0.99,0.9999"), ("ema_rate", 0.9, "0.9"), ("channel_mult", [1, 2, 2], "1,2,2"),
    ("attention_resolutions", (16, 8), "16,8"), ("max_steps", "1e6", 10**6), ("max_steps", 1e6, 10**6),
    ("batch_size", np.int64(3), 3), ("lr", np.float32(0.5), 0.5), ("learn_sigma", np.bool_(True), True),
    ("image_size", [48, 64], "48x64"), ("image_size", "64", 64), ("data_dir", Path("a/b"), "a/b"),
    ("microbatch", 0, 0), ("learn_sigma", 1, True),
])  # fmt: skip
def test_values_of_files_and_of_python_are_taken(name, given, expected):
    value = ImageTraining.of({name: given}).values()[name]
    assert value == expected and type(value) is type(expected)


# Paths

PATHS = [(kind, name) for kind in KINDS for name, f in kind.options().items()
         if f.metadata["parse"].__name__ in ("path_of", "paths_of")]  # fmt: skip


def test_the_options_that_are_paths():
    assert {name for _, name in PATHS} == {
        "data_dir", "val_dir", "labels", "resume", "resume_checkpoint", "init_checkpoint", "out_dir", "run_dir",
        "model_path", "guide_path", "classifier_path", "base_samples", "reference", "samples", "train_dir", "held_out",
        "features", "logits", "images", "mask", "latents", "out", "report", "reports", "runs", "data_root",
        "token_file", "cache", "teacher",
    }  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind, name", PATHS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_tilde_is_the_home_folder_in_every_path(kind, name, home):
    others = {"guidance_scale": 2} if name == "guide_path" else {}

    def read(value):
        return kind.of({name: value, **others}).values()[name]

    assert read("~/x.npz") == read(Path("~/x.npz")) == f"{home}/x.npz"
    assert read("~") == str(home)
    assert read("a~/~b") == "a~/~b" and read("./~b") == "./~b"
    if name != "out_dir":
        assert read("gs://b/~c") == "gs://b/~c"
    with pytest.raises(UserError, match=rf"--{name} .*nobody-of-that-name"):
        read("~nobody-of-that-name/x")


def test_each_of_several_paths_is_expanded(home):
    for given in ("~/a.png, ~/b.png,c.png", ["~/a.png", "~/b.png", Path("c.png")]):
        assert Inpainting.of({"images": given}).images.images == f"{home}/a.png,{home}/b.png,c.png"


def test_a_tilde_in_flags_and_files(home, tmp_path):
    (home / "c.json").write_text('{"data_dir": "~/d"}')
    (home / "c.yaml").write_text("data_dir: ~/d\n")
    for argv in (["--data_dir", "~/d"], ["--config", "~/c.json"], ["--config", "~/c.yaml"]):
        assert parsing.parse(ImageTraining, argv).settings.data.data_dir == f"{home}/d"


@pytest.mark.skipif(os.name == "nt", reason="users of other systems")
def test_the_home_folder_of_a_user():
    pwd = pytest.importorskip("pwd")
    user = pwd.getpwuid(0)
    assert ImageTraining.of({"data_dir": f"~{user.pw_name}/x"}).data.data_dir == f"{user.pw_dir}/x"


# Messages and lists


def test_values_in_messages_are_short():
    for value in (TWICE, {"a": TWICE}, "x" * 10**7, 10**5000, [10**5000] * 100, "\ud800" * 10**6):
        start = time.monotonic()
        assert len(shown(value)) < 600
        assert time.monotonic() - start < 1
    assert shown("fast") == "'fast'" and shown(3) == "3" and shown(2.5) == "2.5"


def test_ranges_are_counted_before_they_are_written_out():
    assert number_list("17,40-42") == [17, 40, 41, 42] and number_list("") == number_list(" ") == []
    for wrong in ("0-999999999999999999", "9" * 50, "0-500000,600000-1200000", "1-", "-1", "a", "1,,2", "1,", "\u00b2"):
        with pytest.raises(ValueError):
            number_list(wrong)


def test_lists_hold_finite_numbers():
    for wrong in ("nan", "1,inf", "1e999"):
        with pytest.raises(ValueError):
            comma_list(wrong, float)


@pytest.mark.parametrize("kind", [str2bool, plain_text, real_number, path_of])
@pytest.mark.parametrize("value", [10**5000, -(10**5000), [10**5000]], ids=["large", "negative", "in a list"])
def test_a_number_that_python_does_not_spell_is_refused_in_our_words(kind, value):
    with pytest.raises(ValueError, match=r"expected|digits") as error:
        kind(value)
    assert "string conversion" not in str(error.value)
