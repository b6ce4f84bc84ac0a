"""Where group norms, and what follows them in the networks, run as one kernel instead of as torch's operations."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch as th
from torch import nn

from .config import one_line

TYPES = (th.float32, th.bfloat16, th.float16)


def is_channels_last(x: th.Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as [N, H, W, C], and in that order only."""
    return x.ndim == 4 and x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()


@functools.cache
def obstacle(device: th.device) -> str:
    """Why there are no kernels for a device; empty where they run. The first call tries one, which takes seconds."""
    if device.type != "cuda" or th.version.cuda is None:
        return "it is no NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    norm = nn.GroupNorm(32, 32, device=device)
    x = th.ones(1, 32, 2, 2, dtype=th.bfloat16, device=device).to(memory_format=th.channels_last)
    try:  # triton needs a C compiler, Python's headers, a GPU that it knows
        with th.no_grad():
            fused_norm(x, norm, silu=True)
    except Exception as error:  # of whatever kind; what it says is told to the user
        return f"triton fails: {one_line(str(error)) or type(error).__name__}"
    return ""


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
