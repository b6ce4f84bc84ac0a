"""A network's architecture, read off the shapes of its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th


def read_architecture(state_dict: Mapping[str, th.Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict say of a UNetModel's arguments (heads and dropout leave no trace there).

    Raises KeyError, IndexError or ValueError where it is not the state dict of a UNetModel.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    model_channels = shapes["time_embed.0.weight"][1]
    if not model_channels:
        raise ValueError("a network without channels")
    mults, attention, blocks_per_level = [shapes["input_blocks.0.0.weight"][0] / model_channels], [], [0]
    level = 0
    indices = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")})
    for i in indices[1:]:
        prefix = f"input_blocks.{i}"
        if f"{prefix}.0.op.weight" in shapes:
            level += 1
            mults.append(0)
            blocks_per_level.append(0)
            continue
        mults[level] = shapes[f"{prefix}.0.in_layers.2.weight"][0] / model_channels
        blocks_per_level[level] += 1
        if f"{prefix}.1.qkv.weight" in shapes and 2**level not in attention:
            attention.append(2**level)
    width = shapes["input_blocks.1.0.in_layers.2.weight"][0]
    return dict(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        model_channels=model_channels,
        out_channels=shapes["out.2.weight"][0],
        num_res_blocks=blocks_per_level[0],
        attention_resolutions=tuple(attention),
        channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        use_scale_shift_norm=shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * width,
    )
