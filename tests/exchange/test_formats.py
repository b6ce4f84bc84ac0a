"""Exporting a model, by the command and in Python."""

import re

import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call

import improved_diffusion as idf
from improved_diffusion.config import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ema_0.9_000003.pt"
    return idf.load(save_checkpoint(path, tiny_settings(class_cond=True), class_names=CLASSES, steps=0))


def assert_same(one, other):
    weights, theirs = one.network.state_dict(), other.network.state_dict()
    assert list(weights) == list(theirs)
    assert all(th.equal(weights[name], theirs[name]) for name in weights)
    assert one.settings == other.settings and one.class_names == other.class_names and one.step == other.step


def test_an_exported_state_dict_is_the_same_model(model, tmp_path):
    model.export(tmp_path / "new" / "mine.pt")
    assert_same(idf.load(tmp_path / "new" / "mine.pt"), model)


@pytest.mark.parametrize("to", ["pt", "safetensors"])
def test_the_command_writes_the_same_bytes(model, to, tmp_path):
    model.export(tmp_path / f"mine.{to}", to=to)
    flags = ["--model_path", model.path, "--to", to, "--out", tmp_path / f"theirs.{to}"]
    call("export", *flags, cwd=tmp_path).succeed()
    assert (tmp_path / f"theirs.{to}").read_bytes() == (tmp_path / f"mine.{to}").read_bytes()
    assert_same(idf.load(tmp_path / f"theirs.{to}"), model)


@pytest.mark.parametrize(("out", "to"), [("x.safetensors", "pt"), ("x.pt", "safetensors"), ("x", "safetensors")])
def test_a_name_of_the_other_format_is_an_error_and_nothing_is_written(model, out, to, tmp_path):
    with pytest.raises(UserError, match=re.escape(out)):
        model.export(tmp_path / out, to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("out", "to"), [("", "pt"), ("x", "keras")])
def test_a_wrong_request_is_an_error_that_names_it(model, out, to):
    with pytest.raises(UserError, match="keras" if out else "path"):
        model.export(out, to=to)


@pytest.mark.parametrize("missing", ["model_path", "out"])
def test_the_command_names_what_is_missing(model, missing, tmp_path):
    flags = {"model_path": model.path, "out": tmp_path / "x.pt"}
    words = [word for name, value in flags.items() if name != missing for word in (f"--{name}", value)]
    done = call("export", *words, cwd=tmp_path)
    assert done.code == 1 and f"--{missing}" in done.err
