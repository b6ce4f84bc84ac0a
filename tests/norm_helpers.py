"""Group norms, and what follows them, by torch's operations, to compare kernels with."""

import torch as th
import torch.nn.functional as F

EPS = 1e-5


def draws(shape, dtype=th.float32, modulated=True, mean=1.0, device="cpu"):
    """(x, weight, bias, modulation), which ask for gradients, and a gradient of the output."""
    x = (2 * th.randn(shape, device=device) + mean).to(dtype).to(memory_format=th.channels_last)
    weight, bias = th.randn(2, shape[1], device=device).unbind()
    modulation = 0.5 * th.randn(shape[0], 2 * shape[1], device=device) if modulated else None
    given = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, modulation)]
    return given, th.randn(shape, device=device).to(dtype)


def by_torch(x, weight, bias, modulation, groups, eps, silu):
    h = F.group_norm(x, groups, weight, bias, eps)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def with_gradients(function, given, grad, *options):
    """[the output, the gradients of those inputs that are given]."""
    out = function(*given, *options)
    return [out.detach(), *th.autograd.grad(out, [t for t in given if t is not None], grad)]


def assert_exact(norm, given, grad, groups, silu, tolerances):
    """The kernel's output and gradients have their inputs' types, and are exact to rounding.

    :param tolerances: {type: share of the largest value}.
    """
    found = with_gradients(norm, given, grad, groups, EPS, silu)
    doubles = [t if t is None else t.detach().double().requires_grad_() for t in given]
    true = with_gradients(by_torch, doubles, grad.double(), groups, EPS, silu)
    assert [t.dtype for t in found] == [given[0].dtype, *(t.dtype for t in given if t is not None)]
    assert found[0].is_contiguous(memory_format=th.channels_last)
    for one, other in zip(found, true, strict=True):
        share = float((one.double() - other).abs().max() / other.abs().max())
        assert share <= tolerances[one.dtype], (tuple(given[0].shape), one.dtype, share)
