"""Group norms in one kernel: in triton's interpreter, against torch in float64; where they run, and where they do not.

`gpu_speed.py norms`, which test_gpu.py runs, compares on a GPU.
"""

import subprocess
import sys

import pytest
import torch as th
from helpers import TESTS, set_golden_weights
from norm_helpers import assert_exact, draws, with_gradients
from script_helpers import environment
from torch import nn as torch_nn

from improved_diffusion import fused_norm, nn, unet
from improved_diffusion.config import SpeedConfig
from improved_diffusion.models import acceleration

TOLERANCES = {th.float32: 2e-6, th.bfloat16: 1e-2, th.float16: 1e-3}  # shares of the largest value
# (N, C, H, W), groups: 1, 3, 4 and 12 channels in a group, and numbers of groups that the blocks do not divide
SHAPES = [((1, 32, 3, 3), 32), ((2, 24, 5, 7), 8), ((2, 128, 9, 7), 32), ((2, 48, 3, 5), 4), ((2, 9, 4, 4), 3)]


@pytest.fixture
def kernels():
    """The module of the kernels."""
    pytest.importorskip("triton")
    from improved_diffusion import norm_kernels

    return norm_kernels


@pytest.fixture
def everywhere(kernels, monkeypatch):
    """The kernels run on CPUs too. What they are called with is in the list."""
    calls, norm = [], kernels.norm

    def counted(*args):
        calls.append(args)
        return norm(*args)

    monkeypatch.setattr(fused_norm, "obstacle", lambda device: "")
    monkeypatch.setattr(kernels, "norm", counted)
    monkeypatch.setattr(kernels, "WIDTH", 1024)  # one program for each image: the interpreter takes 20 ms for each
    return calls


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_outputs_and_gradients_are_exact(dtype, silu, modulated, kernels):
    given, grad = draws((2, 24, 5, 7), dtype, modulated)
    assert_exact(kernels.norm, given, grad, 8, silu, TOLERANCES)


def test_scales_and_shifts_of_several_layers_may_lie_side_by_side(kernels):
    (x, weight, bias, modulation), grad = draws((2, 24, 5, 7))
    expected = with_gradients(kernels.norm, (x, weight, bias, modulation), grad, 8, 1e-5, True)
    wide = th.cat([th.full((2, 3), th.nan), modulation.detach(), th.full((2, 5), th.nan)], dim=1).requires_grad_()
    part = wide.split([3, 48, 5], dim=1)[1]
    assert not part.is_contiguous()
    found = with_gradients(kernels.norm, (x, weight, bias, part), grad, 8, 1e-5, True)
    assert all(map(th.equal, found, expected))


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_groups_of_any_size(shape, groups, kernels):
    assert_exact(kernels.norm, *draws(shape), groups, True, TOLERANCES)
    assert_exact(kernels.norm, *draws(shape, th.bfloat16, False), groups, False, TOLERANCES)


@pytest.mark.parametrize("shape, groups", [((2, 24, 11, 13), 8), ((1, 32, 16, 16), 2)], ids=str)
def test_large_images_are_summed_in_parts(shape, groups, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "PART", 1024)
    monkeypatch.setattr(kernels, "TILE", 512)
    assert kernels._Plan(th.empty(shape), groups).parts > 2
    assert_exact(kernels.norm, *draws(shape), groups, True, TOLERANCES)
    assert_exact(kernels.norm, *draws(shape, th.float16, False), groups, False, TOLERANCES)


def test_a_mean_far_from_zero_costs_no_digits(kernels, monkeypatch):
    for part in (kernels.PART, 1024):
        monkeypatch.setattr(kernels, "PART", part)
        given, grad = draws((1, 24, 16, 16), mean=5000.0)
        assert_exact(kernels.norm, given, grad, 8, False, {th.float32: 1e-3})  # x itself is rounded to 1e-7 of 5000


def test_an_image_has_the_same_bits_in_any_batch(kernels):
    given, grad = draws((3, 24, 5, 7))
    batch = with_gradients(kernels.norm, given, grad, 8, 1e-5, True)
    x, weight, bias, modulation = given
    few = [x[1:2].detach().requires_grad_(), weight, bias, modulation[1:2]]
    single = with_gradients(kernels.norm, few, grad[1:2], 8, 1e-5, True)
    assert th.equal(batch[0][1:2], single[0]) and th.equal(batch[1][1:2], single[1])


def test_gradients_of_the_images_alone(kernels):
    given, grad = draws((2, 24, 3, 5), modulated=False)
    all_of_them = with_gradients(kernels.norm, given, grad.contiguous(), 8, 1e-5, True)
    x, weight, bias = given[0], given[1].detach(), given[2].detach()
    out = kernels.norm(x, weight, bias, None, 8, 1e-5, True)
    (of_x,) = th.autograd.grad(out, x, grad.requires_grad_(), create_graph=True)
    assert th.equal(of_x, all_of_them[1])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_x.sum().backward()


