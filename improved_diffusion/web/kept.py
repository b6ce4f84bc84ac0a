"""The files that the page keeps for its users: uploads, and what was drawn for them. Together they are bounded.

Nothing tells how many users there are, or who is one: so what was drawn first goes first, and where uploads alone fill
the place, further ones wait until Gradio, or the catalogue, has dropped those that nobody uses.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress

from ..config import UserError
from .state import AppState

DRAWN, MODELS = "drawn", "models"  # folders in the page's own
MOST_FILES = 100_000
NO_ROOM = "the page has no room for further files: try again in half an hour"


def new_folder(app_state: AppState, kind: str) -> str:
    """An empty folder for files of a kind: DRAWN or MODELS. Raises UserError where there is no room."""
    require_room(app_state)
    parent = os.path.join(app_state.work_dir, kind)
    try:
        os.makedirs(parent, exist_ok=True)
        return tempfile.mkdtemp(dir=parent)
    except OSError:
        raise UserError(NO_ROOM) from None


def require_room(app_state: AppState, coming: int = 0) -> None:
    """Remove what was drawn first, where the page keeps too much. Raises UserError where that does not help.

    :param coming: bytes of what is to be kept.
    """
    most = app_state.options.max_kept_mb * 10**6 - coming
    size, count = _size(app_state.work_dir)
    for folder in _oldest_first(os.path.join(app_state.work_dir, DRAWN)):
        if size <= most and count <= MOST_FILES:
            return
        freed, files = _size(folder)
        shutil.rmtree(folder, ignore_errors=True)
        size, count = size - freed, count - files
    if size > most or count > MOST_FILES:
        raise UserError(NO_ROOM)


def _oldest_first(parent: str) -> list[str]:
    found = []
    with suppress(OSError), os.scandir(parent) as entries:
        found = [(entry.stat().st_mtime, entry.path) for entry in entries]
    return [path for _, path in sorted(found)]


def _size(folder: str) -> tuple[int, int]:
    """(bytes, files) of a folder and those below it."""
    size = count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                size, count = size + os.lstat(os.path.join(parent, name)).st_size, count + 1
    return size, count
