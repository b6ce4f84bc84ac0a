"""Networks that run compiled, in another layout or with checkpointing by level give what they give without."""

import os
import subprocess
import sys

import pytest
import torch as th
import torch._dynamo
from helpers import TESTS, set_golden_weights
from script_helpers import environment
from torch import nn
from torch._dynamo.utils import counters
from train_helpers import Data, assert_sets_equal, into, make_loop, small_diffusion

from improved_diffusion.config import SpeedConfig, TrainSpeedConfig, UserError
from improved_diffusion.models import acceleration
from improved_diffusion.models.acceleration import accelerate, checkpoint_levels
from improved_diffusion.unet import AttentionBlock, EncoderUNetModel, QKVAttention, ResBlock, UNetModel


@pytest.fixture
def quick(monkeypatch):
    """Compile without generating code: what is traced and shared is the same."""
    monkeypatch.setattr(acceleration, "COMPILER", "aot_eager")
    monkeypatch.delenv(acceleration.CACHE_VARIABLE, raising=False)
    th._dynamo.reset()
    counters.clear()
    yield
    th._dynamo.reset()


def unet(**kwargs):
    arguments = dict(channel_mult=(1, 2, 3), num_heads=2, num_classes=3) | kwargs
    return set_golden_weights(UNetModel(3, 32, 6, 1, (2,), **arguments))


def inputs(count=2):
    return (th.randn(count, 3, 8, 8), th.arange(count) * 100.0), {"y": th.arange(count) % 3}


def gradients(call, model, args, kwargs):
    """[the output, the gradient of each parameter]."""
    out = call(*args, **kwargs)
    return [out.detach(), *th.autograd.grad(out.square().mean(), list(model.parameters()))]


def compilations():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_a_compiled_network_has_the_same_gradients_and_compiles_once(mode, quick):
    model = unet(channel_mult=(1, 2, 3) if mode == "blocks" else (1,))
    names, (args, kwargs) = list(model.state_dict()), inputs()
    plain = gradients(model, model, args, kwargs)
    fast = accelerate(model, SpeedConfig(compile=mode))
    found = gradients(fast, model, args, kwargs)
    for one, other in zip(found, plain, strict=True):
        th.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names and not counters["graph_break"]
    blocks = [m for m in model.modules() if isinstance(m, acceleration.BLOCKS)]
    once = compilations()
    # More kinds than torch compiles by itself; blocks of equal shapes share.
    assert 8 < once < len(blocks) if mode == "blocks" else once == 1
    gradients(fast, model, args, kwargs)
    with th.no_grad():  # what runs plain: other modes, other batches, the model itself
        fast(*args, **kwargs)
        model(*args, **kwargs)
    (few, t), y = inputs(1)
    fast(few, t, **y)
    fast.eval()
    fast(*args, **kwargs)
    assert compilations() == once


