"""The U-Net of diffusers (UNet2DModel) and ours: options to options, tensors to tensors, both ways and exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch as th
from torch import nn

from ..config import DiffusionConfig, ModelConfig, UserError, height_width, parse_size, shown
from ..config.model import MAX_BLOCKS, MAX_CLASSES, MAX_DIFFUSION_STEPS, MAX_SIDE, MAX_WIDTH
from ..models.factories import attention_factors, resolve_channel_mult
from ..nn import timestep_embedding
from ..unet import AttentionBlock, Downsample, ResBlock, UNetModel, Upsample
from .foreign_config import ForeignConfig

TIMESTEPS = "time_proj.weight"  # [T, C], the sinusoids of all timesteps where they are a table

# Tensors


class Layout(Protocol):
    """How a tensor of ours lies in tensors of theirs."""

    def split(self, ours: th.Tensor) -> list[th.Tensor]: ...
    def join(self, theirs: list[th.Tensor]) -> th.Tensor: ...


class Same:
    """The same tensor."""

    def split(self, ours: th.Tensor) -> list[th.Tensor]:
        return [ours]

    def join(self, theirs: list[th.Tensor]) -> th.Tensor:
        return theirs[0]


class Pointwise:
    """The weight of a convolution with one tap, [C, D, 1], as that of a linear layer."""

    def split(self, ours: th.Tensor) -> list[th.Tensor]:
        return [ours[..., 0]]

    def join(self, theirs: list[th.Tensor]) -> th.Tensor:
        return theirs[0][..., None]


class SinesFirst:
    """The columns for the cosines of the timesteps, then those for the sines, in the other order."""

    def split(self, ours: th.Tensor) -> list[th.Tensor]:
        return [ours.roll(ours.shape[1] // 2, dims=1)]

    def join(self, theirs: list[th.Tensor]) -> th.Tensor:
        return self.split(theirs[0])[0]


@dataclass(frozen=True)
class QKV:
    """The rows for q, k and v of an attention, in one tensor of ours and in three of theirs.

    :param by_head: ours has q, k, v of the first head, then of the second, and so on; otherwise q of all heads, k, v.
    """

    heads: int
    by_head: bool
    pointwise: bool  # a convolution's weight, see Pointwise

    def split(self, ours: th.Tensor) -> list[th.Tensor]:
        rows = ours[..., 0] if self.pointwise else ours
        if not self.by_head:
            return list(rows.chunk(3))
        parts = rows.unflatten(0, (self.heads, 3, -1))
        return [parts[:, i].flatten(0, 1) for i in range(3)]

    def join(self, theirs: list[th.Tensor]) -> th.Tensor:
        rows = th.cat(theirs)
        if self.by_head:
            rows = rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return rows[..., None] if self.pointwise else rows


@dataclass(frozen=True)
class Row:
    """A row of the table: a tensor of ours, and where it is among theirs."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Same()


_RES_BLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_RESAMPLE = {"op": "conv", "conv": "conv"}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of its early versions


def rows(network: UNetModel, sines_first: bool) -> list[Row]:
    """The table of all tensors of a network of ours.

    :param sines_first: theirs takes the sines of the timesteps before the cosines.
    """
    names = network.state_dict().keys()
    found = list(_plain("", "", _ENDS, names))
    for ours, theirs in _blocks(network):
        block = network.get_submodule(ours)
        if isinstance(block, AttentionBlock):
            found += _attention(ours, theirs, block)
        else:
            inner = _RES_BLOCK if isinstance(block, ResBlock) else _RESAMPLE
            found += _plain(f"{ours}.", f"{theirs}.", inner, names)
    if sines_first:
        first = "time_embed.0.weight"
        found = [Row(row.ours, row.theirs, SinesFirst()) if row.ours == first else row for row in found]
    assert {row.ours for row in found} == set(names)
    return found


def _plain(ours: str, theirs: str, table: Mapping[str, str], names: Any) -> Iterator[Row]:
    for own, other in table.items():
        for kind in ("weight", "bias"):
            if f"{ours}{own}.{kind}" in names:
                yield Row(f"{ours}{own}.{kind}", (f"{theirs}{other}.{kind}",))


