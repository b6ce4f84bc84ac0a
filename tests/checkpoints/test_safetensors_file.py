"""Weights and their description in .safetensors files; files of that name that are damaged or hostile."""

import json
import os
import struct
import sys
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import TINY_IMAGE, call, write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint, safetensors_file
from improved_diffusion.config import ClassifierConfig, UserError
from improved_diffusion.models.build import build_classifier
from improved_diffusion.utils import torch_files

METADATA = {"config": {"lr": 1e-4, "name": "ä"}, "class_names": ["cat", "dög"], "step": 7, "ema_rate": 0.999}
WEIGHTS = OrderedDict({"b.weight": th.arange(6.0).view(2, 3), "a": th.tensor(2.0), "b.bias": th.zeros(0, 3)})


def assert_same(state_dict, other):
    assert state_dict.keys() == other.keys()
    for name in state_dict:
        assert state_dict[name].dtype == other[name].dtype and th.equal(state_dict[name], other[name])


# What is written comes back


def test_weights_and_description_come_back_bitwise(tmp_path):
    path = str(tmp_path / "x.safetensors")
    checkpoint.save_state_dict(WEIGHTS, path, METADATA)
    state_dict, metadata = checkpoint.load(path)
    assert_same(state_dict, WEIGHTS)
    assert metadata == METADATA
    shapes, metadata = checkpoint.read_outline(path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()} and metadata == METADATA


@pytest.mark.parametrize("dtype", [*torch_files.FLOATS, *torch_files.INTEGERS])
def test_every_type_of_a_checkpoint_comes_back(tmp_path, dtype):
    weights = {"a": th.tensor([0, 1, 100]).to(dtype)}
    checkpoint.save_state_dict(weights, str(tmp_path / "x.safetensors"), {})
    assert_same(checkpoint.load(str(tmp_path / "x.safetensors"))[0], weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors"])
def test_tensors_in_any_layout_and_of_one_memory_are_written(tmp_path, suffix):
    one = th.arange(12.0)
    weights = {"a": one.view(3, 4).t(), "b": one[2:5], "c": one}
    checkpoint.save_state_dict(weights, str(tmp_path / f"x{suffix}"), {})
    assert_same(checkpoint.load(str(tmp_path / f"x{suffix}"))[0], weights)


def test_other_programs_read_the_file_and_its_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save_state_dict(WEIGHTS, str(path), METADATA)
    assert_same(safetensors.torch.load_file(path), WEIGHTS)
    with safetensors.safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["improved_diffusion"]) == METADATA


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "{}", "step": "3"}])
def test_metadata_of_other_programs_is_no_description(tmp_path, metadata):
    safetensors.torch.save_file(dict(WEIGHTS), tmp_path / "x.safetensors", metadata)
    assert checkpoint.load(str(tmp_path / "x.safetensors"))[1] == {}


@pytest.mark.parametrize("name", ["x.pt", "x", "x.safetensors"])
def test_a_file_is_recognised_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(safetensors.torch.save(dict(WEIGHTS)))
    assert_same(checkpoint.load(str(tmp_path / name))[0], WEIGHTS)
    th.save(dict(WEIGHTS), tmp_path / name)
    assert_same(checkpoint.load(str(tmp_path / name))[0], WEIGHTS)


def test_names_of_wrapped_modules_are_taken_off(tmp_path, capsys):
    tensors = {f"ema.module.{name}": tensor for name, tensor in {**WEIGHTS, "time_embed.0.weight": th.ones(1)}.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert checkpoint.load(str(tmp_path / "x.safetensors"))[0].keys() == {*WEIGHTS, "time_embed.0.weight"}
    assert "'ema.module.'" in capsys.readouterr().out


# As a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ema_0.9_000003.pt"
    return idf.load(save_checkpoint(path, tiny_settings(class_cond=True), class_names=CLASSES, steps=0))


def test_a_model_survives_the_way_there_and_back(model, tmp_path):
    model.save(tmp_path / "x.safetensors")
    found = idf.load(tmp_path / "x.safetensors")
    found.save(tmp_path / "back.pt")
    back = idf.load(tmp_path / "back.pt")
    for other in (found, back):
        assert_same(other.network.state_dict(), model.network.state_dict())
        assert other.settings == model.settings and list(other.class_names) == CLASSES and other.step == model.step
    assert checkpoint.load(back.path)[1] == checkpoint.load(found.path)[1]


def test_a_file_without_a_description_is_as_one_of_torch(model, tmp_path):
    weights = model.network.state_dict()
    safetensors.torch.save_file(dict(weights), tmp_path / "x.safetensors")
    th.save(dict(weights), tmp_path / "x.pt")
    options = {name: model.settings.values()[name] for name in ("image_size", "diffusion_steps", "noise_schedule")}
    one, two = (idf.load(tmp_path / name, **options) for name in ("x.safetensors", "x.pt"))
    assert one.settings == two.settings
    assert_same(one.network.state_dict(), two.network.state_dict())


# Damaged and hostile files


def forged(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), place=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place), **more}


