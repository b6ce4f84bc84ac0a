"""Reports side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import MAX_IMAGE_PIXELS, UserError
from ..utils import files, images
from .metrics.scores import METRICS
from .report import GRID_FILE, Metric, Report, direction, escape, number, title


def name_reports(paths: Sequence[str]) -> list[str]:
    """Short names for reports: their folders', or the paths where two folders have one name."""
    names = [os.path.basename(os.path.abspath(report_dir(path))) for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def report_dir(path: str) -> str:
    """The folder of a report, given as that or as its report.json."""
    return path if files.is_dir(path) else os.path.dirname(path) or "."


def comparison(reports: Sequence[Report], names: Sequence[str], mark_best: bool = False) -> str:
    """A table of the metrics, and of what differs in how they came about.

    :param names: of the reports. :param mark_best: print the best value of each metric bold, where they can be compared
        and it is better than every other by more than twice the standard error of their difference.
    """
    warnings = _incomparable(reports)
    lines = [line for warning in warnings for line in (f"Warning: {warning}.", "")]
    lines += [f"| | {' | '.join(map(escape, names))} |", "|---|" + "---|" * len(reports)]
    for name in METRICS:
        if any(name in report.metrics for report in reports):
            cells = [number(name, report.metrics[name]) if name in report.metrics else "" for report in reports]
            best = best_of(name, [report.metrics.get(name) for report in reports])
            if mark_best and not warnings and best is not None:
                cells[best] = f"**{cells[best]}**"
            lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    for key, row in _differences(reports):
        shown = [str(value)[:12] if key.endswith("sha256") and value else value for value in row]
        lines.append(f"| {escape(key)} | {' | '.join(map(escape, shown))} |")
    return "\n".join(lines) + "\n"


def best_of(name: str, metrics: Sequence[Metric | None]) -> int | None:
    """Which of several values of a metric is best; None where another one is as good, within two standard errors."""
    known = [(_badness(name, metric), metric.error or 0.0, i) for i, metric in enumerate(metrics) if metric is not None]
    if len(known) < 2:
        return None
    (least, error, best), *others = sorted(known)
    clear = all(each - least > 2 * math.hypot(error, its_error) for each, its_error, _ in others)
    return best if clear else None


def _badness(name: str, metric: Metric) -> float:
    """A number that is smaller for a better value."""
    if direction(name).startswith("lower"):
        return metric.value
    return -metric.value if direction(name).startswith("higher") else abs(metric.value - 0.5)


def _parts(report: Report) -> dict[str, Mapping[str, Any]]:
    return {
        "samples": report.samples,
        "reference": report.reference,
        "train": report.train or {},
        "held_out": report.held_out or {},
    }


def _differences(reports: Sequence[Report]) -> list[tuple[str, list[Any]]]:
    tables: list[dict[str, Any]] = []
    for report in reports:
        table = dict(report.samples.get("made_by") or {})
        for part, about in _parts(report).items():
            table |= {f"{part}: {key}": value for key, value in about.items() if key != "made_by"}
        tables.append(table)
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key) for table in tables]) for key in keys]
    return [(key, row) for key, row in rows if any(value != row[0] for value in row)]


def _incomparable(reports: Sequence[Report]) -> list[str]:
    """Why the numbers cannot be compared."""
    found = []
    for part, keys, what in (
        ("samples", ("features_sha256",), "different features"),
        ("samples", ("logits_sha256",), "inception scores of different classifiers"),
        ("samples", ("feature_size",), "images resized differently for the features"),
        ("samples", ("count",), "different numbers of samples, on which FID depends"),
        ("samples", ("lossy_files",), "some lossily compressed files and some that are not"),
        ("reference", ("pixels_sha256", "file_sha256"), "different references"),
        ("train", ("pixels_sha256",), "copy scores of different training images"),
        ("held_out", ("pixels_sha256",), "copy scores of different held-out images"),
    ):
        # Images have their own checksum, statistics their file's.
        values = [next(filter(None, map(_parts(report)[part].get, keys)), None) for report in reports]
        if any(value != values[0] for value in values):
            found.append(f"the reports are of {what}: their numbers cannot be compared")
    return found


def write_comparison(out_dir: str, reports: Sequence[Report], names: Sequence[str], folders: Sequence[str]) -> str:
    """Write compare.md, and compare.png with the grids of samples side by side; returns the path of the text.

    :param folders: of the reports, where their pictures are. Without one of the grids there is no picture.
    """
    files.make_dirs(out_dir)
    path = files.join(out_dir, "compare.md")
    text = comparison(reports, names)
    grids = [files.join(folder, GRID_FILE) for folder in folders]
    if all(map(files.exists, grids)):
        picture = _side_by_side([_read_grid(grid) for grid in grids], grids)
        files.write_bytes(files.join(out_dir, "compare.png"), images.encode_png(picture))
        text += f"\n![samples, side by side](compare.png)\n\nFrom left to right: {', '.join(map(escape, names))}.\n"
    files.write_bytes(path, f"# Comparison\n\n{text}".encode(errors="replace"))
    return path


def _side_by_side(arrays: Sequence[np.ndarray], paths: Sequence[str]) -> np.ndarray:
    height, width = (max(array.shape[axis] for array in arrays) for axis in range(2))
    if len(arrays) * height * width > MAX_IMAGE_PIXELS:
        largest, path = max(zip(arrays, paths), key=lambda pair: max(pair[0].shape))
        raise UserError(
            f"{path} is {largest.shape[1]} x {largest.shape[0]}, too large for pictures side by side: remove it to "
            "compare without pictures, or write the report again"
        )
    pages = np.full((len(arrays), height, width, 3), 255, np.uint8)
    for page, array in zip(pages, arrays):
        page[: array.shape[0], : array.shape[1]] = array
    return images.grid(pages, len(pages), border=8)


def _read_grid(path: str) -> np.ndarray:
    """uint8 [H, W, 3] of a report's picture, on white."""
    try:
        picture = images.to_image(images.decode_png(files.read_bytes(path)))
    except ValueError:
        raise UserError(
            f"{path} is damaged: remove it to compare without pictures, or write the report again"
        ) from None
    return images.to_array(images.opaque(picture), 3)
