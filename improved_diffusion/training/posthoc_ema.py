"""Moving averages of any length, made after training from the snapshots of a run's power-function averages."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from ..checkpoints import checkpoint
from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from ..utils import files
from .ema import gamma_of, posthoc_weights, profile_error

LARGEST_ERROR = 0.05  # relative error of a profile above which a warning says that the average is not the wanted one

_SNAPSHOT = re.compile(r"ema_sigma_rel([^_]+)_(\d+)\.pt")


@dataclass(frozen=True)
class Snapshot:
    """A stored power-function average."""

    path: str
    number: int  # in the file's name
    step: int  # training steps done
    gamma: float
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """An average to make: the weights of the snapshots, and the relative error of their profile."""

    sigma_rel: float
    weights: np.ndarray  # [number of snapshots]
    error: float


def rebuild(run_dir: str, widths: Sequence[float], number: int = -1) -> list[str]:
    """Write the average of each relative width beside the snapshots; returns the paths.

    :param number: in the file names of the newest snapshots to use; -1: the newest in the folder.
    Memory: two models for each width, and two more. Raises UserError where the folder has no such snapshots, and for
    one that is damaged or of another model.
    """
    snapshots = find_snapshots(run_dir, number)
    newest = max(snapshots, key=lambda snapshot: snapshot.step)
    recipes = [_recipe(snapshots, newest.step, width) for width in widths]
    averages = weighted_sums([s.path for s in snapshots], [recipe.weights for recipe in recipes], newest.path)
    paths = []
    for recipe, average in zip(recipes, averages):
        path = files.join(run_dir, checkpoint.ema_name(f"posthoc_sigma_rel{recipe.sigma_rel}", newest.number))
        own = {"ema_sigma_rel": recipe.sigma_rel, "posthoc": True, "step": newest.step}
        checkpoint.save_state_dict(average, path, {**newest.metadata, **own})
        logger.log(f"wrote {path}: {len(snapshots)} snapshots, error of the profile {100 * recipe.error:.2g} %")
        paths.append(path)
    return paths


def _recipe(snapshots: Sequence[Snapshot], step: int, sigma_rel: float) -> Recipe:
    steps, gammas = [s.step for s in snapshots], [s.gamma for s in snapshots]
    weights = posthoc_weights(steps, gammas, step, gamma_of(sigma_rel))
    error = profile_error(steps, gammas, weights, step, gamma_of(sigma_rel))
    if error > LARGEST_ERROR:
        logger.warn(
            f"{len(snapshots)} snapshots up to step {step} represent sigma_rel {sigma_rel} to {100 * error:.2g} %: "
            "the result has another length; choose a width nearer to the stored ones, or save more often in training"
        )
    return Recipe(sigma_rel, weights, error)


# Finding


def find_snapshots(run_dir: str, number: int = -1) -> list[Snapshot]:
    """The snapshots in a folder up to the given number in their names, in that order.

    Of local files only the descriptions are read. Raises UserError where there are none, or none of that number.
    """
    if not run_dir:
        raise UserError("--run_dir is missing: name the folder of a run trained with --ema_sigma_rel 0.05,0.10")
    if not files.is_dir(run_dir):
        raise UserError(
            f"--run_dir {run_dir} is not a folder: name that of a run trained with --ema_sigma_rel 0.05,0.10"
        )
    matches = [match for match in map(_SNAPSHOT.fullmatch, files.list_dir(run_dir)) if match]
    if not matches:
        raise UserError(f"{run_dir} holds no ema_sigma_rel*.pt: train with --ema_sigma_rel 0.05,0.10 to have snapshots")
    numbers = sorted({int(match.group(2)) for match in matches})
    if number == -1:
        number = numbers[-1]
    if number not in numbers:
        nearest = sorted(numbers, key=lambda other: abs(other - number))[:2]
        raise UserError(
            f"--step {number}: {run_dir} has no snapshot of that number, from {numbers[0]} to {numbers[-1]}; "
            f"nearest: {', '.join(map(str, sorted(nearest)))}"
        )
    found = [(match.group(), int(match.group(2))) for match in matches if int(match.group(2)) <= number]
    bar = Progress("reading descriptions", len(found), "snapshot")
    snapshots: list[Snapshot] = []
    for name, its_number in found:
        snapshots.append(_read_description(files.join(run_dir, name), its_number))
        _check_alike(snapshots[0], snapshots[-1])
        bar.update(1)
    bar.close()
    return sorted(snapshots, key=lambda snapshot: (snapshot.number, snapshot.gamma))


def _read_description(path: str, number: int) -> Snapshot:
    shapes, metadata = checkpoint.read_outline(path)
    step, width = metadata.get("step"), metadata.get("ema_sigma_rel")
    if not step or not width:
        raise UserError(f"{path} lacks the step and width that training with --ema_sigma_rel writes: move it elsewhere")
    return Snapshot(path, number, step, gamma_of(width), shapes, metadata)


def _check_alike(first: Snapshot, other: Snapshot) -> None:
    for name in [*first.shapes, *other.shapes]:
        if first.shapes.get(name) != other.shapes.get(name):
            raise UserError(
                f"{first.path} and {other.path} are of different models: {name} is {first.shapes.get(name, 'missing')} "
                f"in one and {other.shapes.get(name, 'missing')} in the other; keep each run in a folder of its own"
            )


# Summing


def weighted_sums(
    paths: Sequence[str], weights: Sequence[np.ndarray], newest_path: str
) -> Iterator[dict[str, th.Tensor]]:
    """The weighted sums of the files' state dicts, in the files' types, one for each row of weights.

    Each file is read once, one at a time. Tensors that are not floating-point come from `newest_path`.
    """
    sums: list[dict[str, th.Tensor]] = [{} for _ in weights]
    newest: dict[str, th.Tensor] = {}
    bar = Progress("summing", len(paths), "snapshot")
    for i, path in enumerate(paths):
        state_dict, _ = checkpoint.load(path)
        for total, row in zip(sums, weights):
            _add(total, state_dict, float(row[i]))
        if path == newest_path:
            newest = state_dict
        bar.update(1)
    bar.close()
    for total in sums:
        result = copy.copy(newest)  # with the layers' versions, which torch keeps beside the tensors
        for name in list(total):
            result[name] = total.pop(name).to(newest[name].dtype)
        yield result


def _add(total: dict[str, th.Tensor], state_dict: Mapping[str, th.Tensor], weight: float) -> None:
    """total += weight * state_dict, in float64: thousands of weights of both signs cancel."""
    for name, value in state_dict.items():
        if value.is_floating_point():
            if name not in total:
                total[name] = th.zeros(value.shape, dtype=th.float64)
            total[name].add_(value, alpha=weight)
