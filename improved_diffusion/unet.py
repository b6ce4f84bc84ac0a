"""The networks: a U-Net with attention and timestep (and class) conditioning, and its super-resolution form.

The names of the modules are those of published state dicts. Shapes are [N, C, H, W] (dims=2).
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from .fp16_util import convert_module_to_bf16, convert_module_to_f16, convert_module_to_f32
from .nn import (
    NULL_LABEL,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the embedding of the timesteps."""

    @abstractmethod
    def forward(self, x, emb):
        """x [N, C, ...], emb [N, E] -> [N, C', ...]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the embedding to those of its layers that take it."""

    def forward(self, x, emb):  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution if `use_conv`. With dims=3 depth keeps its size."""

    def __init__(self, channels, use_conv, dims=2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x):
        scale = (1, 2, 2) if self.dims == 3 else 2
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution if `use_conv`, else by averaging. With dims=3 depth keeps its size."""

    def __init__(self, channels, use_conv, dims=2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x):
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block conditioned on the embedding.

    :param emb_channels: E, the width of the embedding.
    :param use_conv: change the width of the skip connection by a 3x3 rather than a 1x1 convolution.
    :param use_scale_shift_norm: the embedding scales and shifts the second norm, rather than being added before it.
    """

    def __init__(
        self, channels, emb_channels, dropout, out_channels=None, use_conv=False, use_scale_shift_norm=False, dims=2,
        use_checkpoint=False,
    ):  # fmt: skip
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x, emb):
        """x [N, C, ...], emb [N, E] -> [N, out_channels, ...]."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        emb_out = emb_out.view(*emb_out.shape, *[1] * (h.ndim - emb_out.ndim))
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = th.chunk(emb_out, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, as a residual block."""

    def __init__(self, channels, num_heads=1, use_checkpoint=False):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide the {channels} channels of the attention")
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        flat = x.reshape(*x.shape[:2], -1)  # [N, C, L]
        qkv = self.qkv(self.norm(flat))  # [N, 3C, L], head by head: q, k, v
        h = self.attention(qkv.reshape(x.shape[0] * self.num_heads, -1, qkv.shape[2]))
        return (flat + self.proj_out(h.reshape(flat.shape))).reshape(x.shape)


class QKVAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v."""

    def forward(self, qkv):
        """[N * heads, 3d, L] -> [N * heads, d, L]."""
        q, k, v = (part.transpose(1, 2).contiguous()[:, None] for part in qkv.chunk(3, dim=1))  # [N * heads, 1, L, d]
        return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)

    @staticmethod
    def count_flops(model, _x, y):
        """Add the multiplications and additions of a call to `model.total_ops`: a hook for the thop profiler.

        :param y: the output [N * heads, d, L], in a tuple.
        """
        batch, channels, *positions = y[0].shape
        products = 2  # q k^T, and the weights times v: L^2 d multiply-adds each
        operations = products * batch * channels * math.prod(positions) ** 2
        model.total_ops += th.DoubleTensor([operations])


class Torso(nn.Module):
    """A network whose blocks, without the embeddings and the last layers, can compute in 16 bits."""

    input_blocks: nn.ModuleList

    def _convert_torso(self, convert) -> None:
        for name in ("input_blocks", "middle_block", "output_blocks"):
            if hasattr(self, name):
                getattr(self, name).apply(convert)

    def convert_to_fp16(self) -> None:
        """Convert the torso's convolutions to float16."""
        self._convert_torso(convert_module_to_f16)

    def convert_to_bf16(self) -> None:
        """Convert the torso's convolutions to bfloat16."""
        self._convert_torso(convert_module_to_bf16)

    def convert_to_fp32(self) -> None:
        """Convert the torso's convolutions back to float32."""
        self._convert_torso(convert_module_to_f32)

    @property
    def inner_dtype(self) -> th.dtype:
        """The data type that the torso computes in."""
        return next(self.input_blocks.parameters()).dtype


def time_embedding(model_channels: int) -> nn.Sequential:
    """The layers from the timesteps' sinusoids [N, model_channels] to the embedding [N, 4 * model_channels]."""
    width = model_channels * 4
    return nn.Sequential(linear(model_channels, width), SiLU(), linear(width, width))


