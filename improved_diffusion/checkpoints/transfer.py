"""Transfer learning: a new run that starts from the weights of another model, as far as they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch as th

from ..config import UserError, height_width
from ..config.settings import Settings
from ..logs import logger
from ..models.factories import attention_factors
from .dialects import refuse_foreign
from .loading import MODEL_OPTIONS, stored_options

S = TypeVar("S", bound=Settings)

_OF_THE_DATA = {"class_cond", "num_classes", "label_drop"}  # the new run's own, whatever the other model has
_CLASSES = "label_emb.weight"  # [classes, embedding]
_OUTPUTS = ("out.2.weight", "out.2.bias")  # the mean's channels, then those of a learned variance
_MOST_NAMED = 12


def take_network(
    settings: S, given: Iterable[str], path: str, state_dict: Mapping[str, th.Tensor], metadata: Mapping[str, Any]
) -> S:
    """The settings of a new run with the network and the diffusion of a checkpoint, where the user gave none.

    Classes are never taken. Attention stays on the same levels when the image size is another.
    Raises UserError for a checkpoint of another kind of model.
    """
    given = frozenset(given)
    if not metadata:
        refuse_foreign(state_dict, path)
    stored = stored_options(settings, given, path, state_dict, metadata)
    taken = {
        name: stored[name]
        for name in MODEL_OPTIONS
        if name in stored and name in settings.options() and name not in given | _OF_THE_DATA
    }
    before: Any = settings.model  # type: ignore[attr-defined]
    try:
        settings = settings.replace(**taken)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    now: Any = settings.model  # type: ignore[attr-defined]
    there = stored.get("image_size", stored.get("large_size", now.size))
    name = before.attention_option
    if name in taken and there != now.size:
        side = min(height_width(now.size))
        levels = [max(1, side // factor) for factor in attention_factors(there, taken[name])]
        settings = settings.replace(**{name: ",".join(map(str, dict.fromkeys(levels)))})
    if stored.get("class_cond") and not settings.values().get("class_cond", True):
        logger.warn(f"{path} has classes, the new model has none: give --class_cond True to keep them")
    return settings


def load_fitting(
    model: th.nn.Module, state_dict: Mapping[str, th.Tensor], path: str,
    classes: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
) -> None:  # fmt: skip
    """Copy what fits of a state dict into the model, and log what is new.

    Tensors of other shapes keep their initial values, but for the rows of classes with the same name, and for the mean
    where only one of the models has a learned variance.
    :param classes: the names of the checkpoint's classes and of the model's.
    Raises UserError where nothing fits.
    """
    own = model.state_dict()
    fitting, partly, new = {}, [], []
    for name, tensor in own.items():
        there = state_dict.get(name)
        if there is not None and there.shape == tensor.shape and not (name == _CLASSES and _renamed(classes)):
            fitting[name] = there
        elif there is not None and (rows := _common_rows(name, there, tensor, classes)):
            fitting[name] = tensor.clone()
            fitting[name][[new_row for _, new_row in rows]] = there[[row for row, _ in rows]].to(tensor)
            partly.append(f"{name} ({len(rows)} of {len(tensor)} rows)")
        else:
            new.append(name)
    if not fitting:
        raise UserError(f"{path}: none of its tensors fits the new network: check --num_channels and --channel_mult")
    model.load_state_dict(fitting, strict=False)
    left = [name for name in state_dict if name not in own]
    logger.log(f"weights of {path}, from step 0" + (f": {len(fitting)} of {len(own)} tensors fit" if new else ""))
    for what, names in (("in part", partly), ("new", new), ("not used", left)):
        if names:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            logger.log(f"{what}: {', '.join(names[:_MOST_NAMED])}{more}")
    share = sum(own[name].numel() for name in fitting) / sum(tensor.numel() for tensor in own.values())
    if share < 0.5:
        logger.warn(f"{path}: only {share:.0%} of the new network's parameters come from it")


def _renamed(classes: tuple[Sequence[str] | None, Sequence[str] | None]) -> bool:
    there, here = classes
    return bool(there and here and list(there) != list(here))


def _common_rows(
    name: str, there: th.Tensor, here: th.Tensor, classes: tuple[Sequence[str] | None, Sequence[str] | None]
) -> list[tuple[int, int]]:
    """(row there, row here) of the rows that mean the same in both tensors."""
    if there.ndim != here.ndim or there.shape[1:] != here.shape[1:]:
        return []
    if name == _CLASSES and classes[0] and classes[1]:
        rows = {label: row for row, label in enumerate(classes[0][: len(there)])}
        return [(rows[label], row) for row, label in enumerate(classes[1][: len(here)]) if label in rows]
    if name in _OUTPUTS and max(len(there), len(here)) == 2 * min(len(there), len(here)):
        return [(row, row) for row in range(min(len(there), len(here)))]
    return []
