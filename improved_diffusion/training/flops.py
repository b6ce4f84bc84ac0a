"""The arithmetic of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(
    model: nn.Module, training_losses: Callable[..., Any], batch: th.Tensor, cond: Mapping[str, th.Tensor]
) -> float:
    """The FLOPs of a network's forward and backward pass for one image of a batch, which counts for two forward passes.

    As usual for the share of the peak that is used (PaLM, appendix B), recomputed activations do not count, and of the
    rest of the step neither. Nothing is computed: the network is copied without its values.
    """

    def shaped(value: th.Tensor) -> th.Tensor:
        dtype = th.float32 if value.dtype == th.uint8 and value.ndim == 4 else value.dtype
        return th.empty(value.shape, dtype=dtype, device="meta")

    t = th.empty(len(batch), dtype=th.int64, device="meta")
    kwargs = {name: shaped(value) for name, value in cond.items()}
    with FlopCounterMode(display=False) as counter, th.no_grad():
        training_losses(_without_values(model), shaped(batch), t, model_kwargs=kwargs)
    return 3 * counter.get_total_flops() / len(batch)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network on the meta device, which takes no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
