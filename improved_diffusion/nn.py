"""Layers and small functions that the networks are built from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

NORM_EPS = 1e-5  # what the norms add to the variance
NULL_LABEL = -1  # the class of an image whose class is hidden
MOST_KEPT = 1024  # positions whose attention weights, a matrix of positions by positions, may be kept on a CPU


class SiLU(nn.SiLU):
    """x * sigmoid(x)."""

    def forward(self, x):  # type: ignore[override]  # the argument's published name
        return super().forward(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32, whatever the input's type.

    `in_16_bits`: on a GPU, 16-bit inputs are not copied to float32: sums are in float32, but the mean and the deviation
    of each group, and the weights, are rounded to 16 bits.
    """

    in_16_bits = False

    def forward(self, x):
        if x.dtype == th.float64:
            return super().forward(x.float()).double()
        if x.device.type == "cpu":  # its kernel takes 16 bits beside float32 weights, and computes in float32
            return super().forward(x)
        if th.compiler.is_compiling():  # the compiler fuses the casts
            return super().forward(x.float()).type(x.dtype)
        if is_channels_last(x):
            return ChannelsLastNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        if self.in_16_bits:
            return F.group_norm(x, self.num_groups, self.weight.type(x.dtype), self.bias.type(x.dtype), self.eps)
        return super().forward(x.float()).type(x.dtype)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this kind, and nobody's hook or replaced forward needs its call."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


def is_channels_last(x: th.Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as [N, H, W, C], and in that order only."""
    return x.ndim == 4 and x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()


class ChannelsLastNorm(th.autograd.Function):
    """Group normalisation of x [N, C, H, W] in channels-last layout: reads x as it lies, and computes in float32.

    torch's own for GPUs copies x to the other layout and back.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        grouped = _grouped(x, groups)
        mean, variance = _moments(grouped)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, mean, rstd, weight)
        scale = rstd * weight.view(groups, -1)  # [N, 1, G, D]
        return _ungrouped(_fused(bias.view(groups, -1) - mean * scale, grouped, scale), x)

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        scale = weight.view(mean.shape[2], -1)  # [G, D]
        grouped = _grouped(x, mean.shape[2])
        grad = _grouped(grad.contiguous(memory_format=th.channels_last), mean.shape[2])
        normed = _fused(-mean * rstd, grouped, rstd)
        of_bias = grad.sum(dim=1, keepdim=True, dtype=th.float32)  # [N, 1, G, D]
        of_weight = (grad * normed).sum(dim=1, keepdim=True, dtype=th.float32)
        count = grouped.shape[1] * grouped.shape[3]
        level, slope = ((part * scale).sum(dim=3, keepdim=True) * (-rstd / count) for part in (of_bias, of_weight))
        grad_x = _fused(_fused(level, normed, slope), grad, rstd * scale)
        return _ungrouped(grad_x, x), of_weight.sum(dim=0).flatten(), of_bias.sum(dim=0).flatten(), None, None


def _grouped(x: th.Tensor, groups: int) -> th.Tensor:
    """[N, C, H, W] in channels-last layout as a view [N, H * W, G, D]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (groups, -1))


def _ungrouped(grouped: th.Tensor, x: th.Tensor) -> th.Tensor:
    """The inverse of `_grouped`, in the shape of x."""
    return grouped.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


def _moments(grouped: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """(mean, variance) of each group of [N, L, G, D], float32 [N, 1, G, 1], without a copy of it in float32."""
    if grouped.dtype == th.float32:
        variance, mean = th.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        return mean, variance
    mean = grouped.mean(dim=(1, 3), keepdim=True, dtype=th.float32)
    norm = th.linalg.vector_norm(grouped, dim=(1, 3), keepdim=True, dtype=th.float32)
    return mean, (norm.square() / (grouped.shape[1] * grouped.shape[3]) - mean.square()).clamp_(min=0)


def _fused(shift: th.Tensor, x: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """shift + x * scale, computed in float32 where shift and scale have it, in x's type and layout."""
    return th.addcmul(shift, x, scale, out=th.empty_like(x))


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