def _attention(ours: str, theirs: str, block: AttentionBlock) -> Iterator[Row]:
    by_head = not block.use_new_attention_order
    for kind in ("weight", "bias"):
        qkv = tuple(f"{theirs}.{name}.{kind}" for name in ("to_q", "to_k", "to_v"))
        pointwise = kind == "weight"
        yield Row(f"{ours}.norm.{kind}", (f"{theirs}.group_norm.{kind}",))
        yield Row(f"{ours}.qkv.{kind}", qkv, QKV(block.num_heads, by_head, pointwise))
        yield Row(f"{ours}.proj_out.{kind}", (f"{theirs}.to_out.0.{kind}",), Pointwise() if pointwise else Same())


def _blocks(network: UNetModel) -> Iterator[tuple[str, str]]:
    """(our name, their name) of each block of layers between the ends."""
    yield from zip(
        ("middle_block.0", "middle_block.1", "middle_block.2"),
        ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    )
    for side, resample in (("input_blocks", "downsamplers"), ("output_blocks", "upsamplers")):
        there = "down_blocks" if side == "input_blocks" else "up_blocks"
        level = number = 0
        for i, block in enumerate(getattr(network, side)):
            if side == "input_blocks" and i == 0:
                continue  # the first convolution
            next_level = False
            for j, layer in enumerate(block):
                if _resamples(layer):
                    kind, next_level = f"{resample}.0", True
                else:
                    kind = f"{'attentions' if isinstance(layer, AttentionBlock) else 'resnets'}.{number}"
                yield f"{side}.{i}.{j}", f"{there}.{level}.{kind}"
            number += 1
            if next_level:
                level, number = level + 1, 0


def _resamples(layer: nn.Module) -> bool:
    return isinstance(layer, (Upsample, Downsample)) or (isinstance(layer, ResBlock) and layer.updown)


def to_theirs(state_dict: Mapping[str, th.Tensor], table: list[Row]) -> dict[str, th.Tensor]:
    """Their state dict of ours; tensors may share memory."""
    return {name: part for row in table for name, part in zip(row.theirs, row.layout.split(state_dict[row.ours]))}


def to_ours(tensors: Mapping[str, th.Tensor], network: UNetModel, table: list[Row], path: str) -> dict[str, th.Tensor]:
    """Our state dict of theirs. Raises UserError, naming the first difference, unless they are those of the network."""
    theirs = _by_present_names(tensors, path)
    expected = to_theirs(network.state_dict(), table)
    for name in [*expected, *theirs]:
        if name not in theirs or name not in expected:
            where = "lacks" if name not in theirs else "has, and its config.json does not,"
            raise UserError(f"{path} {where} the tensor {shown(name)}: use another file")
        if theirs[name].shape != expected[name].shape:
            raise UserError(
                f"{path}: {shown(name)} is {tuple(theirs[name].shape)}, its config.json makes it "
                f"{tuple(expected[name].shape)}: use another file"
            )
    return {row.ours: row.layout.join([theirs[name] for name in row.theirs]) for row in table}


def _by_present_names(tensors: Mapping[str, th.Tensor], path: str) -> dict[str, th.Tensor]:
    """Their tensors by today's names. Raises UserError for two different ones under a former and today's name."""
    found: dict[str, th.Tensor] = {}
    for former, tensor in tensors.items():
        name = _present_name(former)
        if name in found and not th.equal(found[name], tensor):
            raise UserError(
                f"{path} has the tensor {shown(name)} twice, also under its former name, with other numbers: "
                "use another file"
            )
        found[name] = tensor
    return found


def _present_name(name: str) -> str:
    """The name of a tensor in today's diffusers."""
    block, _, rest = name.rpartition(".attentions.")
    number, _, inner = rest.partition(".")
    layer, _, kind = inner.rpartition(".")
    return f"{block}.attentions.{number}.{_FORMER[layer]}.{kind}" if block and layer in _FORMER else name


# Options

