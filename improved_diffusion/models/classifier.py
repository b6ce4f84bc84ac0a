"""The classifier of noisy images that guides a diffusion model, and its loss (Dhariwal & Nichol 2021, 2105.05233).

Shapes are [N, C, H, W].
"""

from __future__ import annotations

import functools

import torch as th
from torch import nn

from ..nn import SiLU, conv_nd, normalization, timestep_embedding
from ..unet import AttentionBlock, QKVAttention, ResBlock, TimestepEmbedSequential, Torso, down_blocks, time_embedding


def heads_of(channels: int) -> int:
    """Attention heads of 64 channels each (Dhariwal & Nichol 2021, table 2), or of 32 where 64 does not divide them."""
    return channels // (64 if channels % 64 == 0 else 32)


class AttentionPool(nn.Module):
    """One vector out of all positions: what their mean attends to (Radford et al. 2021, arXiv 2103.00020, sec. 2.4).

    :param positions: of the input, L.
    """

    def __init__(self, channels: int, positions: int, out_channels: int):
        super().__init__()
        self.num_heads = heads_of(channels)
        self.positional_embedding = nn.Parameter(th.randn(channels, positions + 1) / channels**0.5)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = QKVAttention()
        self.proj_out = conv_nd(1, channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[N, C, ...] with L positions -> [N, out_channels]."""
        flat = x.flatten(2)  # [N, C, L]
        tokens = (
            th.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding
        )  # the mean comes first
        qkv = self.qkv(tokens)  # [N, 3C, 1 + L], head by head: q, k, v
        h = self.attention(qkv.reshape(len(x) * self.num_heads, -1, qkv.shape[2])).reshape(tokens.shape)
        return self.proj_out(h[:, :, :1])[:, :, 0]


class NoisyClassifier(Torso):
    """The half of a U-Net that goes down, and attention pooling: the classes' logits of images at any noise level.

    :param image_size: (height, width) of the images, which must be divisible by 2 for each level after the first.
    :param in_channels: of the images.
    :param model_channels: width of the first level.
    :param attention_resolutions: downsampling factors of the levels that have attention.
    :param channel_mult: width of each level, in units of model_channels; each a multiple of 32.
    """

    def __init__(
        self, image_size, in_channels, num_classes, model_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), use_checkpoint=False,
    ):  # fmt: skip
        super().__init__()
        self.image_size = tuple(image_size)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.model_channels = model_channels
        self.time_embed = time_embedding(model_channels)

        res_block = functools.partial(
            ResBlock, emb_channels=4 * model_channels, dropout=dropout, use_checkpoint=use_checkpoint,
            use_scale_shift_norm=True,
        )  # fmt: skip

        def attention(channels):
            return AttentionBlock(channels, num_heads=heads_of(channels), use_checkpoint=use_checkpoint)

        self.input_blocks, widths = down_blocks(
            res_block, attention, in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult
        )
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(res_block(ch), attention(ch), res_block(ch))
        factor = 2 ** (len(channel_mult) - 1)
        positions = (self.image_size[0] // factor) * (self.image_size[1] // factor)
        self.out = nn.Sequential(normalization(ch), SiLU(), AttentionPool(ch, positions, num_classes))

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """Logits [N, num_classes] of noisy images x [N, in_channels, H, W] at timesteps [N]."""
        if x.shape[1:] != (self.in_channels, *self.image_size):
            raise ValueError(
                f"the classifier takes images of {(self.in_channels, *self.image_size)}, not {tuple(x.shape[1:])}"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x.type(self.inner_dtype)
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)
        return self.out(h.type(x.dtype))
