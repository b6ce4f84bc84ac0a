"""The networks: a U-Net with attention and timestep (and class) conditioning, and its super-resolution form.

The names of the modules are those of published state dicts. Shapes are [N, C, H, W] (dims=2).
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod

import torch as th
import torch.nn.functional as F
from torch import nn

from .embeddings import joined, projected
from .fp16_util import convert_module_to_bf16, convert_module_to_f16, convert_module_to_f32
from .fused_norm import fused_norm, is_channels_last
from .nn import (
    NORM_EPS,
    NULL_LABEL,
    NormedLayers,
    SiLU,
    attend,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    fuses,
    is_untouched,
    linear,
    normalization,
    published,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the embedding of the timesteps."""

    @abstractmethod
    def forward(self, x, emb):
        """x [N, C, ...], emb [N, E] -> [N, C', ...]."""


@published
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
    """Half the size by a strided 3x3 convolution if `use_conv`, else by averaging. With dims=3 depth keeps its size.

    :param padding: of the convolution, on both sides; 0: one row of zeros on the far sides alone, as in DDPM's code.
    """

    def __init__(self, channels, use_conv, dims=2, padding=1):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)
        depth = (1, 1) if dims == 3 else ()
        self.pad = (0, 1) * min(dims, 2) + depth if use_conv and not padding else ()

    def forward(self, x):
        return self.op(F.pad(x, self.pad) if self.pad else x)


