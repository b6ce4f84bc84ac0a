"""A network's architecture, read off the shapes of its state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch as th

from ..config.model import MAX_SIDE

Shapes = Mapping[str, tuple[int, ...]]


def read_architecture(state_dict: Mapping[str, th.Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict say of a UNetModel's arguments (heads and dropout leave no trace there).

    Raises KeyError, IndexError or ValueError where it is not the state dict of a UNetModel.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    last = _indices(shapes, "output_blocks.")[-1]
    # A block of the way up that changes the size ends with a residual block, or with an interpolating convolution.
    resampling = [i for i in range(last) if any(f"output_blocks.{i}.{k}.in_layers.0.weight" in shapes for k in (1, 2))]
    blocks = _down_blocks(shapes)
    if resampling:
        levels = len(resampling) + 1
        down = set(range((last + 1) // levels, len(blocks), (last + 1) // levels))
    else:
        down = {i for i, block in blocks.items() if block.convolution}
    return {
        **_of_blocks(shapes, blocks, down),
        "out_channels": shapes["out.2.weight"][0],
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "resblock_updown": bool(resampling),
    }


def is_encoder(names: Mapping[str, Any]) -> bool:
    """Whether names of tensors are those of an EncoderUNetModel."""
    return "time_embed.0.weight" in names and not any(name.startswith("output_blocks.") for name in names)


def read_encoder(state_dict: Mapping[str, th.Tensor], num_res_blocks: int | None = None) -> dict[str, Any]:
    """What the shapes of a state dict say of an EncoderUNetModel's arguments.

    :param num_res_blocks: where it is known. Shapes show it but for networks of equal levels without attention.
    :return: `image_size` is None where no shape shows it.
    Raises KeyError, IndexError or ValueError where it is not the state dict of an encoder, or where the blocks could
    belong to networks of different depths.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    blocks = _down_blocks(shapes)
    down = {i for i, block in blocks.items() if block.convolution}
    updown = not down
    if updown:
        possible = _possible_levels(blocks)
        found = [found for found in possible if num_res_blocks in (None, found[0])]
        if len(found) != 1:
            depths = " or ".join(str(depth) for depth, _ in possible) or "no number of"
            raise ValueError(f"its shapes fit networks of {depths} blocks on each level")
        down = found[0][1]
    pool = _pool(shapes)
    last = {"attention": "out.2.c_proj.weight", "adaptive": "out.3.weight", "spatial": "out.2.weight"}
    arguments = _of_blocks(shapes, blocks, down)
    side = None
    if pool == "attention":
        positions = shapes["out.2.positional_embedding"][1] - 1
        side = math.isqrt(max(positions, 0))
        is_square = side > 0 and side**2 == positions
        side = side * 2 ** (len(arguments["channel_mult"]) - 1) if is_square else None
        if side is not None and side > MAX_SIDE:
            raise KeyError("out.2.positional_embedding")
    return {
        **arguments,
        "out_channels": shapes[last.get(pool, "out.3.weight")][0],
        "image_size": side,
        "resblock_updown": updown,
        "pool": pool,
    }


class _Block:
    """A block of the way down, by its shapes."""

    def __init__(self, shapes: Shapes, index: int):
        prefix = f"input_blocks.{index}"
        self.convolution = f"{prefix}.0.op.weight" in shapes
        convolution = shapes[f"{prefix}.0.op.weight" if self.convolution else f"{prefix}.0.in_layers.2.weight"]
        self.width, self.narrower = convolution[:2]  # channels out and in
        self.attention = f"{prefix}.1.qkv.weight" in shapes

    @property
    def may_resample(self) -> bool:
        return not self.attention and self.width == self.narrower


def _indices(shapes: Shapes, prefix: str) -> list[int]:
    """The numbers of the blocks, from 0. Raises KeyError for names that leave numbers out, or have others."""
    found = {name.split(".")[1] for name in shapes if name.startswith(prefix)}
    if found != {str(i) for i in range(len(found))}:
        raise KeyError(prefix)
    return list(range(len(found)))


def _down_blocks(shapes: Shapes) -> dict[int, _Block]:
    """The blocks of the way down behind the first convolution, by their index."""
    return {i: _Block(shapes, i) for i in _indices(shapes, "input_blocks.")[1:]}


def _possible_levels(blocks: Mapping[int, _Block]) -> list[tuple[int, set[int]]]:
    """(residual blocks on each level, the blocks that halve the size) of the networks that could have these blocks."""
    found = []
    for depth in (depth for depth in range(1, len(blocks) + 1) if (len(blocks) + 1) % (depth + 1) == 0):
        down = set(range(depth + 1, len(blocks), depth + 1))
        levels = [[blocks[i] for i in range(start - depth, start)] for start in (*sorted(down), len(blocks) + 1)]
        alike = all(len({(block.attention, block.width) for block in level}) == 1 for level in levels)
        if alike and all(blocks[i].may_resample for i in down):
            found.append((depth, down))
    return found


def _of_blocks(shapes: Shapes, blocks: Mapping[int, _Block], down: set[int]) -> dict[str, Any]:
    """The arguments that the way down shows.

    :param down: the blocks that halve the size.
    """
    model_channels = shapes["time_embed.0.weight"][1]
    if not model_channels:
        raise ValueError("a network without channels")
    levels: list[list[_Block]] = [[]]
    for i, block in blocks.items():
        if i in down:
            levels.append([])
        else:
            levels[-1].append(block)
    mult = [level[-1].width / model_channels for level in levels]
    width = blocks[1].width
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "model_channels": model_channels,
        "num_res_blocks": len(levels[0]),
        "attention_resolutions": tuple(2**k for k, level in enumerate(levels) if any(b.attention for b in level)),
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * width,
    }


def _pool(shapes: Shapes) -> str:
    """The pool of an encoder, by the names and shapes of its last layers."""
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes["out.0.weight"]) == 2:
        return "spatial_v2" if "out.3.weight" in shapes else "spatial"
    return "adaptive"