# Where the kernels run


def unet_of(**kwargs):
    arguments = dict(channel_mult=(1, 2), num_heads=2, num_classes=3) | kwargs
    return set_golden_weights(unet.UNetModel(3, 32, 6, 1, (2,), **arguments)).to(memory_format=th.channels_last)


def classifier(**kwargs):
    model = unet.EncoderUNetModel(8, 3, 32, 5, 1, (2,), channel_mult=(1, 2), num_heads=2, **kwargs)
    return set_golden_weights(model).to(memory_format=th.channels_last)


def run(model):
    """[the output, the gradients of the images and the parameters]."""
    x = th.randn(1, 3, 8, 8, generator=th.Generator().manual_seed(0)).to(memory_format=th.channels_last)
    y = {"y": th.tensor([2])} if hasattr(model, "label_emb") else {}
    x.requires_grad_()
    out = model(x, th.tensor([700]), **y)
    grad = th.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *th.autograd.grad(out, [x, *model.parameters()], grad)]


MODELS = {
    "plain": unet_of,
    "scale and shift": lambda: unet_of(use_scale_shift_norm=True),
    "resampling blocks": lambda: unet_of(use_scale_shift_norm=True, resblock_updown=True),
    "classifier": lambda: classifier(use_scale_shift_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_have_the_same_outputs_and_gradients(name, kernels, request):
    model = MODELS[name]()
    plain = run(model)
    calls = request.getfixturevalue("everywhere")
    fused = run(model)
    for one, other in zip(fused, plain, strict=True):
        th.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm32)]
    attentions = [module for module in model.modules() if isinstance(module, unet.AttentionBlock)]
    assert len(calls) == len(norms)
    assert sum(silu for *_, silu in calls) == len(norms) - len(attentions)


def test_a_network_in_16_bits_rounds_no_more_with_them(kernels, request):
    model = unet_of(use_scale_shift_norm=True)
    true = run(model)[0]
    model.convert_to_bf16()
    plain = (run(model)[0] - true).square().mean()
    request.getfixturevalue("everywhere")
    assert 0 < (run(model)[0] - true).square().mean() < 1.5 * plain


def test_they_do_not_run_elsewhere(everywhere, monkeypatch):
    norm, x = nn.normalization(64), th.randn(2, 64, 4, 4)
    last = x.to(memory_format=th.channels_last)
    norm(last)
    assert len(everywhere) == 1
    for other in (x, x.flatten(2), last.double(), last[:, :, :1, :1], last[:0]):
        norm(other)
    nn.GroupNorm32(32, 64, affine=False)(last)
    with monkeypatch.context() as patch:
        patch.setattr(th.compiler, "is_compiling", lambda: True)
        norm(last)
    monkeypatch.setattr(fused_norm, "obstacle", lambda device: "there is none")
    norm(last)
    assert len(everywhere) == 1


def test_a_cpu_has_none():
    assert fused_norm.obstacle(th.device("cpu"))
    assert not fused_norm.fits(th.randn(2, 64, 4, 4).to(memory_format=th.channels_last))


# The trial that decides whether they run on a GPU