def down_blocks(
    res_block, attention, in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult,
    conv_resample=True, dims=2,
):  # fmt: skip
    """(the downsampling blocks as a ModuleList, the output channels of each).

    :param res_block: (channels, out_channels=...) -> a residual block.
    :param attention: channels -> an attention block.
    """
    ch = int(channel_mult[0] * model_channels)
    blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))])
    widths = [ch]
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            layers: list[nn.Module] = [res_block(ch, out_channels=int(mult * model_channels))]
            ch = int(mult * model_channels)
            if 2**level in attention_resolutions:
                layers.append(attention(ch))
            blocks.append(TimestepEmbedSequential(*layers))
            widths.append(ch)
        if level != len(channel_mult) - 1:
            blocks.append(TimestepEmbedSequential(Downsample(ch, conv_resample, dims=dims)))
            widths.append(ch)
    return blocks, widths


class UNetModel(Torso):
    """The U-Net of DDPM and IDDPM.

    :param in_channels, out_channels: of the images; with a learned variance out_channels is twice in_channels.
    :param model_channels: width of the first level.
    :param attention_resolutions: downsampling factors of the levels that have attention.
    :param channel_mult: width of each level, in units of model_channels.
    :param conv_resample: resample by convolutions instead of pooling.
    :param num_classes: make the model class-conditional; the label NULL_LABEL stands for a hidden class.
    :param num_heads_upsample: attention heads of the output blocks; -1: as num_heads.
    """

    def __init__(
        self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None, use_checkpoint=False, num_heads=1,
        num_heads_upsample=-1, use_scale_shift_norm=False,
    ):  # fmt: skip
        super().__init__()
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_heads_upsample = num_heads_upsample

        time_embed_dim = model_channels * 4
        self.time_embed = time_embedding(model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)

        res_block = functools.partial(
            ResBlock, emb_channels=time_embed_dim, dropout=dropout, dims=dims, use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )  # fmt: skip
        attention = functools.partial(AttentionBlock, use_checkpoint=use_checkpoint)

        self.input_blocks, skip_channels = down_blocks(
            res_block, functools.partial(attention, num_heads=num_heads), in_channels, model_channels, num_res_blocks,
            attention_resolutions, channel_mult, conv_resample, dims,
        )  # fmt: skip
        ch = skip_channels[-1]
        self.middle_block = TimestepEmbedSequential(res_block(ch), attention(ch, num_heads=num_heads), res_block(ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [res_block(ch + skip_channels.pop(), out_channels=int(mult * model_channels))]
                ch = int(mult * model_channels)
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads=num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(Upsample(ch, conv_resample, dims=dims))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(normalization(ch), SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1)))

    def _embed(self, x, timesteps, y):
        """The embedding [N, E] of timesteps and classes."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("labels y must be given if and only if the model is class-conditional")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            if y.shape != (x.shape[0],):
                raise ValueError(f"labels y {tuple(y.shape)} must have one entry for each of the {x.shape[0]} images")
            # A hidden class adds nothing, so it needs no row of the embedding.
            shown = y != NULL_LABEL
            emb = emb + self.label_emb(th.where(shown, y, 0)) * shown[:, None]
        return emb

    def _torso(self, x, timesteps, y):
        """Yield (part, activation) of the blocks, in order; part is "down", "middle" or "up"."""
        emb = self._embed(x, timesteps, y)
        skips = []
        h = x.type(self.inner_dtype)
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
            yield "down", h
        h = self.middle_block(h, emb)
        yield "middle", h
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), emb)
            yield "up", h

    def forward(self, x, timesteps, y=None):
        """The network's output [N, out_channels, ...] for x [N, in_channels, ...], timesteps [N] and labels y [N]."""
        for _, h in self._torso(x, timesteps, y):  # noqa: B007 - only the last one is used
            pass
        return self.out(h.type(x.dtype))

    def get_feature_vectors(self, x, timesteps, y=None):
        """The blocks' activations: dict of `down` (list), `middle` and `up` (list), in x's type."""
        result: dict[str, Any] = {"down": [], "up": []}
        for part, h in self._torso(x, timesteps, y):
            if part == "middle":
                result[part] = h.type(x.dtype)
            else:
                result[part].append(h.type(x.dtype))
        return result


class SuperResModel(UNetModel):
    """A UNetModel that also takes a low-resolution image: `low_res` [N, C, h, w], upsampled bilinearly."""

    def __init__(self, in_channels, *args, **kwargs):
        super().__init__(in_channels * 2, *args, **kwargs)

    def _with_low_res(self, x, low_res):
        if low_res is None:
            raise ValueError("a super-resolution model needs low_res")
        return th.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)

    def forward(self, x, timesteps, low_res=None, **kwargs):  # type: ignore[override]
        return super().forward(self._with_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(self, x, timesteps, low_res=None, **kwargs):  # type: ignore[override]
        return super().get_feature_vectors(self._with_low_res(x, low_res), timesteps, **kwargs)
