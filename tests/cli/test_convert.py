"""`improved-diffusion convert`: the weights in other programs' checkpoints, as plain files."""

import argparse
import os
import pathlib
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call, refused

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError

# What the files of these tests do not say of the model.
OPTIONS = dict(image_size=8, diffusion_steps=20, noise_schedule="cosine", num_heads=1, attention_resolutions="4")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "ema_0.9_000003.pt", tiny_settings())


@pytest.fixture(scope="module")
def weights(own):
    return OrderedDict(checkpoint.load(str(own))[0])


def prefixed(weights, prefix, add=0.0):
    return {f"{prefix}{name}": tensor + add for name, tensor in weights.items()}


def convert(cwd, path, out, *flags):
    return call("convert", "--model_path", path, "--out", out, *flags, cwd=cwd)


def assert_model(path, weights):
    """The file is loaded as a model with these weights."""
    found = idf.load(path, **OPTIONS).network.state_dict()
    assert found.keys() == weights.keys() and all(th.equal(found[name], weights[name]) for name in weights)


def lightning(weights, **more):
    """What Lightning's .ckpt holds."""
    return {
        "epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.2.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": {**prefixed(weights, "model.", 1), **prefixed(weights, "ema.module."), "loss.scale": th.ones(1)},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": th.tensor(0.5), "kth_value": None}},
        "optimizer_states": [{"state": {0: {"exp_avg": th.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-4}, **more,
    }  # fmt: skip


def foreign_class(monkeypatch, name):
    """A class of a module that is there only now, while the file is made."""
    module = types.ModuleType("some_framework")
    setattr(module, name, type(name, (), {"__module__": "some_framework"}))
    monkeypatch.setitem(sys.modules, "some_framework", module)
    return getattr(module, name)


@pytest.mark.parametrize("out", ["x.pt", "folder/x.safetensors", "x"])
def test_a_file_that_loads_safely_needs_no_trust(tmp_path, weights, out):
    th.save(lightning(weights), tmp_path / "a.ckpt")
    done = convert(tmp_path, "a.ckpt", out).succeed()
    assert "'state_dict/ema.module.'" in done.out and out in done.out
    assert_model(tmp_path / out, weights)


OBJECTS = {
    "argparse.Namespace": lambda: argparse.Namespace(lr=1e-4, data="x"),
    "numpy scalar": lambda: np.float32(3),
    "PurePosixPath": lambda: pathlib.PurePosixPath("data"),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("out", ["x.pt", "x.safetensors"])
def test_objects_of_other_programs_need_trust_and_are_named(tmp_path, weights, name, out):
    th.save({"model": weights, "args": OBJECTS[name]()}, tmp_path / "a.pth")
    refused(convert(tmp_path, "a.pth", out), "a.pth", name, "--trust")
    with pytest.raises(UserError, match=f"{name}.*convert --trust"):
        idf.load(tmp_path / "a.pth")
    assert not (tmp_path / out).exists()
    done = convert(tmp_path, "a.pth", out, "--trust").succeed()
    assert name in done.out
    assert_model(tmp_path / out, weights)


def test_packages_that_the_file_names_need_not_be_there(tmp_path, weights, monkeypatch):
    with monkeypatch.context() as patch:
        kind = foreign_class(patch, "AttributeDict")
        th.save(lightning(weights, hyper_parameters=kind(), hparams_type=kind), tmp_path / "a.ckpt")
    refused(convert(tmp_path, "a.ckpt", "x.pt"), "some_framework.AttributeDict", "--trust")
    convert(tmp_path, "a.ckpt", "x.pt", "--trust").succeed()
    assert_model(tmp_path / "x.pt", weights)


def test_a_whole_network_that_was_pickled_is_converted(tmp_path, own, weights):
    th.save({"ema": idf.load(own).network, "step": np.int64(3)}, tmp_path / "a.pt")
    refused(convert(tmp_path, "a.pt", "x.pt"), "UNetModel", "--trust")
    convert(tmp_path, "a.pt", "x.pt", "--trust").succeed()
    assert_model(tmp_path / "x.pt", weights)


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.safetensors", "a.bin"])
def test_a_hostile_pickle_is_not_executed(tmp_path, weights, name):
    content = {"callbacks": Runs(f"touch {tmp_path}/mark"), "model": weights}
    th.save(content, tmp_path / name)
    with pytest.raises(UserError, match="system"):
        idf.load(tmp_path / name)
    refused(convert(tmp_path, name, "x.pt"), "system")
    done = convert(tmp_path, name, "x.pt", "--trust").succeed()
    assert "system" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {name, "x.pt"}
    assert_model(tmp_path / "x.pt", weights)


def test_another_network_of_the_file_is_chosen_by_name(tmp_path, weights):
    th.save(lightning(weights), tmp_path / "a.ckpt")
    convert(tmp_path, "a.ckpt", "x.pt", "--network", "state_dict/model.").succeed()
    assert_model(tmp_path / "x.pt", {name: tensor + 1 for name, tensor in weights.items()})
    refused(convert(tmp_path, "a.ckpt", "y.pt", "--network", "state_dict/modl."), "state_dict/model.")
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_a_description_goes_along(tmp_path, trust):
    path = save_checkpoint(tmp_path / "ema_0.9_000007.pt", tiny_settings(class_cond=True), class_names=CLASSES)
    state_dict, metadata = checkpoint.load(str(path))
    metadata |= {"ema_rate": 0.9, "num_images": 5}
    checkpoint.save_state_dict(state_dict, str(path), metadata)
    for source, out in ((path, "a.safetensors"), ("a.safetensors", "b.pt")):
        convert(tmp_path, source, out, *(["--trust"] if trust else [])).succeed()
        found, kept = checkpoint.load(str(tmp_path / out))
        assert kept == metadata and all(th.equal(found[name], state_dict[name]) for name in state_dict)
    convert(tmp_path, path, "c.pt").succeed()
    assert (tmp_path / "c.pt").read_bytes() == path.read_bytes()


def test_a_classifier_is_converted_too(tmp_path):
    weights = {"time_embed.0.weight": th.ones(2, 2), "pool.proj_out.weight": th.ones(3)}
    description = {"config": {"classifier_width": 32}, "step": 3}
    checkpoint.save_state_dict(weights, str(tmp_path / "a.pt"), description)
    convert(tmp_path, "a.pt", "a.safetensors").succeed()
    assert checkpoint.load(str(tmp_path / "a.safetensors"))[1] == description


@pytest.mark.parametrize(
    "content, phrase",
    [
        ({"state_dict": {"downs.0.0.block1.proj.weight": th.ones(2)}}, "denoising-diffusion-pytorch"),
        ({"generator.0.weight": th.ones(2)}, "no network of this package"),
        ({"args": argparse.Namespace(a=1)}, "no tensors"),
        ([argparse.Namespace(a=1)], "no tensors"),
    ],
)
def test_a_file_without_our_network_is_one_error(tmp_path, content, phrase):
    th.save(content, tmp_path / "a.ckpt")
    refused(convert(tmp_path, "a.ckpt", "x.pt", "--trust"), "a.ckpt", phrase)
    assert not (tmp_path / "x.pt").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path, weights):
    broken = {**weights, "out.2.bias": th.full_like(weights["out.2.bias"], float("nan"))}
    th.save({"model": broken, "args": argparse.Namespace()}, tmp_path / "a.ckpt")
    refused(convert(tmp_path, "a.ckpt", "x.pt", "--trust"), "out.2.bias", "finite")


@pytest.mark.parametrize(
    "flags, phrase",
    [
        ([], "--model_path"),
        (["--model_path", "a.pt"], "--out"),
        (["--model_path", "nowhere.pt", "--out", "x.pt"], "nowhere.pt"),
        (["--model_path", "a.pt", "--out", "./a.pt"], "is the file to read"),
        (["--model_path", "a.pt", "--out", "."], "is a folder"),
        (["--model_path", "fifo", "--out", "x.pt", "--trust"], "pipe"),
        (["--model_path", "cut.pt", "--out", "x.pt", "--trust"], "damaged"),
        (["--model_path", "cut.safetensors", "--out", "x.pt", "--trust"], "cut off"),
    ],
)
def test_wrong_use_is_one_error(tmp_path, weights, flags, phrase):
    th.save(weights, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(before[: len(before) // 2])
    (tmp_path / "cut.safetensors").write_bytes(safetensors.torch.save(dict(weights))[:300])
    os.mkfifo(tmp_path / "fifo")
    refused(call("convert", *flags, cwd=tmp_path), phrase)
    assert (tmp_path / "a.pt").read_bytes() == before and not (tmp_path / "x.pt").exists()
