"""Layers and small functions that the networks are built from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .fused_norm import fits, fused_norm

NORM_EPS = 1e-5  # what the norms add to the variance
NULL_LABEL = -1  # the class of an image whose class is hidden
MOST_KEPT = 1024  # positions whose attention weights, a matrix of positions by positions, may be kept on a CPU

Module = TypeVar("Module", bound=nn.Module)
_METHODS: dict[type[nn.Module], tuple[tuple[str, Callable], ...]] = {}


def published(kind: type[Module]) -> type[Module]:
    """Remember a class's methods: code that extends it may replace them in the class, which `is_untouched` sees."""
    _METHODS[kind] = tuple((name, getattr(kind, name)) for name in ("forward", "_forward") if hasattr(kind, name))
    return kind


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this kind, and nobody's hook, compiler or replaced forward needs its call."""
    if type(module) is not kind or module._compiled_call_impl is not None:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    own = module.__dict__
    return all(name not in own and getattr(kind, name) is method for name, method in _METHODS[kind])


for _kind in (nn.Linear, nn.Conv1d, nn.Sequential):
    published(_kind)


@published
class SiLU(nn.SiLU):
    """x * sigmoid(x)."""

    def forward(self, x):  # type: ignore[override]  # the argument's published name
        return super().forward(x)


@published
class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32, whatever the input's type.

    `in_16_bits`: on a GPU, where our own kernel does not run, 16-bit inputs are not copied to float32: sums are in
    float32, but the mean and the deviation of each group, and the weights, are rounded to 16 bits.
    """

    in_16_bits = False

    def forward(self, x):
        if self.affine and fits(x):
            return fused_norm(x, self)
        if x.dtype == th.float64:
            return super().forward(x.float()).double()
        if x.device.type == "cpu":  # its kernel takes 16 bits beside float32 weights, and computes in float32
            return super().forward(x)
        if th.compiler.is_compiling():  # the compiler fuses the casts
            return super().forward(x.float()).type(x.dtype)
        if self.in_16_bits:
            return F.group_norm(x, self.num_groups, self.weight.type(x.dtype), self.bias.type(x.dtype), self.eps)
        return super().forward(x.float()).type(x.dtype)


def fuses(x: th.Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether the first two layers are a norm and SiLU that one kernel computes for x: see `fused_norm`."""
    if len(layers) < 2 or not fits(x):
        return False
    norm, silu = layers[:2]
    return is_untouched(norm, GroupNorm32) and bool(norm.affine) and is_untouched(silu, SiLU)


class NormedLayers(nn.Sequential):
    """A norm, SiLU and further layers."""

    def forward(self, x):  # type: ignore[override]
        layers = list(self)
        if fuses(x, layers):
            norm, _, *layers = layers
            x = fused_norm(x, norm, silu=True)
        for layer in layers:
            x = layer(x)
        return x


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over 1, 2 or 3 dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def linear(*args, **kwargs) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """An average pool over 1, 2 or 3 dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def update_ema(target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99) -> None:
    """Move each target towards its source in place: target <- rate * target + (1 - rate) * source."""
    for target, source in zip(target_params, source_params):
        target.detach().mul_(rate).add_(source, alpha=1 - rate)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the module's parameters and return it: a residual branch that starts as the identity."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply the module's parameters by `scale` and return it."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def attend(q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [..., L, d]."""
    on_cpu_in_16_bits = q.device.type == "cpu" and q.dtype in (th.bfloat16, th.float16)
    if on_cpu_in_16_bits and q.requires_grad and q.shape[-2] <= MOST_KEPT:
        # The backward pass of torch's own is up to ten times slower than two products there.
        weights = th.softmax(q @ (k * q.shape[-1] ** -0.5).transpose(-2, -1), dim=-1)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


def mean_flat(tensor: th.Tensor) -> th.Tensor:
    """The mean over all dimensions but the first: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def normalization(channels: int) -> nn.Module:
    """The networks' norm: 32 groups in float32."""
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000, freq_shift: float = 0) -> th.Tensor:
    """Sinusoids of the timesteps: [N], fractional ones too -> [N, dim], cosines first; an odd dim ends in a zero.

    :param freq_shift: 0: the frequencies end one step before 1/max_period; 1: at it, as in DDPM's code.
    """
    half = dim // 2
    numbers = th.arange(half, dtype=th.float32, device=timesteps.device)
    frequencies = th.exp(-math.log(max_period) * numbers / (half - freq_shift))
    angles = timesteps[:, None].float() * frequencies[None]  # [N, half]
    embedding = th.cat([th.cos(angles), th.sin(angles)], dim=-1)
    if dim % 2:
        embedding = th.cat([embedding, th.zeros_like(embedding[:, :1])], dim=-1)
    return embedding


def checkpoint(func: Callable, inputs: tuple, params: Iterable, flag: bool):
    """func(*inputs); with `flag` its activations are recomputed in the backward pass instead of kept.

    `params` is ignored: torch finds the parameters by itself. It is an argument of the published function.
    """
    if not flag:
        return func(*inputs)
    return torch_checkpoint(func, *inputs, use_reentrant=False)
