"""The optimizer's file of a checkpoint: the optimizer, and everything else that is not weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch as th

from .. import distributed
from ..config import UserError
from ..logs import logger
from .run_log import RunLog

REST = "improved_diffusion"  # the key of everything but the optimizer; other code ignores it


class Stateful(Protocol):
    """A part of a training run that has a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore what `state_dict` gave."""


@dataclass
class TrainState:
    """What resuming needs besides the weights and their averages.

    :param parts: further parts by name: the loss scale, the schedule sampler, hooks. Those without a
        load_state_dict have no state.
    """

    opt: th.optim.Optimizer
    log: RunLog
    parts: Mapping[str, Any]

    @property
    def stateful(self) -> dict[str, Stateful]:
        """The parts that have a state, by name."""
        return {name: part for name, part in self.parts.items() if hasattr(part, "load_state_dict")}

    def state_dict(self, done: int, alone: bool = False) -> dict[str, Any]:
        """The optimizer's state dict with the rest under REST, in host memory; {} except on rank 0. Collective.

        :param done: training steps done.
        :param alone: the other ranks do not take part, so that their losses since the last row of the log are missing.
        """
        # Each rank's own sums: added up in another order they would differ in the last bit.
        own = self.log.meter.state_dict()
        meters = [own] if alone else distributed.all_gather_object(own)
        if distributed.get_rank() != 0:
            return {}
        rest = {
            "step": done,
            "first_row": self.log.first_row,
            "meters": meters,
            "unwritten_log": _numbers(logger.getkvs()),
        }
        rest |= {name: part.state_dict() for name, part in self.stateful.items()}
        return _to_host({**self.opt.state_dict(), REST: rest})

    def load_state_dict(self, state: Any, path: str, named_step: int, lr: float) -> tuple[int, list[str]]:
        """Restore what `state_dict` gave, or what published code wrote: the optimizer's state alone.

        :param path: the file it comes from, for messages.
        :param named_step: the number in the file's name.
        :param lr: the learning rate, which wins over the stored one.
        Returns the steps done and the names of the restored parts. Raises UserError for the state of another model.
        """
        rest = state.get(REST, {}) if isinstance(state, dict) else {}
        done = rest.get("step", named_step)
        self._load_optimizer(state, path, lr)
        restored = []
        for name, part in self.stateful.items():
            if name in rest:
                part.load_state_dict(rest[name])
                restored.append(name)
            elif name != "bad_steps":
                logger.warn(f"{path} has no {name} (another kind of run saved it): that part starts afresh")
        self.log.first_row = rest.get("first_row", done)
        self._load_meter(rest.get("meters", []))
        logger.logkvs(rest.get("unwritten_log", {}))
        return done, restored

    def _load_optimizer(self, state: Any, path: str, lr: float) -> None:
        params = [p for group in self.opt.param_groups for p in group["params"]]
        try:
            groups = [{**group, **self.opt.defaults, "lr": lr} for group in state["param_groups"]]
            for index, entry in state["state"].items():  # a parameter without a gradient has no entry
                if index >= len(params) or entry["exp_avg"].shape != params[index].shape:
                    raise ValueError("its shapes are those of another model or of another --precision")
            self.opt.load_state_dict({"state": state["state"], "param_groups": groups})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not fit this run's optimizer: {error}") from None

    def _load_meter(self, meters: Sequence[dict[str, th.Tensor]]) -> None:
        """Each rank gets its own sums back; with another number of ranks, rank 0 gets all of them."""
        rank, device = distributed.get_rank(), self.log.bad_steps.counts.device
        if len(meters) == distributed.get_world_size():
            self.log.meter.load_state_dict(meters[rank], device)
        elif meters:
            share = 1.0 if rank == 0 else 0.0
            total = {name: share * th.stack([meter[name] for meter in meters]).sum(0) for name in meters[0]}
            self.log.meter.load_state_dict(total, device)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if hasattr(value, "__float__")}
    return {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}


def _to_host(obj: Any) -> Any:
    """A copy whose tensors are in host memory."""
    if isinstance(obj, th.Tensor):
        return obj.detach().to("cpu", copy=True)
    if isinstance(obj, dict):
        return {key: _to_host(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(_to_host(value) for value in obj)
    return obj
