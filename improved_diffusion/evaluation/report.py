"""What an evaluation found, for people and for programs: report.md, report.json and pictures; several side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import UserError
from ..utils import files, images
from ..utils.figures import new_figure, png_of
from .metrics.scores import METRICS

JSON_FILE, TEXT_FILE = "report.json", "report.md"
GRID_FILE, NEIGHBOURS_FILE, DISTANCES_FILE = "report_samples.png", "report_neighbours.png", "report_distances.png"
SHOWN_SAMPLES = 100  # in the grid
SHOWN_COPIES, SHOWN_NEIGHBOURS = 10, 5  # rows and columns of the picture of the nearest training images
GAP = 16  # pixels between a sample and its neighbours
EXPLAINED = {
    "fid": "lower is better, and larger for fewer images: Fréchet distance of Gaussians (Heusel et al. 2017)",
    "sfid": "lower is better: the same of spatial features (Nash et al. 2021)",
    "kid": "lower is better, near 0 as real: unbiased kernel distance, all pairs (Binkowski et al. 2018); ± jackknife",
    "inception_score": "higher is better: Salimans et al. 2016; ± deviation over ten parts",
    "precision": "higher is better: share of the samples that look real (Kynkäänniemi et al. 2019, k = 3)",
    "recall": "higher is better: share of the real images that samples come near to (the same)",
    "density": "higher is better, 1 as real: how many real images a sample lies near to (Naeem et al. 2020, k = 5)",
    "coverage": "higher is better: share of the real images with a sample nearby (the same)",
    "copies": "0.5 is best: chance that a sample lies nearer to the training images than a held-out image does (Meehan "
    "et al. 2020); towards 1 they are copied, towards 0 samples are unlike any",
}
# What is said of how samples were made, in this order, where it is known.
MADE_BY = (
    "model_path", "model_sha256", "model_step", "average", "sampler", "steps", "evaluations", "timesteps", "seed",
    "guidance_scale", "guide_sha256", "classifier_sha256", "classifier_scale", "classes", "clip_denoised", "precision",
)  # fmt: skip


def factor(name: str) -> int:
    """What a metric's value and error are shown times."""
    return 1000 if name == "kid" else 1


def number(name: str, metric: Mapping[str, float]) -> str:
    """A metric's value and error as text."""
    text = f"{factor(name) * metric['value']:.4f}"
    return text + (f" ± {factor(name) * metric['error']:.4f}" if "error" in metric else "")


def title(name: str) -> str:
    """What a metric is called beside its `number`."""
    return METRICS[name] + (f" x {factor(name)}" if factor(name) > 1 else "")


def direction(name: str) -> str:
    """Which way a metric is better."""
    return EXPLAINED[name].partition(":")[0].partition(",")[0]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as text."""
    samples, reference = report["samples"], report["reference"]
    lines = [
        "# Evaluation",
        "",
        f"{samples['count']:,} samples, {samples['images']},",
        f"against {_count(reference)}, {reference.get('name') or reference['images']}.",
        *_metrics(report),
    ]
    for warning in report["warnings"]:
        lines += ["", f"**Warning:** {warning}."]
    lines += ["", f"![samples]({GRID_FILE})", "", f"{min(SHOWN_SAMPLES, samples['count'])} of the samples, by chance."]
    if report["pictures"].get("neighbours"):
        lines += [
            "", f"![nearest training images]({NEIGHBOURS_FILE})", "",
            "Left, the samples that lie nearest to a training image; right, the training images nearest to each in "
            "these features. Copies would be here.",
        ]  # fmt: skip
    if report["pictures"].get("distances"):
        lines += ["", f"![distances to the training images]({DISTANCES_FILE})"]
    lines += ["", "## What was compared", "", "| | samples | reference |", "|---|---|---|"]
    keys = [key for key in dict.fromkeys([*samples, *reference]) if key != "made_by"]
    lines += [f"| {key} | {_cell(samples.get(key))} | {_cell(reference.get(key))} |" for key in keys]
    for name, what in (("train", "Training images"), ("held_out", "Held-out images")):
        if report[name]:
            where = "those of the reference" if report[name] == reference else report[name]["images"]
            lines += ["", f"{what}: {report[name]['count']:,}, {where}."]
    lines += ["", "## How the samples were made", "", *_made_by(samples.get("made_by"))]
    lines += ["", ", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    return "\n".join(lines) + "\n"


def _metrics(report: Mapping[str, Any]) -> list[str]:
    real = report["real"]
    columns = ["metric", f"{report['samples']['count']:,} samples", ""]
    if real:
        columns.insert(2, f"{real['count']:,} held-out real images")
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, metric in report["metrics"].items():
        cells = [number(name, metric)]
        if real:
            cells.append(number(name, real["metrics"][name]) if name in real["metrics"] else "")
        lines.append(f"| {title(name)} | {' | '.join(cells)} | {EXPLAINED[name]} |")
    for name, why in report["missing"].items():
        lines += ["", f"No {title(name)}: {why}."]
    return lines


def _made_by(made_by: Mapping[str, Any] | None) -> list[str]:
    if not made_by:
        return ["Not known: no samples.json lies beside them."]
    rest = sorted(key for key in made_by if key not in MADE_BY)
    keys = [key for key in (*MADE_BY, *rest) if key in made_by]
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(made_by[key])} |" for key in keys)]


def _count(about: Mapping[str, Any]) -> str:
    return f"{about['count']:,} real images" if "count" in about else "statistics of real images"


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


class Neighbours(NamedTuple):
    """Samples uint8 [R, H, W, C], and the K training images nearest to each, [R, K, H, W, C]."""

    samples: np.ndarray
    train: np.ndarray

    def picture(self) -> np.ndarray:
        """Each sample, and right of it its neighbours, uint8 [H', W', C]."""
        left = images.grid(self.samples, 1, min_side=images.SHOWN_SIDE)
        right = images.grid(
            self.train.reshape(-1, *self.train.shape[2:]), self.train.shape[1], min_side=images.SHOWN_SIDE
        )
        gap = np.full((len(left), GAP, left.shape[2]), 255, np.uint8)
        return np.concatenate([left, gap, right], axis=1)


def write(
    out_dir: str,
    report: Mapping[str, Any],
    samples: np.ndarray,
    neighbours: Neighbours | None = None,
    distances: tuple[np.ndarray, np.ndarray] | None = None,
) -> str:
    """Write report.json, report.md and pictures, all or none; returns the path of report.md.

    :param samples: uint8 [N, H, W, C]; :param distances: as for `plot_distances`.
    """
    contents = {GRID_FILE: images.encode_png(images.grid(samples, 10, min_side=images.SHOWN_SIDE))}
    if neighbours is not None:
        contents[NEIGHBOURS_FILE] = images.encode_png(neighbours.picture())
    if distances is not None:
        contents[DISTANCES_FILE] = png_of(plot_distances(*distances))
    contents[TEXT_FILE] = markdown(report).encode(errors="replace")
    contents[JSON_FILE] = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    files.write_together((files.join(out_dir, name), content) for name, content in contents.items())
    for name in {NEIGHBOURS_FILE, DISTANCES_FILE} - contents.keys():  # those of an earlier report
        files.remove(files.join(out_dir, name))
    return files.join(out_dir, TEXT_FILE)


def plot_distances(samples: np.ndarray, held_out: np.ndarray) -> Any:
    """A figure with histograms of two sets' distances to the training images."""
    figure = new_figure((7, 4))
    axes = figure.subplots()
    low = min(samples.min(), held_out.min())
    high = max(np.quantile(values, 0.999) for values in (samples, held_out))
    bins = np.linspace(low, high if high > low else low + 1, 30).tolist()
    for values, label in ((samples, "samples"), (held_out, "held-out images")):
        label = f"{label} (median {np.median(values):.3g})"
        axes.hist(values, bins, density=True, histtype="step", linewidth=1.5, label=label)
    axes.set_xlabel("distance to the nearest training image, in the features")
    axes.set_ylabel("density")
    axes.legend()
    return figure


