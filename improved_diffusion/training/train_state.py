"""The optimizer's file of a checkpoint: the optimizer, and everything else that is not weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.description import MAX_STEPS
from ..config import UserError
from ..logs import logger
from .run_log import RunLog

_OTHER = "its parameters are those of another model or of another --precision"
_MOMENTS = {"exp_avg", "exp_avg_sq"}
# Of the gradients' mean to the root of their mean square: at most 7.3 with Adam's usual betas (Cauchy-Schwarz).
MAX_MOMENT_RATIO = 1000
_SMALL_MOMENT = 1e-8  # squares of smaller gradients may vanish; Adam's eps keeps their steps small
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
        rest = _checked_rest(state, path)
        done = rest.get("step", named_step)
        self._load_optimizer(state, path, lr)
        restored = []
        for name, part in self.stateful.items():
            if name in rest:
                with _unfit(f"{path}: its {name} does not fit this run"):
                    part.load_state_dict(rest[name])
                restored.append(name)
            elif name != "bad_steps":
                logger.warn(f"{path} has no {name} (another kind of run saved it): that part starts afresh")
        if self.log.bad_steps.end() > done + 1:  # one more where a step was cut off
            raise UserError(f"{path} is damaged: it counts skipped steps that it has not done; use another")
        self.log.first_row = rest.get("first_row", done)
        with _unfit(f"{path}: its sums of losses are damaged"):
            self._load_meter(rest.get("meters", []))
        logger.logkvs(rest.get("unwritten_log", {}))
        return done, restored

    def _load_optimizer(self, state: Any, path: str, lr: float) -> None:
        params = [p for group in self.opt.param_groups for p in group["params"]]
        own = self.opt.state_dict()["param_groups"]
        with _unfit(f"{path} does not fit this run's optimizer"):
            if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
                raise ValueError(_OTHER)
            entries = {index: _checked_entry(index, entry, params) for index, entry in state["state"].items()}
            self.opt.load_state_dict({"state": entries, "param_groups": [{**group, "lr": lr} for group in own]})

    def _load_meter(self, meters: Sequence[dict[str, th.Tensor]]) -> None:
        """Each rank gets its own sums back; with another number of ranks, rank 0 gets all of them."""
        if any(list(meter) != list(meters[0]) for meter in meters):
            raise ValueError("the ranks have sums of other names")
        rank, device = distributed.get_rank(), self.log.device
        if len(meters) == distributed.get_world_size():
            self.log.meter.load_state_dict(meters[rank], device)
        elif meters:
            share = 1.0 if rank == 0 else 0.0
            total = {name: share * th.stack([meter[name] for meter in meters]).sum(0) for name in meters[0]}
            self.log.meter.load_state_dict(total, device)


@contextmanager
def _unfit(problem: str) -> Iterator[None]:
    """Turn the errors of a state of another form into UserError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{problem}: {reason}; resume from another checkpoint") from None


def _checked_entry(index: Any, entry: Mapping[str, Any], params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
    """AdamW's state of a parameter; one without a gradient has none. Raises ValueError for another's."""
    if type(index) is not int or not 0 <= index < len(params):
        raise ValueError(_OTHER)
    if not {"step", *_MOMENTS} <= entry.keys() <= {"step", *_MOMENTS, "max_exp_avg_sq"}:
        raise ValueError(f"it is of another optimizer, with {', '.join(map(str, entry))[:200]!a}")
    step = entry["step"]  # a whole number in files of older torch
    if (isinstance(step, th.Tensor) and step.ndim) or not 0 <= float(step) < 2**53:
        raise ValueError(f"parameter {index} has a step that is not one number, or negative")
    for name in entry.keys() - {"step"}:
        moment = entry[name]
        if not isinstance(moment, th.Tensor) or moment.shape != params[index].shape or not moment.is_floating_point():
            raise ValueError(_OTHER)
        if not moment.isfinite().all() or (name.endswith("_sq") and (moment < 0).any()):
            raise ValueError(f"parameter {index} has a {name} that is not finite, or negative")
    if (entry["exp_avg"].abs() > MAX_MOMENT_RATIO * entry["exp_avg_sq"].sqrt() + _SMALL_MOMENT).any():
        raise ValueError(f"parameter {index} has an exp_avg that is too large for its exp_avg_sq")
    # In the parameter's memory layout: fused optimizers take elements as they lie.
    like = th.empty_like(params[index], device="cpu", dtype=th.float32)
    moments = {name: like.clone().copy_(entry[name]) for name in entry.keys() - {"step"}}
    return {**entry, **moments, "step": th.tensor(float(step), dtype=th.float32)}


def _checked_rest(state: Any, path: str) -> dict[str, Any]:
    """What an optimizer's file holds besides; {} for published ones. Raises UserError for what no run writes."""
    rest = state.get(REST, {}) if isinstance(state, dict) else {}
    rest = rest if isinstance(rest, dict) else {"step": None}
    row, meters = rest.get("unwritten_log", {}), rest.get("meters", [])
    counts = [rest.get(name, 0) for name in ("step", "first_row")]
    if (
        not all(type(count) is int and 0 <= count <= MAX_STEPS for count in counts)
        or counts[1] > counts[0]
        or not isinstance(meters, list)
        or not isinstance(row, dict)
        or not all(isinstance(key, str) and isinstance(value, (int, float)) for key, value in row.items())
    ):
        raise UserError(f"{path} is damaged: its state besides the optimizer's is not what a run writes; use another")
    return rest


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if hasattr(value, "__float__")}
    return {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}


def _to_host(obj: Any) -> Any:
    """A copy whose tensors are in host memory. Raises TypeError for what a checkpoint cannot hold."""
    if isinstance(obj, th.Tensor):
        return obj.detach().to("cpu", copy=True)
    if isinstance(obj, dict):
        return {key: _to_host(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(_to_host(value) for value in obj)
    if isinstance(obj, np.generic):
        return obj.item()
    if obj is None or isinstance(obj, (str, int, float)):
        return obj
    raise TypeError(f"the state of a part of training, or of a hook, holds a {type(obj).__name__}: make it a tensor")
