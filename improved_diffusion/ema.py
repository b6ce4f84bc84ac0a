"""Moving averages of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch._utils import _unflatten_dense_tensors


def flatten(params: Sequence[th.Tensor]) -> th.Tensor:
    """All parameters as one vector; a single one as it is."""
    if len(params) == 1:
        return params[0].detach().view(-1)
    return th.cat([p.detach().reshape(-1) for p in params])


class ParameterEMA:
    """ema <- rate * ema + (1 - rate) * parameter, over all parameters in one pass.

    :param rate: in [0, 1).
    :param params: the initial values.
    """

    def __init__(self, rate: float, params: Sequence[th.Tensor]):
        self.rate = rate
        self.flat = flatten(params).clone()
        self.like = [th.empty(p.shape, device="meta") for p in params]

    def update(self, flat_params: th.Tensor, applied: th.Tensor) -> None:
        """Move towards the flat parameters; `applied` is 1, or 0 to stay where it is, on the device."""
        self.flat.lerp_(flat_params, (1 - self.rate) * applied)

    @property
    def params(self) -> list[th.Tensor]:
        """Views of the average in the parameters' shapes."""
        return list(_unflatten_dense_tensors(self.flat, self.like))

    def load(self, params: Sequence[th.Tensor]) -> None:
        """Continue from the given values."""
        self.flat.copy_(flatten(params))