# Several side by side


def read(path: str) -> dict[str, Any]:
    """A report.json, or that of the folder. Raises UserError for a file that is not one."""
    path = files.join(path, JSON_FILE) if files.is_dir(path) else path
    if not files.exists(path):
        raise UserError(
            f"{path} does not exist: name a folder in which evaluate.py has written a report, or its report.json"
        )
    try:
        report = json.loads(files.read_bytes(path))
        markdown(report)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a report of evaluate.py, or damaged: write it again") from None
    return {**report, "folder": os.path.dirname(path) or "."}


def comparison(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Reports side by side: metrics, and what differs in how they came about."""
    lines = [line for warning in _incomparable(reports) for line in (f"Warning: {warning}.", "")]
    lines += [f"| | {' | '.join(map(_cell, names))} |", "|---|" + "---|" * len(reports)]
    for name in METRICS:
        if any(name in report["metrics"] for report in reports):
            cells = [number(name, report["metrics"][name]) if name in report["metrics"] else "" for report in reports]
            lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    for key, row in _differences(reports):
        shown = [value[:12] if key.endswith("sha256") and value else value for value in row]
        lines.append(f"| {key} | {' | '.join(map(_cell, shown))} |")
    return "\n".join(lines) + "\n"


def _differences(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    tables: list[dict[str, Any]] = []
    for report in reports:
        table = dict(report["samples"].get("made_by") or {})
        for part in ("samples", "reference", "train", "held_out"):
            table |= {f"{part}: {key}": value for key, value in (report[part] or {}).items() if key != "made_by"}
        tables.append(table)
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key) for table in tables]) for key in keys]
    return [(key, row) for key, row in rows if any(value != row[0] for value in row)]


def _incomparable(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the numbers those of different measurements."""
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
        # Of images their own checksum, of statistics the file's.
        values = [next(filter(None, map((report[part] or {}).get, keys)), None) for report in reports]
        if any(value != values[0] for value in values):
            found.append(f"the reports are of {what}: their numbers cannot be compared")
    return found


def write_comparison(out_dir: str, reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Write compare.md, and compare.png with the grids of samples side by side; returns the path of the text."""
    files.make_dirs(out_dir)
    path = files.join(out_dir, "compare.md")
    text = comparison(reports, names)
    grids = [files.join(report["folder"], GRID_FILE) for report in reports]
    if all(map(files.exists, grids)):
        arrays = [_read_grid(grid) for grid in grids]
        channels = max(array.shape[2] for array in arrays)
        height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
        pages = np.full((len(arrays), height, width, channels), 255, np.uint8)
        for page, array in zip(pages, arrays):
            page[: array.shape[0], : array.shape[1]] = array
        files.write_bytes(
            files.join(out_dir, "compare.png"), images.encode_png(images.grid(pages, len(pages), border=8))
        )
        text += f"\n![samples, side by side](compare.png)\n\nFrom left to right: {', '.join(names)}.\n"
    files.write_bytes(path, f"# Comparison\n\n{text}".encode(errors="replace"))
    return path


def _read_grid(path: str) -> np.ndarray:
    try:
        return images.decode_png(files.read_bytes(path))
    except ValueError:
        raise UserError(
            f"{path} is damaged: remove it to compare without pictures, or write the report again"
        ) from None
