"""State dicts as other programs save them."""

import re
from collections import OrderedDict

import pytest
import torch as th

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.dialects import unwrap
from improved_diffusion.config import UserError

WEIGHTS = OrderedDict(
    (name, th.full((2,), float(i)))
    for i, name in enumerate(["time_embed.0.weight", "module.out.bias", "input_blocks.0.0.weight"])
)


def prefixed(prefix, value=None):
    return {prefix + name: tensor if value is None else tensor + value for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."),
        prefixed("_orig_mod.module.module."),
        {"model": WEIGHTS, "step": 3}, {"state_dict": prefixed("model."), "epoch": 1},
        {"model": prefixed("module.", 9), "ema": dict(WEIGHTS), "optimizer": {"state": {}}},
        {"checkpoint": 1, "model": {"state_dict": {"net": prefixed("module.")}}},
        {"state_dict": {**prefixed("model.", 9), **prefixed("model_ema."), "loss.scale": th.ones(1)}},
        {"ema": {}, "model": WEIGHTS},
    ],
)  # fmt: skip
def test_wrappers_and_prefixes_are_taken_off_and_said(tmp_path, content, capsys):
    th.save(content, tmp_path / "x.pt")
    state_dict, metadata = checkpoint.load(str(tmp_path / "x.pt"))
    assert list(state_dict) == list(WEIGHTS) and metadata == {}
    assert all(th.equal(state_dict[name], WEIGHTS[name]) for name in WEIGHTS)
    assert str(tmp_path / "x.pt") in capsys.readouterr().out


def test_other_modules_lose_only_what_parallel_wrappers_add():
    state_dict = {"module.weight": th.ones(1), "module.bias": th.ones(1)}
    assert list(unwrap(state_dict, "x")[0]) == ["weight", "bias"]
    assert unwrap({"module.weight": th.ones(1), "bias": th.ones(1)}, "x")[1] == ""


def test_own_files_are_read_as_they_are_with_their_description(tmp_path, capsys):
    checkpoint.save_state_dict(WEIGHTS, str(tmp_path / "x.pt"), {"step": 1})
    state_dict, metadata = checkpoint.load(str(tmp_path / "x.pt"))
    assert metadata == {"step": 1} and list(state_dict) == list(WEIGHTS) and capsys.readouterr().out == ""


def test_a_wrapped_description_is_found(tmp_path):
    described = checkpoint.describe(WEIGHTS, {"step": 7})
    th.save({"ema": described}, tmp_path / "x.pt")
    assert checkpoint.load(str(tmp_path / "x.pt"))[1] == {"step": 7}


@pytest.mark.parametrize(
    "content", [{"generator": dict(WEIGHTS), "lr": 1e-4}, [1, 2], {"model": {"depth": 3}}, {"a": {}}]
)
def test_a_file_without_weights_names_what_it_holds(content):
    with pytest.raises(UserError, match=re.escape("x.pt is not a model's state dict")) as error:
        unwrap(content, "x.pt")
    shown = content if isinstance(content, dict) else ["list"]
    assert all(str(key) in str(error.value) for key in shown)
