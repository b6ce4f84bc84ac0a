"""What a run's folder says of the run, read while the run may be writing it. Whatever is missing or half written is
left out."""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from typing import Any

from PIL import Image

from ..config import UserError
from ..utils import files, images
from .commands import LONGEST_TAIL, end_of, tail

MOST_BYTES = 2**26  # of the rows that are read: the newest
MOST_POINTS = 400  # of a curve that is shown
_BY_QUARTER = re.compile(r".*_q[0-3]")
_PREVIEW = re.compile(r"step_(\d{6,15})(_raw)?\.png")


class Rows:
    """The numbers in a run's progress.jsonl. Each `read` reads what has been added since the last."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "progress.jsonl")
        self.file: tuple[int, int] | None = None  # device and inode
        self.position = 0
        self.columns: dict[str, tuple[array, array]] = {}  # name -> (steps, values)
        self.last: dict[str, float] = {}  # the newest row

    def read(self) -> None:
        """Read the whole lines that are new; all of them where the file was written again."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as f:
                found, size = os.fstat(f.fileno()), f.seek(0, os.SEEK_END)
                if (found.st_dev, found.st_ino) != self.file or size < self.position:
                    self.file, self.position = (found.st_dev, found.st_ino), max(size - MOST_BYTES, 0)
                    self.columns, self.last = {}, {}
                f.seek(self.position)
                lines = f.read(MOST_BYTES).rpartition(b"\n")[0]
        except OSError:
            return
        self.position += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            values = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
        except (ValueError, AttributeError, RecursionError):  # damaged
            return
        step = values.pop("step", math.nan)
        if not math.isfinite(step):
            return
        self.last = {"step": step, **values}
        for name, value in values.items():
            if math.isfinite(value) and not _BY_QUARTER.fullmatch(name):
                steps, column = self.columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                column.append(value)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column, at most MOST_POINTS of them with the newest; empty where there is none."""
        steps, values = self.columns.get(name, (array("d"), array("d")))
        every = -(-len(steps) // MOST_POINTS) or 1
        return list(steps[::-1][::every][::-1]), list(values[::-1][::every][::-1])


def read_settings(folder: str) -> dict[str, Any]:
    """The options in a run's config.json; {} where there is none, or a damaged one."""
    try:
        content = files.read_json(os.path.join(folder, "config.json"), files.MAX_TEXT_BYTES)
    except UserError:
        return {}
    config = content.get("config") if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}


def newest_previews(folder: str, count: int) -> list[str]:
    """The names of the newest pictures in `previews`, the newest step first, averages before the model itself."""
    try:
        names = os.listdir(os.path.join(folder, "previews"))
    except OSError:
        return []
    found = [(-int(match[1]), bool(match[2]), name) for name in names if (match := _PREVIEW.fullmatch(name))]
    return [name for _, _, name in sorted(found)[:count]]


def read_picture(path: str) -> Image.Image | None:
    """A PNG of a run; None where there is none, or a link, or something else."""
    try:
        files.require_plain(path)
        return images.to_image(images.decode_png(files.read_bytes(path, files.MAX_TEXT_BYTES)))
    except (UserError, ValueError):
        return None


def read_preview(folder: str, name: str) -> Image.Image | None:
    """A picture of `newest_previews`; None where it is gone, or no picture."""
    return read_picture(os.path.join(folder, "previews", name))


def caption(name: str) -> str:
    """What a preview shows, by its name."""
    match = _PREVIEW.fullmatch(name)
    step, raw = (int(match[1]), match[2]) if match else (0, None)
    return f"step {step:,}" + (", the model itself" if raw else "")


# How a run has ended

_STOPPED = re.compile(r"stopped by SIG\w+ .*")
_FINISHED = re.compile(r"training: 100% .*|--max_hours \S+ reached .*")
_STARTED = re.compile(r"total batch: .*")  # among the first lines of every start


def how_it_ended(text: str) -> tuple[str, str]:
    """("finished", "stopped" or "failed", why) by the last lines that a training has printed or logged."""
    lines = text.splitlines()
    if not lines:
        return "stopped", "its log is missing"
    for number in reversed(range(len(lines))):
        line = lines[number]
        if _STOPPED.fullmatch(line):
            return "stopped", line
        if line.startswith(("error: ", "interrupted", "Traceback ")):
            return "failed", end_of("\n".join(lines[number:]))
        if _FINISHED.fullmatch(line):
            return "finished", ""
        if _STARTED.fullmatch(line):
            break
    return "failed", (
        "the process ended without a message, as after a kill, for example by the out-of-memory killer: Resume "
        "continues from the last checkpoint"
    )


def newest_text(folder: str, console: str) -> str:
    """The end of what the run has printed last: into the file `console`, or into its log if that is newer."""
    paths = [os.path.join(folder, console), os.path.join(folder, "log.txt")]
    return tail(max(paths, key=_written), LONGEST_TAIL)


def _written(path: str) -> float:
    """When a file was written last; -1 where there is none."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return -1.0
