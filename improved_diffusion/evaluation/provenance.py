"""How samples were made: what lies beside them, and what it implies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..sampling.solvers import RULES
from ..sampling.writer import PNG_DIR, REQUEST_FILE
from ..utils import files


def made_by(path: str) -> dict[str, Any] | None:
    """What samples.json says about the samples in a folder or an npz that was written with it; None without one.

    Raises UserError for a damaged one.
    """
    folder, name = os.path.split(files.full_path(path).rstrip("/"))
    if not (name == PNG_DIR or re.fullmatch(r"samples_[\dx]+\.npz", name)):
        return None
    beside = files.join(folder, REQUEST_FILE)
    if not files.exists(beside):
        return None
    request = files.read_record(beside, "remove it, if the report need not say how the samples were made")
    return {**request, **implied_by(request)}


def implied_by(request: Mapping[str, Any]) -> dict[str, Any]:
    """The average and the network evaluations that a request of samples implies."""
    found: dict[str, Any] = {}
    name = os.path.basename(str(request.get("model_path", "")))
    if match := re.fullmatch(r"ema_(.+)_(\d+)\.pt", name):
        found["average"] = match.group(1)
    elif re.fullmatch(r"model\d+\.pt", name):
        found["average"] = "none: the model itself"
    sampler, steps = request.get("sampler"), request.get("steps")
    if isinstance(sampler, str) and sampler in RULES and type(steps) is int:
        found["evaluations"] = RULES[sampler]().evaluations(steps)
    return found


def samples_dir(path: str) -> str:
    """The folder of images in a folder of samples; any other path as it is."""
    is_run = files.is_dir(path) and files.exists(files.join(path, REQUEST_FILE))
    return files.join(path, PNG_DIR) if is_run else path  # beside which there are other pictures


def report_folder(path: str) -> str:
    """The default folder of the report on given samples: beside them, or in ./runs if they are behind a URL."""
    path = path if files.is_url(path) else os.path.realpath(path)
    stem = os.path.splitext(path.rstrip("/"))[0] if not files.is_dir(path) else path.rstrip("/")
    return f"{os.path.join('runs', os.path.basename(stem)) if files.is_url(path) else stem}_report"
