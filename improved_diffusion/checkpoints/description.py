"""What a checkpoint says of itself, checked when it is read: {"config": {...}, "class_names": [...], "step": n}."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config import UserError, shown
from ..config.messages import shorten
from ..config.model import MAX_CLASS_NAME, MAX_CLASSES
from ..utils import files

KEY = "improved_diffusion"  # of the description, beside the tensors
MAX_STEPS = 10**12
LARGEST = 2**63  # beyond whole numbers of options


def read_description(text: Any, path: str) -> dict[str, Any]:
    """The description in a checkpoint, from its JSON. The values of `config` are checked where they become options,
    but for numbers that are larger than any option's.

    Raises UserError, naming the file, for damaged JSON and for values that no run writes.
    """
    damaged = f"{path} holds a damaged description of its model"
    found = files.parse_json(text, f"{damaged}, which") if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise UserError(f"{damaged}: use another file")
    for name, (is_sound, expected) in _EXPECTED.items():
        if name in found and not is_sound(found[name]):
            raise UserError(f"{damaged}: {name} is {shown(found[name])}, expected {expected}: use another file")
    for name, value in found.get("config", {}).items():
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise UserError(f"{damaged}: {shorten(name)} is {shown(value)}: use another file")
    if max(found.get("seen_classes") or [-1]) >= len(found.get("class_names") or ()):
        raise UserError(f"{damaged}: seen_classes names classes that it does not have: use another file")
    return found


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_STEPS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_class_names(value: Any) -> bool:
    if value is None:
        return True
    names = isinstance(value, list) and all(isinstance(name, str) and len(name) <= MAX_CLASS_NAME for name in value)
    return names and 1 <= len(value) <= MAX_CLASSES


def _is_seen(value: Any) -> bool:
    return value is None or (isinstance(value, list) and value != [] and all(type(i) is int and i >= 0 for i in value))


def is_best(value: Any) -> bool:
    """Whether this is what validation notes of the best weights so far."""
    return (
        isinstance(value, dict)
        and value.keys() == {"val_loss", "step", "ema"}
        and _is_number(value["val_loss"])
        and _is_whole(value["step"])
        and isinstance(value["ema"], str)
    )


def _is_distilled(value: Any) -> bool:
    if not isinstance(value, dict) or not {"teacher_sha256", "method", "sampler", "steps"} <= value.keys():
        return False
    texts = [text for name, text in value.items() if name != "steps"]
    return all(isinstance(text, str) for text in texts) and _is_whole(value["steps"]) and value["steps"] > 0


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (lambda value: isinstance(value, dict), "options by their names"),
    "class_names": (_is_class_names, f"a list of up to {MAX_CLASSES:,} names, or null"),
    "seen_classes": (_is_seen, "a list of indices of classes, or null"),
    "step": (_is_whole, "a number of steps"),
    "num_images": (_is_whole, "a number of images"),
    "version": (lambda value: isinstance(value, str), "text"),
    "ema_rate": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "ema_sigma_rel": (lambda value: _is_number(value) and 0.001 <= value < 12**-0.5, "a number in [0.001, 0.2887)"),
    "posthoc": (lambda value: isinstance(value, bool), "true or false"),
    "best": (is_best, "val_loss, step and ema"),
    "distilled": (_is_distilled, "teacher, teacher_sha256, teacher_prediction, method, sampler and steps"),
}