@pytest.fixture
def trial(kernels, monkeypatch):
    """The trial on the CPU, with few programs of the interpreter: what is wrong with the kernels."""
    trials = [((2, 32, 5, 5), *others) for _, *others in fused_norm.TRIALS]
    for module, name, value in (
        (fused_norm, "TRIALS", trials), (kernels, "WIDTH", 1024), (kernels, "PART", 512), (kernels, "TILE", 256),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    assert kernels._Plan(th.empty(trials[0][0]), 32).parts > 1
    return lambda: fused_norm.fault(th.device("cpu"))


def test_the_trial_covers_all_types_whole_images_and_parts(kernels):
    assert {dtype for _, dtype, _ in fused_norm.TRIALS} == set(fused_norm.TYPES) == set(fused_norm.TOLERANCES)
    plans = [kernels._Plan(th.empty(shape, device="meta"), fused_norm.GROUPS) for shape, *_ in fused_norm.TRIALS]
    assert {plan.parts > 1 for plan in plans} == {False, True}
    assert all(plan.grid[0] > len(shape) for plan, (shape, *_) in zip(plans, fused_norm.TRIALS))


def test_right_kernels_pass_the_trial(trial):
    assert trial() == ""


def spoil(monkeypatch, function, name, number, how):
    """Let `how` change one of the tensors that a method of FusedNorm returns, where there is one."""
    original = getattr(function, name)

    def spoiled(*args):
        given = original(*args)
        results = [given] if isinstance(given, th.Tensor) else list(given)
        if results[number] is not None:
            results[number] = how(results[number])
        return results[0] if isinstance(given, th.Tensor) else tuple(results)

    monkeypatch.setattr(function, name, staticmethod(spoiled))


def one_wrong(values):
    """A single number is off, as behind a wrong mask."""
    changed = values.clone()
    changed[(-1,) * values.ndim] += 0.1 * values.abs().max()
    return changed


CHANGES = {
    "one number": one_wrong,
    "all a little": lambda values: 1.05 * values,
    "NaN": lambda values: values * th.nan,
    "swapped images": lambda values: values.flip(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_outputs_are_found(change, trial, kernels, monkeypatch):
    spoil(monkeypatch, kernels.FusedNorm, "forward", 0, CHANGES[change])
    assert "results" in trial()


@pytest.mark.parametrize("number", range(4), ids=["x", "weight", "bias", "modulation"])
def test_wrong_gradients_are_found(number, trial, kernels, monkeypatch):
    spoil(monkeypatch, kernels.FusedNorm, "backward", number, one_wrong)
    assert "results" in trial()


@pytest.mark.parametrize("name, wrong", [("_joined_moments", lambda both: (both[0], 2 * both[1])),
                                         ("_joined_sums", lambda sums: 2 * sums)])  # fmt: skip
def test_parts_that_are_joined_wrongly_are_found(name, wrong, trial, kernels, monkeypatch):
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args: wrong(right(*args)))
    assert "results" in trial()


def test_kernels_that_fail_are_no_error(trial, kernels, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels.FusedNorm, "backward", staticmethod(fail))
    assert "no such instruction" in trial()


def test_the_trial_neither_sees_nor_changes_the_callers_state(trial, monkeypatch):
    monkeypatch.setattr(fused_norm, "TRIALS", fused_norm.TRIALS[1:2])
    states = th.random.get_rng_state()
    with th.inference_mode(), th.device("meta"):
        assert trial() == ""
    block = lambda x: (trial(), x.exp())[1]  # noqa: E731
    x = th.zeros(2, requires_grad=True)
    th.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert th.equal(x.grad, th.ones(2)) and th.equal(th.random.get_rng_state(), states)


class Zero(nn.SiLU):
    def forward(self, x):
        return 0 * super().forward(x)


class ZeroNorm(nn.GroupNorm32):
    def forward(self, x):
        return 0 * super().forward(x)


def change(layers, number, how, monkeypatch):
    """Let the layer give zeros, in one of the ways in which published code is extended."""
    layer = layers[number]
    kind = type(layer)
    if how == "hook":
        layer.register_forward_hook(lambda module, args, out: 0 * out)
    elif how == "module":
        layers[number] = Zero() if number else ZeroNorm(layer.num_groups, layer.num_channels)
    elif how == "instance":
        layer.forward = lambda x: 0 * kind.forward(layer, x)
    else:
        published = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: 0 * published(self, x))


@pytest.mark.parametrize("how", ["hook", "module", "instance", "class"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["in_layers", "out_layers"])
def test_layers_that_somebody_changed_are_called(name, number, how, everywhere, monkeypatch):
    block = set_golden_weights(unet.ResBlock(32, 32, 0.0, use_scale_shift_norm=True))
    layers, seen = getattr(block, name), []
    change(layers, number, how, monkeypatch)
    layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with th.no_grad():
        block(th.randn(1, 32, 4, 4).to(memory_format=th.channels_last), th.randn(1, 32))
    # What follows a norm in out_layers shifts its zeros.
    assert th.equal(seen[0].amin(dim=(2, 3)), seen[0].amax(dim=(2, 3)))
    assert not seen[0].any() or (name, number) == ("out_layers", 0)


def test_layers_of_somebody_else_are_called(everywhere):
    block = set_golden_weights(unet.ResBlock(32, 32, 0.0, use_scale_shift_norm=True))
    block.out_layers = torch_nn.Sequential(nn.normalization(32), torch_nn.ReLU(), torch_nn.Conv2d(32, 32, 1))
    x, emb = th.randn(2, 32, 4, 4).to(memory_format=th.channels_last), th.randn(2, 32)
    found = block(x, emb)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    norm, *rest = block.out_layers
    expected = x + torch_nn.Sequential(*rest)(norm(block.in_layers(x)) * (1 + scale) + shift)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gpu_without_them_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr(acceleration, "device_of", lambda model: th.device("cuda", 7))
    monkeypatch.setattr(fused_norm, "obstacle", lambda device: "the package triton is not installed")
    monkeypatch.setattr(acceleration.logger, "log", lambda *args: said.append(args))
    for _ in range(2):
        acceleration.accelerate(torch_nn.Conv2d(1, 1, 1), SpeedConfig(memory_format="channels_last"))
    assert len(said) == 1 and "triton" in said[0][0]


def test_the_kernels_compile_for_gpus(kernels, tmp_path):
    env = environment(TRITON_CACHE_DIR=str(tmp_path))
    env["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    del env["TRITON_INTERPRET"]
    done = subprocess.run([sys.executable, str(TESTS / "compile_norms.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
