"""Group normalisation of channels-last images in one kernel of triton, with what follows it in the networks.

    y = silu(normed(x) * (1 + scale) + shift)

Scale and shift come from the embedding of the timesteps, one for each image and channel; they and SiLU can be left out.
x is read as it lies and computed with in float32; what is written has x's type. Images are computed independently of
each other, with sums in an order that their size alone decides, so that every run gives the same bits.

A program of the kernels has some groups of one image. Where an image is large, a first kernel sums parts of it, and the
second one has a program for each part. Importing this module needs the package triton.
"""

from __future__ import annotations

from typing import Any

import torch as th
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

PART = 32768  # numbers that one program goes through
TILE = 2048  # numbers that it holds at a time
WIDTH = 32  # channels side by side that fill the sectors of the memory
MOST_PARTS = 128  # of an image
WARPS = 8


@triton.jit
def _place(GROUPS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr):
    """This program's (image, groups [SIDE], channels [1, SIDE, PADDED], which groups exist, which channels exist)."""
    blocks: tl.constexpr = (GROUPS + SIDE - 1) // SIDE
    image = (tl.program_id(0) // blocks).to(tl.int64)
    groups = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    inside = tl.arange(0, PADDED)[None, None, :]
    channels = groups[None, :, None] * SIZE + inside
    return image, groups, channels, groups < GROUPS, (groups[None, :, None] < GROUPS) & (inside < SIZE)


@triton.jit
def _positions(first, LENGTH: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr):
    """(positions [ROWS, 1, 1] of this program's tile at `first` of its part, which of them exist)."""
    positions = tl.program_id(1) * LONG + first + tl.arange(0, ROWS)[:, None, None]
    return positions, positions < LENGTH


@triton.jit
def _over_group(values):
    """The sums [SIDE] of [ROWS, SIDE, PADDED]."""
    return tl.sum(tl.sum(values, axis=0), axis=1)


@triton.jit
def _moments(
    x, image, channels, real, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr,
    PADDED: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared distances from it) [SIDE] of the groups in this program's part of an image."""
    # Each place of the tile has those of the numbers that it has seen (Welford 1962); they are joined at the end.
    mean = tl.zeros([ROWS, SIDE, PADDED], tl.float32)
    spread = tl.zeros([ROWS, SIDE, PADDED], tl.float32)
    seen = tl.zeros([ROWS, 1, 1], tl.float32)
    for first in range(0, LONG, ROWS):
        positions, exist = _positions(first, LENGTH, LONG, ROWS)
        mask = exist & real
        value = tl.load(x + (image * LENGTH + positions) * CHANNELS + channels, mask=mask, other=0.0).to(tl.float32)
        seen += exist.to(tl.float32)
        distance = tl.where(mask, value - mean, 0.0)
        mean += distance / tl.maximum(seen, 1.0)
        spread += distance * (value - mean)
    joint = _over_group(mean * seen) / (tl.sum(tl.sum(tl.sum(seen, axis=2), axis=1), axis=0) * SIZE)
    away = tl.where(real, mean - joint[None, :, None], 0.0)
    return joint, _over_group(spread + seen * away * away)


@triton.jit
def _joined_moments(
    means, spreads, image, groups, known, LENGTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    LONG: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The same of whole images, from those of their parts [N, PARTS, GROUPS]."""
    part = tl.arange(0, ROOM)[:, None]
    mask = (part < PARTS) & known[None, :]
    where = (image * PARTS + part) * GROUPS + groups[None, :]
    mean = tl.load(means + where, mask=mask, other=0.0)
    spread = tl.load(spreads + where, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(LENGTH - part * LONG, LONG), 0).to(tl.float32) * SIZE
    joint = tl.sum(mean * count, axis=0) / (LENGTH * SIZE)
    away = tl.where(mask, mean - joint[None, :], 0.0)
    return joint, tl.sum(spread + count * away * away, axis=0)


@triton.jit
def _affine(
    weight, bias, modulation, stride, image, channels, real, CHANNELS: tl.constexpr, MODULATED: tl.constexpr
):  # fmt: skip
    """(weight, bias, 1 + scale, shift) [1, SIDE, PADDED] of the channels."""
    gain = tl.load(weight + channels, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channels, mask=real, other=0.0).to(tl.float32)
    if MODULATED:
        row = modulation + image * stride + channels
        scale = 1 + tl.load(row, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(row + CHANNELS, mask=real, other=0.0).to(tl.float32)
    else:
        scale = tl.full(gain.shape, 1.0, tl.float32)
        shift = tl.zeros(gain.shape, tl.float32)
    return gain, offset, scale, shift


@triton.jit
def part_moments(
    x, means, spreads, LENGTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr,
    PADDED: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the moments of each part of each image, [N, PARTS, GROUPS]."""
    image, groups, channels, known, real = _place(GROUPS, SIZE, SIDE, PADDED)
    mean, spread = _moments(x, image, channels, real, LENGTH, GROUPS * SIZE, SIZE, SIDE, PADDED, LONG, ROWS)
    where = (image * PARTS + tl.program_id(1)) * GROUPS + groups
    tl.store(means + where, mean, mask=known)
    tl.store(spreads + where, spread, mask=known)


@triton.jit
def normalise(
    x, weight, bias, modulation, stride, means, spreads, out, mean_out, rstd_out, eps, LENGTH: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the output of a part of an image, and once for each image its groups' mean and 1 / deviation, [N, GROUPS].

    :param stride: from a row of `modulation` to the next.
    :param means, spreads: from `part_moments`; None where images are whole.
    """
    CHANNELS: tl.constexpr = GROUPS * SIZE
    image, groups, channels, known, real = _place(GROUPS, SIZE, SIDE, PADDED)
    if PARTS == 1:
        mean, spread = _moments(x, image, channels, real, LENGTH, CHANNELS, SIZE, SIDE, PADDED, LONG, ROWS)
    else:
        mean, spread = _joined_moments(
            means, spreads, image, groups, known, LENGTH, GROUPS, SIZE, LONG, PARTS, ROOM
        )  # fmt: skip
    rstd = 1 / tl.sqrt(spread / (LENGTH * SIZE) + eps)
    once = known & (tl.program_id(1) == 0)
    tl.store(mean_out + image * GROUPS + groups, mean, mask=once)
    tl.store(rstd_out + image * GROUPS + groups, rstd, mask=once)
    gain, offset, scale, shift = _affine(weight, bias, modulation, stride, image, channels, real, CHANNELS, MODULATED)
    gain, offset = gain * scale, offset * scale + shift
    for first in range(0, LONG, ROWS):
        positions, exist = _positions(first, LENGTH, LONG, ROWS)
        where, mask = (image * LENGTH + positions) * CHANNELS + channels, exist & real
        value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
        value = (value - mean[None, :, None]) * rstd[None, :, None] * gain + offset
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normed_and_slope(x, grad, where, mask, mean, rstd, gain, offset, SILU: tl.constexpr):
    """(the normalised numbers, the gradient of what SiLU takes) of a tile; the latter is 0 outside of the mask."""
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
    normed = (value - mean[None, :, None]) * rstd[None, :, None]
    if SILU:
        value = normed * gain + offset
        gate = tl.sigmoid(value)
        slope = slope * gate * (1 + value * (1 - gate))
    return normed, slope


@triton.jit
def _sums(
    x, grad, image, channels, real, mean, rstd, gain, offset, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
    SIDE: tl.constexpr, PADDED: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums [1, SIDE, PADDED] over the positions of this program's part: of the slopes, and of normed times slope."""
    plain = tl.zeros([ROWS, SIDE, PADDED], tl.float32)
    normal = tl.zeros([ROWS, SIDE, PADDED], tl.float32)
    for first in range(0, LONG, ROWS):
        positions, exist = _positions(first, LENGTH, LONG, ROWS)
        where, mask = (image * LENGTH + positions) * CHANNELS + channels, exist & real
        normed, slope = _normed_and_slope(x, grad, where, mask, mean, rstd, gain, offset, SILU)
        plain += slope
        normal += normed * slope
    return tl.sum(plain, axis=0)[None, :, :], tl.sum(normal, axis=0)[None, :, :]


@triton.jit
def _joined_sums(sums, image, channels, real, CHANNELS: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr):
    """The sums [1, SIDE, PADDED] over all positions, from those of the parts [N, PARTS, C]."""
    part = tl.arange(0, ROOM)[:, None, None]
    where = (image * PARTS + part) * CHANNELS + channels
    return tl.sum(tl.load(sums + where, mask=(part < PARTS) & real, other=0.0), axis=0)[None, :, :]


@triton.jit
def part_sums(
    x, grad, weight, bias, modulation, stride, means, rstds, plains, normals, LENGTH: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr, PADDED: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the sums of each part of each image, [N, PARTS, C]."""
    CHANNELS: tl.constexpr = GROUPS * SIZE
    image, groups, channels, known, real = _place(GROUPS, SIZE, SIDE, PADDED)
    mean = tl.load(means + image * GROUPS + groups, mask=known, other=0.0)
    rstd = tl.load(rstds + image * GROUPS + groups, mask=known, other=0.0)
    gain, offset, scale, shift = _affine(weight, bias, modulation, stride, image, channels, real, CHANNELS, MODULATED)
    plain, normal = _sums(
        x, grad, image, channels, real, mean, rstd, gain * scale, offset * scale + shift, LENGTH, CHANNELS, SIDE,
        PADDED, LONG, ROWS, SILU,
    )  # fmt: skip
    where = (image * PARTS + tl.program_id(1)) * CHANNELS + channels
    tl.store(plains + where, plain, mask=real)
    tl.store(normals + where, normal, mask=real)


@triton.jit
def gradients(
    x, grad, weight, bias, modulation, stride, means, rstds, plains, normals, grad_x, grad_weight, grad_bias,
    grad_modulation, LENGTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SIDE: tl.constexpr,
    PADDED: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr,
    MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a part of x, and once for each image those of weight and bias, [N, C], and of scale and
    shift, [N, 2C].

    :param means, rstds: from `normalise`.
    :param plains, normals: from `part_sums`; None where images are whole.
    """
    CHANNELS: tl.constexpr = GROUPS * SIZE
    image, groups, channels, known, real = _place(GROUPS, SIZE, SIDE, PADDED)
    mean = tl.load(means + image * GROUPS + groups, mask=known, other=0.0)
    rstd = tl.load(rstds + image * GROUPS + groups, mask=known, other=0.0)
    weights, biases, scale, shift = _affine(
        weight, bias, modulation, stride, image, channels, real, CHANNELS, MODULATED
    )
    gain, offset = weights * scale, biases * scale + shift
    if PARTS == 1:
        plain, normal = _sums(
            x, grad, image, channels, real, mean, rstd, gain, offset, LENGTH, CHANNELS, SIDE, PADDED, LONG, ROWS, SILU
        )  # fmt: skip
    else:
        plain = _joined_sums(plains, image, channels, real, CHANNELS, PARTS, ROOM)
        normal = _joined_sums(normals, image, channels, real, CHANNELS, PARTS, ROOM)
    once = real & (tl.program_id(1) == 0)
    tl.store(grad_weight + image * CHANNELS + channels, normal * scale, mask=once)
    tl.store(grad_bias + image * CHANNELS + channels, plain * scale, mask=once)
    if MODULATED:
        row = grad_modulation + image * 2 * CHANNELS + channels
        of_scale = normal * weights + plain * biases
        tl.store(row, of_scale.to(grad_modulation.dtype.element_ty), mask=once)
        tl.store(row + CHANNELS, plain.to(grad_modulation.dtype.element_ty), mask=once)
    plain = (_over_group(gain * plain) / (LENGTH * SIZE))[None, :, None]
    normal = (_over_group(gain * normal) / (LENGTH * SIZE))[None, :, None]
    for first in range(0, LONG, ROWS):
        positions, exist = _positions(first, LENGTH, LONG, ROWS)
        where, mask = (image * LENGTH + positions) * CHANNELS + channels, exist & real
        normed, slope = _normed_and_slope(x, grad, where, mask, mean, rstd, gain, offset, SILU)
        value = (slope * gain - plain - normed * normal) * rstd[None, :, None]
        tl.store(grad_x + where, value.to(grad_x.dtype.element_ty), mask=mask)


class _Plan:
    """How the kernels divide x [N, C, H, W] in some groups: `grid`, and what all of them are compiled for."""

    def __init__(self, x: th.Tensor, groups: int):
        images, channels, height, width = x.shape
        length, size = height * width, channels // groups
        padded = triton.next_power_of_2(size)
        side = min(max(1, WIDTH // padded), triton.next_power_of_2(groups))
        rows = min(max(1, TILE // (side * padded)), triton.next_power_of_2(length))
        tiles = triton.cdiv(length, rows)
        of_part = max(1, PART // (rows * side * padded), triton.cdiv(tiles, MOST_PARTS))
        self.parts = triton.cdiv(tiles, of_part)
        self.grid = (images * triton.cdiv(groups, side), self.parts)
        self.constants: dict[str, Any] = {
            "LENGTH": length, "GROUPS": groups, "SIZE": size, "SIDE": side, "PADDED": padded,
            "LONG": rows * triton.cdiv(tiles, self.parts), "ROWS": rows, "PARTS": self.parts, "num_warps": WARPS,
        }  # fmt: skip
        self.room = triton.next_power_of_2(self.parts)

    def scratch(self, x: th.Tensor, columns: int) -> tuple[th.Tensor | None, th.Tensor | None]:
        """Room for two numbers of each part of each image; none where images are whole."""
        if self.parts == 1:
            return None, None
        one, other = th.empty((2, len(x), self.parts, columns), dtype=th.float32, device=x.device).unbind()
        return one, other


def _stride(modulation: th.Tensor | None) -> int:
    """From one image's scale and shift to the next one's: those of several layers may lie side by side."""
    return 0 if modulation is None else modulation.stride(0)


class FusedNorm(th.autograd.Function):
    """`norm` and its gradients, of the first order."""

    @staticmethod
    def forward(ctx, x, weight, bias, modulation, groups, eps, silu):
        plan, modulated = _Plan(x, groups), modulation is not None
        out = th.empty_like(x, memory_format=th.channels_last)
        mean, rstd = (th.empty((len(x), groups), dtype=th.float32, device=x.device) for _ in range(2))
        parts = plan.scratch(x, groups)
        if plan.parts > 1:
            part_moments[plan.grid](x, *parts, **plan.constants)
        normalise[plan.grid](
            x, weight, bias, modulation, _stride(modulation), *parts, out, mean, rstd, eps, ROOM=plan.room,
            MODULATED=modulated, SILU=silu, **plan.constants,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, modulation, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, modulation, mean, rstd = ctx.saved_tensors
        plan, kinds = _Plan(x, ctx.groups), {"MODULATED": modulation is not None, "SILU": ctx.silu}
        grad = grad.contiguous(memory_format=th.channels_last)
        grad_x = th.empty_like(x, memory_format=th.channels_last)
        of_images = th.empty((2, *x.shape[:2]), dtype=th.float32, device=x.device)  # of weight and bias
        grad_modulation = None
        if modulation is not None:
            grad_modulation = th.empty_like(modulation, memory_format=th.contiguous_format)
        given = (
            x, grad, weight, bias, modulation, _stride(modulation), mean, rstd, *plan.scratch(x, x.shape[1])
        )  # fmt: skip
        if plan.parts > 1:
            part_sums[plan.grid](*given, **kinds, **plan.constants)
        gradients[plan.grid](
            *given, grad_x, *of_images.unbind(), grad_modulation, ROOM=plan.room, **kinds, **plan.constants
        )  # fmt: skip
        grad_weight = grad_bias = None
        if any(ctx.needs_input_grad[1:3]):
            grad_weight, grad_bias = of_images.sum(dim=1).type(weight.dtype).unbind()
        return grad_x, grad_weight, grad_bias, grad_modulation, None, None, None


def norm(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, modulation: th.Tensor | None, groups: int, eps: float, silu: bool
) -> th.Tensor:
    """Group normalisation of x [N, C, H, W] in channels-last layout: float32, bfloat16 or float16, in x's type.

    :param modulation: scale and then shift of each image and channel, [N, 2C]; None: neither.
    :param silu: SiLU comes last.
    """
    if modulation is not None and modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    with th.cuda.device_of(x):  # triton runs kernels on the current one
        return FusedNorm.apply(x, weight, bias, modulation, groups, eps, silu)