# What resamples between the levels -> the blocks of a level without and with attention.
_DOWN = {"conv": ("DownBlock2D", "AttnDownBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
_UP = {"conv": ("UpBlock2D", "AttnUpBlock2D"), "resnet": ("ResnetUpsampleBlock2D", "AttnUpBlock2D")}


def has_table(diffusion: DiffusionConfig) -> bool:
    """Whether the network sees fractional timesteps, which theirs can only look up in a table."""
    return diffusion.rescale_timesteps and diffusion.diffusion_steps != 1000


def table_of_timesteps(steps: int, width: int, freq_shift: int) -> th.Tensor:
    """What the network sees of each timestep t * 1000/T, [T, width]."""
    return timestep_embedding(th.arange(steps).float() * (1000.0 / steps), width, freq_shift=freq_shift)


def timestep_options(config: ForeignConfig, table: th.Tensor | None, steps: int | None, path: str) -> dict[str, Any]:
    """Our options for the timesteps that a network of theirs sees.

    :param table: [T, C] where it looks them up.
    :param steps: T of the scheduler, None without one.
    Raises UserError for a table of anything but t * 1000/T.
    """
    if config["time_embedding_type"] == "positional":
        return {} if steps is None else {"rescale_timesteps": steps == 1000}  # t * 1000/1000 is t
    rows = config.whole("num_train_timesteps", 1, MAX_DIFFUSION_STEPS)
    width = config.wholes("block_out_channels", 1, MAX_WIDTH)[0]
    if steps not in (None, rows):
        raise config.refused("num_train_timesteps", f"that of the scheduler, {steps}")
    if table is None or table.shape != (rows, width):
        raise UserError(f"{path} has no {TIMESTEPS} of {rows} x {width} numbers: use another file")
    expected = table_of_timesteps(rows, width, config.whole("freq_shift", 0, 1))
    if not th.allclose(table.float(), expected, atol=1e-3):
        raise UserError(f"{path}: {TIMESTEPS} is not that of t * 1000/T, which networks of this package see")
    return {"diffusion_steps": rows, "rescale_timesteps": True}


def sines_first(config: Mapping[str, Any]) -> bool:
    """Whether a network of theirs takes the sines of the timesteps before the cosines."""
    return config["time_embedding_type"] == "positional" and not config["flip_sin_to_cos"]


def config_of(model: ModelConfig, diffusion: DiffusionConfig, network: UNetModel) -> dict[str, Any]:
    """The arguments of the UNet2DModel that computes what our network does.

    Raises UserError, naming the option, for a network that it cannot be.
    """
    mult = resolve_channel_mult(model.image_size, model.channel_mult)
    if mult[0] != 1:
        raise UserError(f"--channel_mult {','.join(map(str, mult))}: diffusers needs one that begins with 1")
    factors = attention_factors(model.image_size, model.attention_resolutions)
    with_attention = [2**level in factors for level in range(len(mult))]
    height, width = height_width(model.image_size)
    table = has_table(diffusion)
    resampling = "resnet" if model.resblock_updown else "conv"
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "time_embedding_type": "learned" if table else "positional",
        "num_train_timesteps": diffusion.diffusion_steps if table else None,
        "flip_sin_to_cos": table or not model.time_freq_shift,  # DDPM's code has the sines first
        "freq_shift": model.time_freq_shift,
        "down_block_types": [_DOWN[resampling][attends] for attends in with_attention],
        "up_block_types": [_UP[resampling][attends] for attends in reversed(with_attention)],
        "block_out_channels": [int(m * model.num_channels) for m in mult],
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": model.downsample_padding,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_channels(model, network),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,  # the middle's attention has no norm otherwise
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "num_class_embeds": network.num_classes,
    }  # fmt: skip


def _head_channels(model: ModelConfig, network: UNetModel) -> int | None:
    """The channels of an attention head, None for one head of all channels."""
    blocks = [block for block in network.modules() if isinstance(block, AttentionBlock)]
    if model.num_head_channels == -1 and all(block.num_heads == 1 for block in blocks):
        return None
    widths = {block.channels // block.num_heads for block in blocks}
    if len(widths) == 1:
        return widths.pop()
    name = "num_heads" if model.num_heads_upsample in (-1, model.num_heads) else "num_heads_upsample"
    raise UserError(
        f"--{name} {getattr(model, name)} makes attention heads of {', '.join(map(str, sorted(widths)))} channels: "
        "diffusers needs the same number in all of them"
    )


_FIXED = {  # what our network is
    "center_input_sample": (False,), "time_embedding_dim": (None,), "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"), "norm_num_groups": (32,), "add_attention": (True,),
    "class_embed_type": (None,),
}  # fmt: skip
_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3], "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"], "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2, "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32,
    "attn_norm_num_groups": None, "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip


def read_config(values: Mapping[str, Any], path: str) -> ForeignConfig:
    """A UNet2DModel's config.json, with their defaults. Raises UserError for what our network never is."""
    config = ForeignConfig.of(values, _DEFAULTS, path)
    for name, allowed in _FIXED.items():
        config.choice(name, allowed)
    return config


def options_of(config: ForeignConfig) -> dict[str, Any]:
    """Our options of a network of theirs. Raises UserError, by name and value, for what our network does not do."""
    widths = config.wholes("block_out_channels", 1, MAX_WIDTH)
    attends, resampling = _levels(config)
    if len(widths) != len(attends):
        raise config.refused("block_out_channels", "as many as block types")
    mult = [_multiple(width, widths[0]) for width in widths]
    if any(int(float(m) * widths[0]) != width for m, width in zip(mult, widths)):
        raise config.refused("block_out_channels", "widths that a multiple of the first one gives exactly")
    size = config.size("sample_size", MAX_SIDE)
    side, heads = min(height_width(size)), _heads(config, widths, attends)
    scale_shift = config.choice("resnet_time_scale_shift", ("default", "scale_shift")) == "scale_shift"
    config.choice("attn_norm_num_groups", (32,) if scale_shift else (None, 32))
    config.choice("time_embedding_type", ("positional", "learned"))
    config.choice("flip_sin_to_cos", (True, False))
    channels = config.whole("in_channels", 1, 4)
    classes = config.whole("num_class_embeds", 1, MAX_CLASSES) if config["num_class_embeds"] is not None else 0
    return {
        "image_size": parse_size(size),
        "channels": channels,
        "learn_sigma": config.choice("out_channels", (channels, 2 * channels)) == 2 * channels,
        "num_channels": widths[0],
        "channel_mult": ",".join(mult),
        "num_res_blocks": config.whole("layers_per_block", 1, MAX_BLOCKS),
        "attention_resolutions": ",".join(str(side // 2**i) for i, attention in enumerate(attends) if attention),
        "class_cond": classes > 0,
        "num_classes": classes,
        "use_scale_shift_norm": scale_shift,
        "dropout": config.number("dropout", 0, 1),
        "resblock_updown": resampling == "resnet",
        "norm_eps": config.number("norm_eps", 1e-12, 0.1),
        "downsample_padding": config.whole("downsample_padding", 0, 1),
        "time_freq_shift": config.whole("freq_shift", 0, 1),
        **heads,
    }


def _levels(config: ForeignConfig) -> tuple[list[bool], str]:
    """(which levels have attention, what resamples between them)."""
    attends: list[list[bool]] = []
    resampling = set()
    for name, kinds, of_attention in (
        ("down_block_types", _DOWN, "downsample_type"), ("up_block_types", _UP, "upsample_type"),
    ):  # fmt: skip
        blocks = config.texts(name, sorted({block for kind in kinds.values() for block in kind}))
        chosen = config.choice(of_attention, tuple(kinds))
        attends.append(["Attn" in block for block in blocks])
        # Nothing resamples behind the last block.
        resampling |= {
            chosen if "Attn" in block else "resnet" if "Resnet" in block else "conv" for block in blocks[:-1]
        }
    if attends[1] != attends[0][::-1]:
        raise config.refused("up_block_types", "as many as down_block_types, with attention on the same levels")
    if len(resampling) > 1:
        raise config.refused("down_block_types", "one way of resampling between all levels, on the way up too")
    return attends[0], resampling.pop() if resampling else "conv"


def _multiple(width: int, first: int) -> str:
    return str(width // first if width % first == 0 else width / first)


def _heads(config: ForeignConfig, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    """Our options for the attention heads of theirs."""
    if config["attention_head_dim"] is None:
        return {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1}
    size = config.whole("attention_head_dim", 1, MAX_WIDTH)
    attended = {width for width, attention in zip(widths, attends) if attention} | {widths[-1]}
    if any(width % size for width in attended):
        raise config.refused("attention_head_dim", "a divisor of the channels of all attentions")
    if len(attended) > 1:
        return {"num_heads_upsample": -1, "num_head_channels": size}
    return {"num_heads": widths[-1] // size, "num_heads_upsample": -1, "num_head_channels": -1}
