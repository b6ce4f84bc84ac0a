"""State dicts as other programs save them."""

import json
import re
from collections import OrderedDict

import pytest
import torch as th
from helpers import ROOT

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.dialects import MAX_NETWORKS, networks, refuse_foreign, unwrap
from improved_diffusion.checkpoints.loading import load_classifier
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


# Several networks in a file, as these programs write them: (content, where its networks are, the one to read first)


def lucidrains(initted=True):
    """denoising-diffusion-pytorch: the network inside its GaussianDiffusion, and ema-pytorch's EMA of that."""
    buffers = {"betas": th.ones(4), "alphas_cumprod": th.ones(4)}
    ema = {
        "initted": th.tensor(initted), "step": th.tensor(9),
        **prefixed("online_model.model.", 9), **prefixed("ema_model.model."), "ema_model.betas": th.ones(4),
    }  # fmt: skip
    opt = {"state": {0: {"exp_avg": th.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {"step": 9, "model": {**buffers, **prefixed("model.", 9)}, "opt": opt, "ema": ema, "version": "1.0"}


def k_diffusion():
    return {
        "config": {"model": {"type": "image_v1"}}, "model": prefixed("inner_model.", 9),
        "model_ema": prefixed("inner_model."), "opt": {"state": {}}, "sched": {"last_lr": [1e-4]},
        "ema_sched": {"last_epoch": 3}, "epoch": 1, "step": 3, "gns_stats": None, "demo_gen": th.ones(4),
    }  # fmt: skip


def lit_ema():
    """latent-diffusion's LitEma, whose names have lost their dots."""
    averages = {"model_ema.inner" + name.replace(".", ""): tensor for name, tensor in WEIGHTS.items()}
    ours = prefixed("model.inner.", 9)
    return {"state_dict": {**ours, **averages, "model_ema.decay": th.ones(1), "model_ema.num_updates": th.ones(1)}}


SEVERAL = {
    "lucidrains": (
        lucidrains(), ["ema/ema_model.model.", "ema/online_model.model.", "model/model."], "ema/ema_model.model."
    ),
    "k-diffusion": (k_diffusion(), ["model_ema/inner_model.", "model/inner_model."], "model_ema/inner_model."),
    "LitEma": (lit_ema(), ["state_dict/model_ema.inner", "state_dict/model.inner."], "state_dict/model_ema.inner"),
    "Lightning": (
        {"state_dict": {**prefixed("net.", 9), **prefixed("net_ema.module.")}, "loops": {}, "callbacks": {}},
        ["state_dict/net_ema.module.", "state_dict/net."], "state_dict/net_ema.module.",
    ),
    "AveragedModel": (
        {"net": prefixed("", 9), "swa_model": {"n_averaged": th.tensor(3), **prefixed("module.")}},
        ["swa_model/module.", "net"], "swa_model/module.",
    ),
    "an average of parameters in a list": (
        {"ema": {"decay": 0.9, "shadow_params": [th.ones(1)]}, "model": WEIGHTS, "optimizer": {"state": {}}},
        ["model"], "model",
    ),
    "an average beside what it is of": (
        {**prefixed("", 9), **prefixed("ema.")}, ["ema.", ""], "ema.",
    ),
    "an average of all parameters in a list": (
        {"ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [*WEIGHTS.values()]}, "model": prefixed("", 9)},
        ["ema/shadow_params", "model"], "ema/shadow_params",
    ),
    "a list as the average": (
        {"net": prefixed("module.", 9), "ema": [*WEIGHTS.values()]}, ["ema", "net/module."], "ema",
    ),
    "an average under one more key": (
        {"model": prefixed("", 9), "ema": {"shadow": dict(WEIGHTS), "decay": 0.9}}, ["ema/shadow", "model"],
        "ema/shadow",
    ),
    "names that only look like an average": (
        {"model": WEIGHTS, "schema": prefixed("", 9), "ema_sched": {"a": th.ones(1)}}, ["model"], "model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content, expected, first", SEVERAL.values(), ids=SEVERAL)
def test_all_networks_are_found_and_the_average_comes_first(tmp_path, content, expected, first, capsys):
    th.save(content, tmp_path / "x.ckpt")
    state_dict, metadata = checkpoint.load(str(tmp_path / "x.ckpt"))
    assert state_dict.keys() == WEIGHTS.keys() and metadata == {}
    assert all(th.equal(state_dict[name], WEIGHTS[name]) for name in WEIGHTS)
    assert sorted(network.where for network in networks(content)) == sorted(expected)
    (line,) = capsys.readouterr().out.splitlines()
    others = [repr(where) for where in expected if where not in ("", first)]
    assert repr(first) in line and all(other in line for other in others)
    assert ("--network" in line) == (len(expected) > 1)


@pytest.mark.parametrize("content, expected, first", SEVERAL.values(), ids=SEVERAL)
def test_each_network_can_be_had_by_its_name(content, expected, first):
    for where in filter(None, expected):
        state_dict, _ = unwrap(content, "x", where)
        assert state_dict.keys() == WEIGHTS.keys()
        online = where != first
        assert all(th.equal(state_dict[name], WEIGHTS[name] + 9 * online) for name in WEIGHTS)


@pytest.mark.parametrize(
    "content",
    [
        {**lucidrains(), "ema": {**lucidrains(initted=False)["ema"], **prefixed("ema_model.model.", 20)}},
        {"state_dict": {**prefixed("model.", 9), **prefixed("ema.module."), "ema.n_averaged": th.tensor(0)}},
        {"state_dict": {**lit_ema()["state_dict"], "model_ema.num_updates": th.tensor(0)}},
        {"model": prefixed("", 9), "ema": {"num_updates": 0, "shadow_params": [*WEIGHTS.values()]}},
    ],
    ids=["ema-pytorch", "AveragedModel", "LitEma", "torch_ema"],
)
def test_an_average_that_has_not_begun_does_not_come_first(content):
    assert all(th.equal(tensor, WEIGHTS[name] + 9) for name, tensor in unwrap(content, "x")[0].items())


@pytest.mark.parametrize("ema", [[th.ones(1)], {"decay": 0.9, "shadow_params": [th.ones(2), th.ones(2)]}])
def test_an_average_that_cannot_be_read_is_said(ema):
    state_dict, note = unwrap({"model": WEIGHTS, "ema": ema}, "x")
    assert state_dict.keys() == WEIGHTS.keys() and "'ema" in note and "cannot be read" in note
    assert "cannot be read" not in unwrap({"model": WEIGHTS, "ema": [*WEIGHTS.values()]}, "x")[1]


def test_an_average_in_a_list_has_the_description_of_its_network():
    described = checkpoint.describe(WEIGHTS, {"step": 7})
    assert unwrap({"model": described, "ema": [*WEIGHTS.values()]}, "x")[0]._metadata == described._metadata


@pytest.mark.parametrize("unet, encoder", [("model.", "zclf."), ("long.model.", "c."), ("model.", "ema_clf.")])
def test_of_a_unet_and_a_classifier_the_one_that_is_needed_comes_first(unet, encoder):
    ours = {**prefixed(unet, 9), f"{unet}output_blocks.0.0.weight": th.ones(1)}
    content = {"state_dict": {**ours, **prefixed(encoder)}}
    assert "output_blocks.0.0.weight" in unwrap(content, "x")[0]
    assert unwrap(content, "x", classifier=True)[0].keys() == WEIGHTS.keys()
    assert unwrap(content, "x", f"state_dict/{encoder}")[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("network", ["generator", "a/b", "a"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_network_under_any_key_can_be_had_by_it(network, prefix):
    content = {"generator": prefixed(prefix), "a": {"b": prefixed(prefix), "model": None}, "lr": 1e-4, 3: {}}
    if network == "a":
        content["a"] = prefixed(prefix)
    state_dict, _ = unwrap(content, "x", network)
    assert state_dict.keys() == WEIGHTS.keys()
    with pytest.raises(UserError, match=r"generator.*convert --network KEY"):
        unwrap(content, "x")


# Networks that are not ours

THEIRS = {
    "Stable Diffusion": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "autoencoder": "encoder.down.0.block.0.conv1.weight",
    "GLIDE": "input_blocks.4.1.encoder_kv.weight",
    "LoRA": "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
    "diffusers": "down_blocks.0.resnets.0.conv1.weight",
    "denoising-diffusion-pytorch": "downs.0.0.block1.proj.weight",
    "pytorch_diffusion": "temb.dense.0.weight",
    "TensorFlow": "model/down_0/block_0/conv1/W",
    "EDM": "model.enc.64x64_block0.conv0.weight",
    "score_sde": "module.all_modules.0.W",
    "DiT": "blocks.0.adaLN_modulation.1.weight",
    "ResNet": "layer1.0.conv1.weight",
}


@pytest.mark.parametrize("what", THEIRS)
@pytest.mark.parametrize("load", [idf.load, load_classifier], ids=["model", "classifier"])
def test_a_network_of_another_program_is_named(tmp_path, what, load):
    th.save({"ema": {f"module.{THEIRS[what]}": th.ones(1)}, "step": 3}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=what) as error:
        load(str(tmp_path / "x.pt"))
    assert "x.pt" in str(error.value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "unet."])
def test_a_network_of_latents_is_refused_though_it_has_our_names(tmp_path, prefix):
    content = {"state_dict": {**prefixed(prefix), "first_stage_model.encoder.conv_in.weight": th.ones(1)}}
    th.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="latents"):
        checkpoint.load(str(tmp_path / "x.ckpt"))


def test_other_modules_in_a_run_keep_their_names(tmp_path):
    """A run may train any network: only a model to sample from must be one of ours."""
    weights = {"init_conv.weight": th.ones(2), "downs.0.0.block1.proj.weight": th.ones(2)}
    checkpoint.save_state_dict(weights, str(tmp_path / "model000001.pt"), {})
    assert checkpoint.load(str(tmp_path / "model000001.pt"))[0].keys() == weights.keys()


@pytest.mark.parametrize(
    "layout", sorted((ROOT / "tests" / "golden" / "layouts").iterdir()), ids=lambda path: path.stem
)
def test_no_published_network_is_taken_for_one_of_another_program(layout):
    names = list(json.loads(layout.read_text())["state_dict"])
    refuse_foreign(names, "x.pt")
    found = networks({f"module.{name}": th.ones(1) for name in names})
    assert [list(network.state_dict) for network in found] == [names]


FIRST = "time_embed.0.weight"
MANY = {
    "prefixes": lambda n: {f"net{i}.{FIRST}": th.ones(1) for i in range(n)},
    "averages": lambda n: {f"ema_{i}.{name}": th.ones(1) for i in range(n) for name in (FIRST, "num_updates")},
    "prefixes in each other": lambda n: {"a." * i + FIRST: th.ones(1) for i in range(min(n, 200))},
    "keys": lambda n: {f"ema_{i}": {FIRST: th.ones(1)} for i in range(n)},
    "lists": lambda n: {"model": {FIRST: th.ones(1)}, **{f"ema_{i}": [th.ones(1)] for i in range(n - 1)}},
    "names without dots": lambda n: (
        {f"net.{FIRST}": th.ones(1)} | {f"ema{i}{FIRST.replace('.', '')}": th.ones(1) for i in range(n - 1)}
    ),
}


@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_a_file_of_thousands_of_networks_is_refused_at_once(make):
    content = make(MAX_NETWORKS)
    assert len(networks(content)) == MAX_NETWORKS and FIRST in unwrap(content, "x.pt")[0]
    for count in (MAX_NETWORKS + 1, 5000):
        with pytest.raises(UserError, match=r"x\.pt.*networks"):
            unwrap(make(count), "x.pt")