@published
class ResBlock(TimestepBlock):
    """A residual block conditioned on the embedding.

    :param emb_channels: E, the width of the embedding.
    :param use_conv: change the width of the skip connection by a 3x3 rather than a 1x1 convolution.
    :param use_scale_shift_norm: the embedding scales and shifts the second norm, rather than being added before it.
    :param up, down: also resample both branches, to twice or half the size (Dhariwal & Nichol 2021, sec. 3).
    """

    def __init__(
        self, channels, emb_channels, dropout, out_channels=None, use_conv=False, use_scale_shift_norm=False, dims=2,
        use_checkpoint=False, up=False, down=False,
    ):  # fmt: skip
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        if self.updown:
            self.resample = Upsample(channels, False, dims) if up else Downsample(channels, False, dims)
        self.in_layers = NormedLayers(
            normalization(channels), SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels)
        )
        self.out_layers = NormedLayers(
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
        """x [N, C, ...], emb [N, E], or what `joined` makes of it -> [N, out_channels, ...]."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        if self.updown:
            h = self.in_layers[-1](self.resample(self.in_layers[:-1](x)))
            x = self.resample(x)
        else:
            h = self.in_layers(x)
        emb_out = projected(self.emb_layers, emb)
        if self.use_scale_shift_norm:
            h = self._modulated(h, emb_out)
        else:
            h = self.out_layers(h + _at_all_positions(emb_out, h))
        return self.skip_connection(x) + h

    def _modulated(self, h, emb_out):
        """`out_layers` of h, where scale and shift [N, 2C, ...] follow the norm."""
        norm, *rest = self.out_layers
        if fuses(h, [norm, *rest]) and emb_out.shape == (h.shape[0], 2 * h.shape[1]):
            h = fused_norm(h, norm, silu=True, modulation=emb_out)
            rest = rest[1:]
        else:
            scale, shift = th.chunk(_at_all_positions(emb_out, h), 2, dim=1)
            h = th.addcmul(shift, norm(h), 1 + scale)
        for layer in rest:
            h = layer(h)
        return h


def _at_all_positions(emb_out, h):
    """An embedding [N, C] as [N, C, 1, ...], in h's type."""
    return emb_out.type(h.dtype).view(*emb_out.shape, *[1] * (h.ndim - emb_out.ndim))


def count_heads(channels, num_heads=1, num_head_channels=-1):
    """The heads of an attention: as many as have `num_head_channels` channels each, or `num_heads` where that is -1.

    Raises ValueError unless the heads divide the channels evenly.
    """
    by_channels = num_head_channels != -1
    if channels % (num_head_channels if by_channels else num_heads):
        given = f"num_head_channels {num_head_channels}" if by_channels else f"num_heads {num_heads}"
        raise ValueError(f"{given} must divide the {channels} channels of the attention")
    return channels // num_head_channels if by_channels else num_heads


class AttentionBlock(nn.Module):
    """Self-attention over all positions, as a residual block.

    :param num_head_channels: the channels of a head, instead of the number of heads; -1: `num_heads`.
    :param use_new_attention_order: the channels of `qkv` are q of all heads, k of all, v of all, rather than q, k, v of
        the first head, of the second, and so on.
    """

    def __init__(
        self, channels, num_heads=1, use_checkpoint=False, num_head_channels=-1, use_new_attention_order=False
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        if (is_channels_last(x) or x.device.type != "cpu") and self._is_untouched():
            return self._attend(x)
        flat = x.reshape(*x.shape[:2], -1)  # [N, C, L]
        qkv = self.qkv(self.norm(flat))  # [N, 3C, L]
        if self.use_new_attention_order:
            qkv = head_by_head(qkv, self.num_heads)
        h = self.attention(qkv.reshape(x.shape[0] * self.num_heads, -1, qkv.shape[2]))
        return (flat + self.proj_out(h.reshape(flat.shape))).reshape(x.shape)

    def _is_untouched(self):
        """Whether nobody has replaced what `_attend` computes without calling it."""
        return (
            is_untouched(self.attention, QKVAttention)
            and is_untouched(self.qkv, nn.Conv1d)
            and is_untouched(self.proj_out, nn.Conv1d)
        )

    def _attend(self, x):
        """The same on positions as rows, where the products need no other layout of q, k and v."""
        rows = self.norm(x).flatten(2).transpose(1, 2)  # [N, L, C]
        qkv = _product(rows, self.qkv)
        if self.use_new_attention_order:
            parts = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        else:
            parts = qkv.unflatten(2, (self.num_heads, 3, -1)).unbind(3)
        # Taken apart before they are transposed: then their gradients are joined in qkv's own layout.
        h = attend(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).flatten(2)  # [N, L, C]
        h = _product(h, self.proj_out)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def _product(rows, conv):
    """A 1x1 convolution of [N, L, C]."""
    return F.linear(rows, conv.weight.squeeze(2), conv.bias)


def head_by_head(qkv, num_heads):
    """[N, 3C, L] with q of all heads, then k, then v, to q, k, v of the first head, of the second, and so on."""
    return qkv.unflatten(1, (3, num_heads, -1)).transpose(1, 2).flatten(1, 3)


@published
class QKVAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v."""

    def forward(self, qkv):
        """[N * heads, 3d, L] -> [N * heads, d, L]."""
        parts = qkv.unflatten(1, (1, 3, -1)).permute(2, 0, 1, 4, 3).contiguous()  # [3, N * heads, 1, L, d]
        return attend(*parts.unbind()).squeeze(1).transpose(1, 2)

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
    middle_block: nn.Module

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

    def _embeddings(self, emb):
        """What each part of the torso takes for an embedding [N, E]: a dict."""
        parts = [*self.input_blocks, self.middle_block, *getattr(self, "output_blocks", ())]
        return joined(emb, parts, TimestepEmbedSequential, ResBlock, TimestepBlock)

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
    conv_resample=True, dims=2, resblock_updown=False, downsample_padding=1,
):  # fmt: skip
    """(the downsampling blocks as a ModuleList, the output channels of each).

    :param res_block: (channels, out_channels=..., down=...) -> a residual block.
    :param attention: channels -> an attention block.
    :param resblock_updown: residual blocks halve the size, whatever conv_resample is.
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
            down = (
                res_block(ch, down=True) if resblock_updown else Downsample(ch, conv_resample, dims, downsample_padding)
            )
            blocks.append(TimestepEmbedSequential(down))
            widths.append(ch)
    return blocks, widths


# guided-diffusion's order of the U-Net's arguments.
_GUIDED_ARGUMENTS = (
    "image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions", "dropout",
    "channel_mult", "conv_resample", "dims", "num_classes", "use_checkpoint", "use_fp16", "num_heads",
    "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
)  # fmt: skip


def _in_either_order(init):
    """Accept the arguments of a U-Net in guided-diffusion's order too, which begins with image_size."""

    @functools.wraps(init)
    def accepting(self, *args, **kwargs):
        twice = set(_GUIDED_ARGUMENTS[1 : 1 + len(args)]) & kwargs.keys()
        # The fifth argument is attention_resolutions, a list, or in guided's order num_res_blocks.
        if args and (twice or (len(args) > 4 and isinstance(args[4], int))):
            args, kwargs = (), {**dict(zip(_GUIDED_ARGUMENTS, args, strict=False)), **kwargs}
        init(self, *args, **kwargs)

    return accepting


class UNetModel(Torso):
    """The U-Net of DDPM, IDDPM and ADM (Dhariwal & Nichol 2021).

    :param in_channels, out_channels: of the images; with a learned variance out_channels is twice in_channels.
    :param model_channels: width of the first level.
    :param attention_resolutions: downsampling factors of the levels that have attention.
    :param channel_mult: width of each level, in units of model_channels.
    :param conv_resample: resample by convolutions instead of pooling.
    :param num_classes: make the model class-conditional; the label NULL_LABEL stands for a hidden class.
    :param num_heads_upsample: attention heads of the output blocks; -1: as num_heads.
    :param num_head_channels, use_new_attention_order: see AttentionBlock.
    :param resblock_updown: residual blocks resample, whatever conv_resample is.
    :param image_size, use_fp16: accepted as guided-diffusion's constructor does; they change nothing, since images may
        have any size that the levels divide, and `convert_to_fp16` converts the network.
    :param norm_eps: what the norms add to the variance; DDPM's code has 1e-6.
    :param downsample_padding, time_freq_shift: see Downsample and timestep_embedding; DDPM's code has 0 and 1.
    """

    @_in_either_order
    def __init__(
        self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None, use_checkpoint=False, num_heads=1,
        num_heads_upsample=-1, use_scale_shift_norm=False, num_head_channels=-1, use_new_attention_order=False,
        resblock_updown=False, image_size=None, use_fp16=False, norm_eps=NORM_EPS, downsample_padding=1,
        time_freq_shift=0,
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
        self.num_head_channels = num_head_channels
        self.image_size = image_size
        self.time_freq_shift = time_freq_shift

        time_embed_dim = model_channels * 4
        self.time_embed = time_embedding(model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)

        res_block = functools.partial(
            ResBlock, emb_channels=time_embed_dim, dropout=dropout, dims=dims, use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )  # fmt: skip
        attention = functools.partial(
            AttentionBlock, use_checkpoint=use_checkpoint, num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
        )  # fmt: skip

        self.input_blocks, skip_channels = down_blocks(
            res_block, functools.partial(attention, num_heads=num_heads), in_channels, model_channels, num_res_blocks,
            attention_resolutions, channel_mult, conv_resample, dims, resblock_updown, downsample_padding,
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
                    layers.append(res_block(ch, up=True) if resblock_updown else Upsample(ch, conv_resample, dims=dims))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = NormedLayers(normalization(ch), SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1)))
        if norm_eps != NORM_EPS:
            for module in self.modules():
                if isinstance(module, nn.GroupNorm):
                    module.eps = norm_eps

    def _embed(self, x, timesteps, y):
        """The embedding [N, E] of timesteps and classes."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("labels y must be given if and only if the model is class-conditional")
        # A function put in the place of timestep_embedding may have the published arguments only.
        shift = {"freq_shift": self.time_freq_shift} if self.time_freq_shift else {}
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, **shift))
        if y is not None:
            if y.shape != (x.shape[0],):
                raise ValueError(f"labels y {tuple(y.shape)} must have one entry for each of the {x.shape[0]} images")
            # A hidden class adds nothing, so it needs no row of the embedding.
            shown = y != NULL_LABEL
            emb = emb + self.label_emb(th.where(shown, y, 0)) * shown[:, None]
        return emb

    def _torso(self, x, timesteps, y, found=None):
        """The last block's output.

        :param found: a dict of the lists `down`, `middle` and `up`, which all blocks' outputs are added to.
        """
        embs = self._embeddings(self._embed(x, timesteps, y))
        skips = []
        h = x.type(self.inner_dtype)
        for block in self.input_blocks:
            h = block(h, embs[block])
            skips.append(h)
            if found is not None:
                found["down"].append(h)
        h = self.middle_block(h, embs[self.middle_block])
        if found is not None:
            found["middle"].append(h)
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), embs[block])
            if found is not None:
                found["up"].append(h)
        return h

    def forward(self, x, timesteps, y=None):
        """The network's output [N, out_channels, ...] for x [N, in_channels, ...], timesteps [N] and labels y [N]."""
        return self.out(self._torso(x, timesteps, y).type(x.dtype))

    def get_feature_vectors(self, x, timesteps, y=None):
        """The blocks' activations: dict of `down` (list), `middle` and `up` (list), in x's type."""
        found: dict[str, list[th.Tensor]] = {"down": [], "middle": [], "up": []}
        self._torso(x, timesteps, y, found)
        down, middle, up = ([h.type(x.dtype) for h in found[part]] for part in ("down", "middle", "up"))
        return {"down": down, "middle": middle[0], "up": up}


class SuperResModel(UNetModel):
    """A UNetModel that also takes a low-resolution image: `low_res` [N, C, h, w], upsampled bilinearly."""

    @_in_either_order
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


class AttentionPool2d(nn.Module):
    """One vector out of all positions: what their mean attends to (Radford et al. 2021, arXiv 2103.00020, sec. 2.4).

    :param spatial_size: (height, width) of the input, or its side.
    :param embed_dim: channels of the input.
    :param num_heads_channels: channels of an attention head.
    :param output_dim: length of the vector; `embed_dim` unless given.
    """

    def __init__(self, spatial_size, embed_dim, num_heads_channels, output_dim=None):
        super().__init__()
        height, width = _height_width(spatial_size)
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, height * width + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = count_heads(embed_dim, num_head_channels=num_heads_channels)
        self.attention = QKVAttention()

    def forward(self, x):
        """[N, C, ...] -> [N, output_dim]."""
        flat = x.flatten(2)  # [N, C, L]
        tokens = th.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding  # the mean first
        qkv = head_by_head(self.qkv_proj(tokens), self.num_heads)  # always in the new order
        h = self.attention(qkv.reshape(x.shape[0] * self.num_heads, -1, qkv.shape[2])).reshape(tokens.shape)
        return self.c_proj(h[:, :, :1])[:, :, 0]


def _height_width(size):
    return (size, size) if isinstance(size, int) else tuple(size)


POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class EncoderUNetModel(Torso):
    """The half of a U-Net that goes down, and a pool: ADM's classifier of noisy images (Dhariwal & Nichol 2021).

    :param image_size: (height, width) of the images, or their side: 2 must divide it for each level after the first.
    :param out_channels: length of the output, the number of classes.
    :param num_head_channels: channels of an attention head; 32 on levels that it does not divide. -1: `num_heads`.
    :param pool: "attention" (AttentionPool2d), "adaptive" (the mean over positions), "spatial" or "spatial_v2" (the
        means of all blocks, and two linear layers).
    Other arguments as in UNetModel.
    """

    def __init__(
        self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, use_checkpoint=False, use_fp16=False, num_heads=1,
        num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
        use_new_attention_order=False, pool="adaptive",
    ):  # fmt: skip
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
        if pool == "attention" and num_head_channels == -1:
            raise ValueError("attention pooling needs num_head_channels")
        self.image_size = _height_width(image_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.pool = pool
        self.time_embed = time_embedding(model_channels)

        def heads_of(channels):
            fits = num_head_channels == -1 or channels % num_head_channels == 0
            return num_head_channels if fits else 32

        def attention(channels):
            return AttentionBlock(channels, num_heads, use_checkpoint, heads_of(channels), use_new_attention_order)

        res_block = functools.partial(
            ResBlock, emb_channels=4 * model_channels, dropout=dropout, dims=dims, use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )  # fmt: skip
        self.input_blocks, widths = down_blocks(
            res_block, attention, in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult,
            conv_resample, dims, resblock_updown,
        )  # fmt: skip
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(res_block(ch), attention(ch), res_block(ch))
        last = [side // 2 ** (len(channel_mult) - 1) for side in self.image_size]
        self.out = _head(pool, ch, out_channels, [*widths, ch], last, heads_of(ch), dims)

    def forward(self, x, timesteps):
        """Logits [N, out_channels] of noisy images x [N, in_channels, H, W] at timesteps [N]."""
        if self.pool == "attention" and tuple(x.shape[2:]) != self.image_size:
            raise ValueError(f"the classifier takes images of {self.image_size}, not {tuple(x.shape[2:])}")
        embs = self._embeddings(self.time_embed(timestep_embedding(timesteps, self.model_channels)))
        h = x.type(self.inner_dtype)
        means = []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, embs[block])
            if self.pool.startswith("spatial"):
                means.append(h.type(x.dtype).flatten(2).mean(dim=2))
        return self.out(th.cat(means, dim=1) if means else h.type(x.dtype))


def _head(pool, channels, out_channels, widths, last_size, head_channels, dims):
    """The layers of an encoder behind its last block, or behind the means of all blocks.

    :param widths: the channels of all blocks; :param last_size: (height, width) of the last one's output.
    """
    if pool == "adaptive":
        conv = zero_module(conv_nd(dims, channels, out_channels, 1))
        return NormedLayers(normalization(channels), SiLU(), nn.AdaptiveAvgPool2d((1, 1)), conv, nn.Flatten())
    if pool == "attention":
        attention = AttentionPool2d(last_size, channels, head_channels, out_channels)
        return NormedLayers(normalization(channels), SiLU(), attention)
    first, last = nn.Linear(sum(widths), 2048), nn.Linear(2048, out_channels)
    if pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, normalization(2048), SiLU(), last)
