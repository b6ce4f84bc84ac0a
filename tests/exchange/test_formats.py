"""Exporting a model, by the command and in Python."""

import re
from pathlib import Path

import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call, refused

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint, sets
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


def pt_of(model, out):
    return ["export", "--model_path", model.path, "--to", "pt", "--out", out]


def convert_of(model, out):
    return ["convert", "--model_path", model.path, "--out", out]


@pytest.mark.parametrize("out", ["x.onnx", "x.PT2", "new.pt/", "folder"])
@pytest.mark.parametrize("words", [pt_of, convert_of])
def test_a_name_that_is_none_of_weights_is_an_error_and_nothing_is_written(model, words, out, tmp_path):
    (tmp_path / "folder").mkdir()
    refused(call(*words(model, out), cwd=tmp_path), out)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("words", [pt_of, convert_of])
def test_the_checkpoints_of_a_run_are_not_overwritten(model, words, tmp_path):
    names = [checkpoint.model_name(4), checkpoint.ema_name("0.9999", 4), checkpoint.optimizer_name(4)]
    sets.write_set(str(tmp_path), 4, 4, [(name, {"a": th.ones(1)}) for name in names])
    for name in names:
        refused(call(*words(model, tmp_path / name), cwd=tmp_path), name, "checkpoints of the run")
        with pytest.raises(UserError, match=re.escape(name)):
            model.save(tmp_path / name)
    assert sets.problem_of(str(tmp_path), 4) is None
    call(*words(model, tmp_path / checkpoint.ema_name("0.5", 4)), cwd=tmp_path).succeed()  # of no set
    assert sets.problem_of(str(tmp_path), 4) is None


@pytest.mark.parametrize("words", [pt_of, convert_of])
def test_the_file_that_is_read_is_not_overwritten(model, words, tmp_path):
    before = Path(model.path).read_bytes()
    (tmp_path / "link").symlink_to(Path(model.path).parent)
    for out in (model.path, tmp_path / "link" / Path(model.path).name):
        refused(call(*words(model, out), cwd=tmp_path), str(out))
    assert Path(model.path).read_bytes() == before


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
