"""What a checkpoint set holds of a training loop: out of the loop, and back into it bit for bit.

`loop` is a train_util.TrainLoop, or what is made like one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch as th

from .. import distributed
from ..checkpoints import checkpoint
from ..config import UserError
from ..fp16_util import unflatten_master_params
from ..logs import logger

REST = "improved_diffusion"  # the key of the optimizer's file that holds everything which is neither weights nor Adam's


def state_dict_of(loop: Any, params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
    """The model's state dict in float32 with the given master parameters, or averages, in place of its own."""
    if loop.precision != "fp32":
        params = unflatten_master_params(loop.model_params, params)
    state_dict = loop.model.state_dict()
    for (name, _), value in zip(loop.model.named_parameters(), params):
        state_dict[name] = value.detach()
    return state_dict


def parts_of(loop: Any, step: int, done: int) -> list[tuple[str, Any]]:
    """(file name, content in host memory) of everything that resuming needs; [] but on rank 0. Collective.

    :param step: the number in the files' names.
    :param done: the training steps done.
    """
    # Each rank has sums of its own, and added up in another order they would differ in the last bit.
    meters = distributed.all_gather_object(loop.meter.state_dict())
    if loop.rank != 0:
        return []
    description = {**loop.metadata, "step": done}
    parts: list[tuple[str, Any]] = [
        (checkpoint.model_name(step), checkpoint.describe(state_dict_of(loop, loop.master_params), description))
    ]
    for ema in loop.emas:
        described = checkpoint.describe(state_dict_of(loop, ema.params), {**description, **ema.description})
        parts.append((checkpoint.ema_name(ema.label, step), described))
    rest = {"step": done, "first_row": loop.first_row, "meters": meters, "unwritten_log": _numbers(logger.getkvs())}
    rest |= {name: part.state_dict() for name, part in _stateful(loop).items()}
    parts.append((checkpoint.optimizer_name(step), _to_host({**loop.opt.state_dict(), REST: rest})))
    return parts


def _stateful(loop: Any) -> dict[str, Any]:
    """What has a state besides the weights and the optimizer, by name."""
    candidates = {
        "loss_scale": loop.loss_scale,
        "schedule_sampler": loop.schedule_sampler,
        "bad_steps": loop.bad_steps,
        **{hook.name: hook for _, hook in loop.hooks if hasattr(hook, "name")},
    }
    return {name: part for name, part in candidates.items() if hasattr(part, "load_state_dict")}


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


def restore(loop: Any, main: str, named_step: int, metadata: Mapping[str, Any]) -> int:
    """Put back everything but the model's weights from the set of modelNNNNNN.pt; returns the steps done. Collective.

    :param metadata: the description in the model's file.
    What was restored is logged, part by part. Raises UserError for a part that is missing, damaged, of another step
    or of another model.
    """
    opt_path = _find(main, checkpoint.optimizer_name(named_step), "the optimizer's state")
    state = distributed.load_state_dict(opt_path, map_location="cpu")
    rest = state.get(REST, {}) if isinstance(state, dict) else {}
    done = rest.get("step", named_step)
    restored = [f"model: {main}"]
    _check_step(main, metadata, done, opt_path)
    for ema in loop.emas:
        path = _find(main, checkpoint.ema_name(ema.label, named_step), "the moving average")
        state_dict, of_ema = checkpoint.load(path)
        checkpoint.check_fits(loop.model, state_dict, path)
        _check_step(path, of_ema, done, opt_path)
        ema.load([state_dict[name].to(loop.device).float() for name, _ in loop.model.named_parameters()])
        restored.append(f"EMA {ema.label}: {path}")
    _load_optimizer(loop, state, opt_path)
    restored.append(f"optimizer: {opt_path}")
    for name, part in _stateful(loop).items():
        if name in rest:
            part.load_state_dict(rest[name])
            restored.append(f"{name.replace('_', ' ')}: in the same file")
        elif name not in ("bad_steps",):
            logger.warn(f"{opt_path} has no {name} (another kind of run saved it): that part starts afresh")
    loop.first_row = rest.get("first_row", done)
    _load_meter(loop, rest.get("meters", []))
    logger.logkvs(rest.get("unwritten_log", {}))
    restored.append(
        f"data: from step {done} on; log: from the row of step {loop.first_row} on, its sums in the same file"
    )
    logger.log(f"resumed after {done} steps\n" + "\n".join(f"  {line}" for line in restored))
    return done


def _find(main: str, name: str, what: str) -> str:
    return distributed.from_rank0(checkpoint.find_in_set, main, name, what)


def _check_step(path: str, metadata: Mapping[str, Any], done: int, opt_path: str) -> None:
    if metadata.get("step", done) != done:
        raise UserError(
            f"{path} is from step {metadata['step']}, but {opt_path} from step {done}: they are of different saves; "
            "resume from another checkpoint"
        )


def _load_optimizer(loop: Any, state: Any, path: str) -> None:
    try:
        groups = [{**group, **loop.opt_args, "lr": loop.lr} for group in state["param_groups"]]
        for index, entry in state["state"].items():  # a parameter without a gradient has none
            if index >= len(loop.master_params) or entry["exp_avg"].shape != loop.master_params[index].shape:
                raise ValueError("its shapes are those of another model or of another --precision")
        loop.opt.load_state_dict({"state": state["state"], "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit this run's optimizer: {error}") from None


def _load_meter(loop: Any, meters: Sequence[dict[str, th.Tensor]]) -> None:
    """Each rank gets its own sums back; of another number of ranks, rank 0 gets them all."""
    if len(meters) == distributed.get_world_size():
        loop.meter.load_state_dict(meters[loop.rank], loop.device)
    elif meters:
        share = 1.0 if loop.rank == 0 else 0.0
        total = {name: share * sum(meter[name] for meter in meters) for name in meters[0]}
        loop.meter.load_state_dict(total, loop.device)
