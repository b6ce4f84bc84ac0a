"""What a few of the images say of all: their size, and whether they are grey."""

from __future__ import annotations

import statistics
from typing import Any

from PIL import Image

from ..config import UserError
from ..config.recipes import Survey
from .dataset import quiet, selection

LOOKED_AT = 24  # images
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}


def survey(source: Any, data_dir: str) -> Survey:
    """The survey of a collection of data.sources. Raises UserError where none of the images looked at is readable."""
    with quiet():
        seen = [image for image in (_read(source, int(i)) for i in selection(len(source), LOOKED_AT)) if image]
    if not seen:
        raise UserError(f"--data_dir {data_dir}: none of {min(len(source), LOOKED_AT)} images looked at is readable")
    side = statistics.median_low(min(image.size) for image in seen)
    return Survey(len(source), side, all(image.mode in _GREY for image in seen))


def _read(source: Any, i: int) -> Image.Image | None:
    try:
        return source.read(i)
    except Exception:  # Pillow and zipfile raise many kinds; the check of all images names the unreadable ones
        return None
