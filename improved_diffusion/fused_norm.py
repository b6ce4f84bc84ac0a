"""Where group norms, and what follows them in the networks, run as one kernel instead of as torch's operations."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from .config import one_line

TYPES = (th.float32, th.bfloat16, th.float16)
GROUPS = 32
# What the kernels are tried with: (N, C, H, W), type, with modulation and SiLU or without. The first images have two
# parts each.
TRIALS = (
    ((2, 128, 33, 33), th.bfloat16, True),
    ((2, 96, 9, 7), th.float32, True),
    ((2, 96, 9, 7), th.float16, False),
)
TOLERANCES = {th.float32: 1e-4, th.bfloat16: 1e-2, th.float16: 2e-3}  # shares of the largest value


def is_channels_last(x: th.Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as [N, H, W, C], and in that order only."""
    return x.ndim == 4 and x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()


@functools.cache
def obstacle(device: th.device) -> str:
    """Why there are no kernels for a device; empty where they run. The first call tries them, which takes seconds."""
    if device.type != "cuda" or th.version.cuda is None:
        return "it is no NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return fault(device)


def fault(device: th.device) -> str:
    """What is wrong with the kernels on a device, where they are compared with torch's operations; empty: nothing."""
    # The caller's thread may be in inference mode, in a checkpointed block, in a mode that sees all operations.
    with ThreadPoolExecutor(1) as thread:
        try:
            exact = thread.submit(lambda: all(_is_exact(device, *trial) for trial in TRIALS)).result()
        except Exception as error:  # triton needs a C compiler, Python's headers, a GPU that it knows
            return f"triton fails: {one_line(str(error)) or type(error).__name__}"
    return "" if exact else "the results of triton's kernels are wrong"


def _is_exact(device: th.device, shape: tuple[int, ...], dtype: th.dtype, modulated: bool) -> bool:
    """Whether the output of fused_norm and its gradients are those of torch in float32, to rounding."""
    generator = th.Generator().manual_seed(0)  # the global ones stay as they are

    def draw(*size: int) -> th.Tensor:
        return th.randn(size, generator=generator, dtype=th.float32, device="cpu").to(device)

    images, channels = shape[:2]
    x, grad = (draw(*shape).to(dtype).to(memory_format=th.channels_last) for _ in range(2))
    norm = nn.GroupNorm(GROUPS, channels, dtype=th.float32, device=device)
    norm.weight.data, norm.bias.data = draw(channels), draw(channels)
    modulation = draw(images, 2 * channels) if modulated else None
    found = _with_gradients(fused_norm, x, norm, modulation, grad)
    true = _with_gradients(_by_torch, x.float().contiguous(), norm, modulation, grad.float())
    shares = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, true, strict=True)]
    return all(float(share) <= TOLERANCES[one.dtype] for share, one in zip(shares, found, strict=True))  # NaN is not


def _with_gradients(
    function: Callable[..., th.Tensor], x: th.Tensor, norm: nn.GroupNorm, modulation: th.Tensor | None, grad: th.Tensor
) -> list[th.Tensor]:
    """[the output, the gradients of x, weight, bias and modulation], for a function with fused_norm's arguments."""
    leaves = [t.detach().requires_grad_() for t in (x, modulation) if t is not None]
    out = function(leaves[0], norm, modulation is not None, *leaves[1:])
    return [out.detach(), *th.autograd.grad(out, [*leaves, norm.weight, norm.bias], grad)]


def _by_torch(x: th.Tensor, norm: nn.GroupNorm, silu: bool, modulation: th.Tensor | None = None) -> th.Tensor:
    """`fused_norm` by torch's operations."""
    h = norm(x)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def fits(x: th.Tensor) -> bool:
    """Whether there is a kernel for a group norm of x. A compiler fuses torch's operations by itself."""
    return not th.compiler.is_compiling() and is_channels_last(x) and x.dtype in TYPES and not obstacle(x.device)


def fused_norm(x: th.Tensor, norm: Any, silu: bool = False, modulation: th.Tensor | None = None) -> th.Tensor:
    """norm(x) of a group norm in one kernel, computed in float32, for an x that `fits`.

    :param modulation: scale and shift of each image and channel, [N, 2C]: the result is times 1 + scale, plus shift.
    :param silu: SiLU comes last.
    """
    from . import norm_kernels

    return norm_kernels.norm(x, norm.weight, norm.bias, modulation, norm.num_groups, norm.eps, silu)