def test_hooks_and_replaced_blocks_are_called_when_compiled(quick):
    class Doubled(ResBlock):
        def forward(self, x, emb):
            return 2 * super().forward(x, emb)

    model, (args, kwargs) = unet(channel_mult=(1,)), inputs()
    plain, seen = model(*args, **kwargs), []
    model.middle_block[0].__class__ = Doubled
    model.middle_block[1].register_forward_hook(lambda module, args, out: seen.append(out))
    changed = model(*args, **kwargs)
    found = accelerate(model, SpeedConfig(compile="blocks"))(*args, **kwargs)
    assert len(seen) == 2
    th.testing.assert_close(found, changed, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_compiled_code_is_kept_where_the_user_says(quick, monkeypatch, tmp_path):
    for given in (None, str(tmp_path)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if given:
            monkeypatch.setenv(acceleration.CACHE_VARIABLE, given)
        accelerate(unet(channel_mult=(1,)), SpeedConfig(compile="blocks"))
        expected = given or str(tmp_path / "cache" / "improved_diffusion" / "compiled")
        assert os.environ[acceleration.CACHE_VARIABLE] == expected
        monkeypatch.delenv(acceleration.CACHE_VARIABLE)


# What cannot be done


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_a_missing_or_failing_compiler_is_one_message(mode, quick, monkeypatch, tmp_path):
    def failing(graph, inputs):
        raise RuntimeError("no such thing")

    model, (args, kwargs) = unet(channel_mult=(1,)), inputs()
    monkeypatch.setattr(acceleration, "COMPILER", failing)
    with pytest.raises(UserError, match=r"--compile.*no such thing"):
        accelerate(model, SpeedConfig(compile=mode))(*args, **kwargs)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile.*compiler"):
        accelerate(model, SpeedConfig(compile=mode))


def test_cuda_graphs_without_a_gpu_are_refused():
    with pytest.raises(UserError, match="--cuda_graphs"):
        accelerate(unet(), SpeedConfig(cuda_graphs=True))
    with pytest.raises(UserError, match="--checkpoint_levels"):
        TrainSpeedConfig(cuda_graphs=True, checkpoint_levels="0")


# Options


@pytest.mark.parametrize("given, mode", [(True, "blocks"), ("True", "blocks"), ("no", "off"), ("model", "model")])
def test_compile_is_a_switch_or_a_mode(given, mode):
    assert SpeedConfig(compile=given).compile == mode
    with pytest.raises(UserError, match="--compile"):
        SpeedConfig(compile="blcks")


def test_without_options_the_network_is_called_itself():
    model = unet()
    assert accelerate(model, SpeedConfig()) is model
    assert accelerate(model, SpeedConfig(memory_format="channels_last")) is model


# Channels last


@pytest.mark.parametrize("heads", [dict(num_heads=4), dict(num_head_channels=16, use_new_attention_order=True)])
def test_channels_last_has_the_same_gradients(heads):
    model, (args, kwargs) = unet(**heads), inputs()
    plain = gradients(model, model, args, kwargs)
    accelerate(model, SpeedConfig(memory_format="channels_last"))
    for one, other in zip(gradients(model, model, args, kwargs), plain, strict=True):
        th.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", ["hook", "module", "class", "instance"])
def test_an_attention_that_somebody_changed_is_called(change, monkeypatch):
    block = set_golden_weights(AttentionBlock(64, num_heads=2))
    x = th.randn(2, 64, 4, 4).to(memory_format=th.channels_last)
    plain, calls = block(x), []

    def zeros(qkv):
        calls.append(1)
        return 0 * qkv[:, : qkv.shape[1] // 3]

    if change == "hook":
        block.attention.register_forward_hook(lambda module, args, out: zeros(*args))
    elif change == "module":
        block.attention = type("Mine", (nn.Module,), {"forward": lambda self, qkv: zeros(qkv)})()
    elif change == "class":
        monkeypatch.setattr(QKVAttention, "forward", lambda self, qkv: zeros(qkv))
    else:
        block.attention.forward = zeros
    assert (block(x) - plain).abs().max() > 1e-3 and calls


# Activation checkpointing


@pytest.mark.parametrize("levels, share", [("", 0), ("0", 0.5), ("0,1,2", 1)])
def test_checkpointing_by_level_has_the_same_gradients(levels, share):
    model, (args, kwargs) = unet(dropout=0.2), inputs()
    th.manual_seed(1)
    plain = gradients(model, model, args, kwargs)
    checkpoint_levels(model, TrainSpeedConfig(checkpoint_levels=levels).levels)
    blocks = [m for m in model.modules() if isinstance(m, (ResBlock, AttentionBlock))]
    on = sum(m.use_checkpoint for m in blocks) / len(blocks)
    assert on == share if share in (0, 1) else 0 < on < 1
    th.manual_seed(1)
    for one, other in zip(gradients(model, model, args, kwargs), plain, strict=True):
        th.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("updown", [False, True])
def test_levels_are_those_of_the_widths(updown):
    for model in (
        unet(resblock_updown=updown),
        EncoderUNetModel(8, 3, 32, 5, 1, (2,), channel_mult=(1, 2, 3), resblock_updown=updown),
    ):
        for level, mult in enumerate((1, 2, 3)):
            for block in acceleration._blocks_by_level(model)[level]:
                assert block.channels == 32 * mult or getattr(block, "out_channels", 0) in (32 * mult, 32 * (mult + 1))
        assert sum(map(len, acceleration._blocks_by_level(model).values())) == sum(
            isinstance(m, (ResBlock, AttentionBlock)) for m in model.modules()
        )
    with pytest.raises(UserError, match="--checkpoint_levels 3"):
        checkpoint_levels(unet(), [0, 3])


# Training


def run(folder, steps, speed, resume="", precision="fp32"):
    into(folder)
    loop = make_loop(
        model=unet(channel_mult=(1,), dropout=0.1), diffusion=small_diffusion(), data=Data(classes=3), max_steps=steps,
        speed=TrainSpeedConfig(**speed), resume_checkpoint=resume and str(folder / resume), precision=precision,
    )  # fmt: skip
    loop.run_loop()


SPEEDS = [dict(compile="blocks"), dict(compile="model"), dict(memory_format="channels_last")]


@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(speed, tmp_path, quick):
    run(tmp_path / "whole", 4, speed)
    run(tmp_path / "half", 2, speed)
    run(tmp_path / "half", 4, speed, "model000002.pt")
    assert_sets_equal(tmp_path / "whole", tmp_path / "half", 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, while it compiles
@pytest.mark.parametrize("mode, precision", [("blocks", "bf16"), ("model", "fp32")])
def test_a_resumed_run_with_generated_code_is_the_same_bit_for_bit(mode, precision, tmp_path):
    speed = dict(compile=mode, memory_format="channels_last")
    run(tmp_path / "whole", 4, speed, precision=precision)
    th._dynamo.reset()
    run(tmp_path / "half", 2, speed, precision=precision)
    th._dynamo.reset()
    run(tmp_path / "half", 4, speed, "model000002.pt", precision)
    assert_sets_equal(tmp_path / "whole", tmp_path / "half", 4)


@pytest.mark.parametrize("one, other", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_a_run_continues_in_another_layout(one, other, tmp_path):
    run(tmp_path, 2, dict(memory_format=one))
    run(tmp_path, 4, dict(memory_format=other), "model000002.pt")
    assert (tmp_path / "opt000004.pt").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_a_network_compiles_under_ddp(mode, tmp_path):
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{TESTS}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [*launcher, str(TESTS / "compile_worker.py"), mode]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
