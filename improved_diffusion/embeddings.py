"""Where the layers that take the timesteps' embedding into a network's residual blocks are one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from .nn import SiLU, is_untouched


class Joined(dict[nn.Module, th.Tensor]):
    """What the `emb_layers` of a network's blocks give for an embedding, in the place of the embedding."""


def projected(emb_layers: nn.Module, emb: Any) -> th.Tensor:
    """emb_layers(emb), [N, C], of an embedding [N, E] or of what `joined` has made of it."""
    return emb[emb_layers] if isinstance(emb, Joined) else emb_layers(emb)


def pays(device: th.device) -> bool:
    """Whether one product takes less time than many: on CPUs joining the weights takes longer than it saves."""
    return device.type != "cpu"


def joined(
    emb: th.Tensor, parts: Iterable[nn.Module], sequence: type[nn.Module], block: type[nn.Module],
    taker: type[nn.Module],
) -> dict[nn.Module, Any]:  # fmt: skip
    """What each of a network's parts takes for the embedding [N, E]: {part: emb, or Joined}.

    In the place of seven operations of a training step for each residual block there are a dozen for all of them. A
    part that somebody's code has changed gets the embedding itself, and calls its layers as always.

    :param sequence, block, taker: the classes of parts, of residual blocks, and of all layers that take an embedding.
    """
    found: dict[nn.Module, Any] = dict.fromkeys(parts, emb)
    if not pays(emb.device) or th.compiler.is_compiling():
        return found
    plain = {part: layers for part in found if (layers := _plain_layers(part, sequence, block, taker))}
    layers = [each for of_part in plain.values() for each in of_part]
    linears: list[Any] = [each[1] for each in layers]
    if len({_kind(linear) for linear in linears}) == 1:  # not where some are frozen, or of another type
        outputs = Joined(zip(layers, _product(emb, linears), strict=True))
        found.update(dict.fromkeys(plain, outputs))
    return found


def _product(emb: th.Tensor, linears: Sequence[Any]) -> Sequence[th.Tensor]:
    """linear(silu(emb)) for each of the linear layers."""
    weight, bias = th.cat([linear.weight for linear in linears]), th.cat([linear.bias for linear in linears])
    return F.linear(F.silu(emb), weight, bias).split([linear.out_features for linear in linears], dim=-1)


def _plain_layers(part: Any, sequence: type[nn.Module], block: type[nn.Module], taker: type[nn.Module]) -> list[Any]:
    """The emb_layers of the residual blocks in a part; none where anything that takes the embedding was changed, or
    has activation checkpointing, which saves memory rather than time, and which code may replace by one of tensors."""
    if not is_untouched(part, sequence):
        return []
    takers = [layer for layer in part if isinstance(layer, taker)]
    if not all(is_untouched(layer, block) and not layer.use_checkpoint for layer in takers):
        return []
    found = [layer.emb_layers for layer in takers]
    return found if all(map(_is_plain, found)) else []


def _is_plain(emb_layers: Any) -> bool:
    """Whether they are SiLU and a linear layer with ordinary parameters, as in the published blocks."""
    if not is_untouched(emb_layers, nn.Sequential) or len(emb_layers) != 2:
        return False
    silu, linear = emb_layers._modules.values()  # faster than to iterate over it
    if not (is_untouched(silu, SiLU) and is_untouched(linear, nn.Linear)):
        return False
    return all(type(p) is nn.Parameter for p in linear._parameters.values())


def _kind(linear: Any) -> tuple[Any, ...]:
    """What the parameters of layers that are joined have in common."""
    return tuple((p.dtype, p.device, p.requires_grad) for p in linear._parameters.values())