WHOLE = forged({"a": entry()}, bytes(8))


def refusal(path, data):
    """The one line that a file is refused with."""
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        checkpoint.load(str(path))
    message = str(error.value)
    assert str(path) in message and message.isprintable() and len(message) < 600
    return message


@pytest.mark.parametrize(
    "data, culprit",
    [
        (WHOLE[:-1], "end elsewhere"),
        (WHOLE[:30], "cut off"),
        (WHOLE + b"\0", "end elsewhere"),
        (forged({"a": entry()}, bytes(8), length=2**63), "claims 9,223,372,036,854,775,808 bytes"),
        (forged({"a": entry()}, bytes(8), length=2**64 - 1), "claims"),
        (forged({"a": entry()}, bytes(8), length=1), "claims 1 bytes"),
        (forged({"a": entry()}, bytes(8), length=50), "not readable JSON"),
        (forged(b'{"a": ' + b"[" * 10**5), "nested too deeply"),
        (forged(b'{"a": 1, "a": 2}'), "twice"),
        (forged(b'{"a": NaN}'), "finite"),
        (forged(b'{"\xff": 1}'), "JSON"),
        (forged({"a": []}), "a type, a shape and a place"),
        (forged({"a": entry(kind=1)}, bytes(8)), "a type, a shape and a place"),
        (forged({"a": entry("BOOL", (8,))}, bytes(8)), "a has the type 'BOOL'"),
        (forged({"a": entry("F8_E4M3", (8,))}, bytes(8)), "F8_E4M3"),
        (forged({"a": entry("C64", (1,))}, bytes(8)), "C64"),
        (forged({"a": entry(["F32"])}, bytes(8)), "F32"),
        (forged({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "bytes"),
        (forged({"a": entry(shape=(2**63, 0), place=(0, 0))}), "has the shape"),
        (forged({"a": entry(shape=(1,) * 9 + (2,))}, bytes(8)), "has the shape"),
        (forged({"a": entry(shape=(-2, -1))}, bytes(8)), "has the shape"),
        (forged({"a": entry(shape=(True, 2))}, bytes(8)), "has the shape"),
        (forged({"a": entry(shape=(3,))}, bytes(8)), "8 bytes"),
        (forged({"a": entry(place=(8, 0))}, bytes(8)), "bytes"),
        (forged({"a": entry(place=(0, 8, 8))}, bytes(8)), "has the place"),
        (forged({"a": entry(), "b": entry()}, bytes(8)), "overlap"),
        (forged({"a": entry(), "b": entry(place=(4, 12))}, bytes(12)), "overlap"),
        (forged({"a": entry(), "b": entry(place=(12, 20))}, bytes(20)), "gaps"),
        (forged({"a": entry(), "__metadata__": [1]}, bytes(8)), "metadata"),
        (forged({"a": entry(), "__metadata__": {"step": 3}}, bytes(8)), "metadata"),
        (forged({"a": entry(), "__metadata__": {"improved_diffusion": "{"}}, bytes(8)), "description"),
        (forged({"a": entry(), "__metadata__": {"improved_diffusion": '{"step": -1}'}}, bytes(8)), "step"),
        (forged({"a": entry()}, struct.pack("<2f", 1, float("nan"))), "not finite"),
        (forged({"\x1b[31m" * 100: entry("U64")}, bytes(8)), "U64"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_error(tmp_path, data, culprit):
    assert culprit in refusal(tmp_path / "x.safetensors", data)


@pytest.mark.parametrize(
    "data, culprit",
    [
        (b"", "empty"),
        (b"1234567", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
        (b'{"a": [1, 2, 3]}', "text file"),
    ],
)
def test_a_file_of_something_else_under_this_name_is_named(tmp_path, data, culprit):
    assert culprit in refusal(tmp_path / "x.safetensors", data)


@pytest.mark.parametrize("shape", [(2**40,), (2**40, 2**40), (2**20, 0, 2**20), (2**47, 2**47, 0), (0, 2**47, 2**47)])
def test_a_shape_larger_than_the_file_takes_no_memory(tmp_path, shape):
    (tmp_path / "x.safetensors").write_bytes(forged({"a": entry(shape=shape)}, bytes(8)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"8 bytes|has the shape"):
            checkpoint.load(str(tmp_path / "x.safetensors"))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_of_a_large_file_only_the_header_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    os.truncate(path, 2**40)  # takes no space on the disk
    with pytest.raises(UserError, match="end elsewhere"):
        checkpoint.load(str(path))


def test_a_large_header_is_refused_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 100)
    assert "more than a checkpoint needs" in refusal(tmp_path / "x.safetensors", forged({"a" * 100: entry()}, bytes(8)))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_pipe_and_a_folder_are_refused(tmp_path, suffix):
    os.mkfifo(tmp_path / f"x.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("x", "folder"):
        with pytest.raises(UserError, match=r"pipe|folder"):
            checkpoint.load(str(tmp_path / f"{name}.{suffix}"))


def test_without_the_package_the_message_names_it(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"improved_diffusion\[safetensors\]"):
        checkpoint.load(str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r"improved_diffusion\[safetensors\]"):
        checkpoint.save_state_dict(WEIGHTS, str(tmp_path / "y.safetensors"), {})


# By the commands


def test_the_files_serve_as_model_guide_and_classifier(tmp_path):
    settings = tiny_settings(class_cond=True)
    save_checkpoint(tmp_path / "run" / "ema_0.9_000003.pt", settings, class_names=CLASSES)
    config = ClassifierConfig(
        image_size=8, num_classes=2, classifier_width=32, classifier_depth=1, channel_mult="1,1",
        classifier_attention_resolutions="4",
    )  # fmt: skip
    described = {"config": {**vars(config), "diffusion_steps": 20, "noise_schedule": "cosine"}, "class_names": CLASSES}
    path = tmp_path / "c" / "ema_0.9_000003.pt"
    path.parent.mkdir()
    checkpoint.save_state_dict(build_classifier(config).state_dict(), str(path), described)
    for folder in ("run", "c"):
        flags = ["--model_path", folder, "--out", f"{folder}.safetensors"]
        call("convert", *flags, cwd=tmp_path).succeed()
    arrays = []
    for suffix in ("", ".safetensors"):
        flags = ["--model_path", f"run{suffix}", "--guide_path", f"run{suffix}", "--classifier_path", f"c{suffix}"]
        rest = ["--guidance_scale", "2", "--classifier_scale", "1", "--classes", "cat", "--num_samples", "2"]
        out = tmp_path / f"out{suffix}"
        call("image_sample", *flags, *rest, "--steps", "2", "--out_dir", out, cwd=tmp_path).succeed()
        arrays.append(np.load(out / "samples_2x8x8x3.npz")["arr_0"])
    assert (arrays[0] == arrays[1]).all()


def test_a_run_starts_from_such_a_file(model, tmp_path):
    model.save(tmp_path / "x.safetensors")
    write_images(tmp_path / "images", 4)
    flags = ["--init_checkpoint", "x.safetensors", "--data_dir", "images", "--out_dir", "run", *TINY_IMAGE]
    call("image_train", *flags, "--class_cond", "True", "--max_steps", "1", "--batch_size", "2", cwd=tmp_path).succeed()
    trained, before = checkpoint.load(str(tmp_path / "run" / "model000000.pt"))[0], model.network.state_dict()
    for name in before:  # after one step of Adam, of at most lr = 1e-4
        th.testing.assert_close(trained[name], before[name], rtol=0, atol=2e-4)
