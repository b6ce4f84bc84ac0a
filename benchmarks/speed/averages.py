"""A step of a moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch.nn.utils import parameters_to_vector

from improved_diffusion import distributed
from improved_diffusion.nn import update_ema
from improved_diffusion.training.ema import Followed, ParameterEMA, PowerEMA

from .context import Context
from .ways import Way

RATE = 0.9999


def run(context: Context) -> None:
    """Report each network's ways."""
    context.report.begin("averages", "moving one average towards the weights")
    chosen = {workload.source: workload for workload in context.workloads()}
    for number, workload in enumerate(chosen.values()):
        ways = [Way(name, _call(workload, kind), 2) for name, kind in KINDS.items()]
        context.compare(context.ways(ways), context.clock.part(1 / (len(chosen) - number)), workload=workload.source)


def _call(workload: Any, kind: Callable[[list[th.Tensor]], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
    return lambda: kind(list(workload.model().to(distributed.dev()).parameters()))


def _one_by_one(params: list[th.Tensor]) -> Callable[[], Any]:
    target = [p.detach().clone() for p in params]
    return lambda: update_ema(target, params, RATE)


def _diffusers(params: list[th.Tensor]) -> Callable[[], Any]:
    from diffusers.training_utils import EMAModel

    average = EMAModel(params, decay=RATE)
    return lambda: average.step(params)


def _ours(params: list[th.Tensor], kind: Any = ParameterEMA, rate: float = RATE) -> Callable[[], Any]:
    average, applied, followed = kind(rate, params), th.ones((), device=params[0].device), Followed()
    return lambda: average.update(followed(params), applied, 1000)


def _ours_power(params: list[th.Tensor]) -> Callable[[], Any]:
    return _ours(params, PowerEMA, 0.05)


def _ours_flat(params: list[th.Tensor]) -> Callable[[], Any]:
    return _ours([parameters_to_vector(params).detach()])


KINDS = {
    "published, one by one": _one_by_one,
    "ours": _ours,
    "ours, power function": _ours_power,
    "ours, 16-bit training": _ours_flat,
    "diffusers": _diffusers,
}
