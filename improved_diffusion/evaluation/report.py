"""The report of an evaluation: metrics with their errors, how they came about, and pictures; as text and as JSON."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..config import UserError, shown
from ..logs import logger
from ..utils import files, images
from ..utils.figures import new_figure, png_of
from . import loss_floor_plot
from .loss_floor import FloorReport
from .metrics.scores import METRICS

JSON_FILE, TEXT_FILE = "report.json", "report.md"
GRID_FILE, NEIGHBOURS_FILE, DISTANCES_FILE = "report_samples.png", "report_neighbours.png", "report_distances.png"
LOSS_FILE = "report_loss.png"
_PLOTS = {"distances": DISTANCES_FILE, "loss": LOSS_FILE}  # what needs matplotlib, by its name in `shown`
_NONE: Mapping[str, str] = MappingProxyType({})
SHOWN_SAMPLES = 100  # in the grid
SHOWN_COPIES, SHOWN_NEIGHBOURS = 10, 5  # rows and columns of the picture of the nearest training images
LONGEST_CELL = 1000  # of a value from a file, in characters
GAP = 16  # pixels between a sample and its neighbours
EXPLAINED = {
    "fid": "lower is better, biased upwards for fewer images: Fréchet distance of Gaussians (Heusel et al. 2017)",
    "sfid": "lower is better: the same for spatial features (Nash et al. 2021)",
    "kid": "lower is better, about 0 for real images: unbiased kernel distance over all pairs (Binkowski et al. 2018); "
    "± jackknife",
    "inception_score": "higher is better: Salimans et al. 2016; ± standard deviation over ten parts",
    "precision": "higher is better: share of samples that look real (Kynkäänniemi et al. 2019, k = 3)",
    "recall": "higher is better: share of real images that the samples cover (same paper)",
    "density": "higher is better, about 1 for real images: number of real images near a sample, normalised (Naeem et "
    "al. 2020, k = 5)",
    "coverage": "higher is better: share of real images with a sample nearby (same paper)",
    "copies": "0.5 is best: probability that a sample is nearer to the training images than a held-out image is "
    "(Meehan et al. 2020); near 1: training images are copied, near 0: samples are unlike any of them",
}
# How samples were made: known keys, in this order.
MADE_BY = (
    "model_path", "model_sha256", "model_step", "average", "sampler", "steps", "evaluations", "timesteps", "seed",
    "guidance_scale", "guide_sha256", "classifier_sha256", "classifier_scale", "classifier_guidance",
    "classes", "clip_denoised", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A number and its standard error; of the inception score the standard deviation over ten parts; None: no error."""

    value: float
    error: float | None = None

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")

    def scaled(self, factor: float) -> Metric:
        """The metric times a factor."""
        return Metric(factor * self.value, None if self.error is None else factor * self.error)

    def to_dict(self) -> dict[str, float]:
        """`value`, and `error` where there is one."""
        return {"value": self.value} if self.error is None else {"value": self.value, "error": self.error}


def factor(name: str) -> int:
    """What a metric is multiplied by where it is shown: KID is shown times 1000, as in the literature."""
    return 1000 if name == "kid" else 1


def number(name: str, metric: Metric) -> str:
    """A metric's value and error as text."""
    return str(metric.scaled(factor(name)))


def title(name: str) -> str:
    """A metric's name beside its `number`."""
    return METRICS[name] + (f" x {factor(name)}" if factor(name) > 1 else "")


def direction(name: str) -> str:
    """Which values of a metric are better."""
    return EXPLAINED[name].partition(":")[0].partition(",")[0]


class Neighbours(NamedTuple):
    """Samples uint8 [R, H, W, C], and the K training images nearest to each, [R, K, H, W, C]."""

    samples: np.ndarray
    train: np.ndarray

    def picture(self) -> np.ndarray:
        """Each sample with its neighbours to the right, uint8 [H', W', C]."""
        left = images.grid(self.samples, 1, min_side=images.SHOWN_SIDE)
        right = images.grid(
            self.train.reshape(-1, *self.train.shape[2:]), self.train.shape[1], min_side=images.SHOWN_SIDE
        )
        gap = np.full((len(left), GAP, left.shape[2]), 255, np.uint8)
        return np.concatenate([left, gap, right], axis=1)


@dataclass(frozen=True)
class Pictures:
    """What a report shows besides numbers."""

    samples: np.ndarray  # uint8 [N, H, W, C]
    neighbours: Neighbours | None = None
    distances: tuple[np.ndarray, np.ndarray] | None = None  # of samples [N] and held-out images [K], to training images
    loss: FloorReport | None = None  # of the model on its training images

    def encode(self) -> tuple[dict[str, bytes], dict[str, str]]:
        """(the PNG of each, by its file's name; why a plot could not be drawn, by its file's name)."""
        found = {GRID_FILE: images.encode_png(images.grid(self.samples, 10, min_side=images.SHOWN_SIDE))}
        if self.neighbours is not None:
            found[NEIGHBOURS_FILE] = images.encode_png(self.neighbours.picture())
        plots: dict[str, tuple[Any, ...]] = {}
        if self.distances is not None:
            plots[DISTANCES_FILE] = (plot_distances, *self.distances)
        if self.loss is not None:
            plots[LOSS_FILE] = (loss_floor_plot.figure_of, self.loss)
        undrawn: dict[str, str] = {}
        for name, plot in plots.items():
            try:
                found[name] = png_of(*plot)
            except UserError as error:
                logger.warn(f"no {name}: {error}")
                undrawn[name] = str(error)
        return found, undrawn


@dataclass(frozen=True)
class Real:
    """The scores of held-out real images, as many as the samples where there are as many."""

    count: int
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Each metric is an attribute, None where it could not be computed; `missing` says why. `samples`, `reference`,
    `train` and `held_out` describe the sets. `loss` is the model's on its training images, as FloorReport.to_dict gives
    it, where it was asked for. `pictures` is None in a report read from disk, and on ranks but 0.
    """

    fid: Metric | None = None
    sfid: Metric | None = None
    kid: Metric | None = None
    inception_score: Metric | None = None
    precision: Metric | None = None
    recall: Metric | None = None
    density: Metric | None = None
    coverage: Metric | None = None
    copies: Metric | None = None
    samples: Mapping[str, Any]
    reference: Mapping[str, Any]
    train: Mapping[str, Any] | None = None
    held_out: Mapping[str, Any] | None = None
    real: Real | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    loss: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    pictures: Pictures | None = field(default=None, repr=False, compare=False)
    shown: Mapping[str, bool] = field(default_factory=dict, repr=False)  # which of the pictures lie beside the text

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that could be computed, by name, in the order of METRICS."""
        return {name: getattr(self, name) for name in METRICS if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        real = self.real and {"count": self.real.count, "metrics": _as_dicts(self.real.metrics)}
        return {
            "samples": dict(self.samples),
            "reference": dict(self.reference),
            "train": self.train and dict(self.train),
            "held_out": self.held_out and dict(self.held_out),
            "metrics": _as_dicts(self.metrics),
            "real": real,
            "missing": dict(self.missing),
            "warnings": list(self.warnings),
            "pictures": dict(self.shown),
            "asked": dict(self.asked),
            "versions": dict(self.versions),
            **({} if self.loss is None else {"loss": dict(self.loss)}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """The report whose `to_dict` this is. Raises KeyError, TypeError or ValueError for anything else."""
        real = content["real"]
        return cls(
            **_as_metrics(content["metrics"]),
            samples=checked_about(content["samples"]),
            reference=checked_about(content["reference"]),
            train=content["train"] and checked_about(content["train"]),
            held_out=content["held_out"] and checked_about(content["held_out"]),
            real=Real(_as_count(real["count"]), _as_metrics(real["metrics"])) if real else None,
            missing={name: _as_text(why) for name, why in content["missing"].items()},
            loss=checked_loss(content["loss"]) if content.get("loss") else None,
            warnings=tuple(map(_as_text, list(content["warnings"]))),
            asked=dict(content["asked"]),
            versions={name: _as_text(version) for name, version in content["versions"].items()},
            shown={name: bool(shown) for name, shown in content["pictures"].items()},
        )

    def without_pictures(self) -> Report:
        """The numbers and texts only."""
        return replace(self, pictures=None)

    def markdown(self, pictures: bool = True, undrawn: Mapping[str, str] = _NONE) -> str:
        """The report as text.

        :param pictures: refer to the files of its pictures.
        :param undrawn: why there is no plot, by its file's name.
        """
        lines = [
            "# Evaluation",
            "",
            f"{_count(self.samples['count'])} samples, {escape(self.samples['images'])},",
            f"against {_real_images(self.reference)}, {_name_of(self.reference)}.",
            *self._table_of_metrics(),
        ]
        for warning in self.warnings:
            lines += ["", f"**Warning:** {escape(warning)}."]
        if pictures:
            lines += self._pictures()
        for name, why in undrawn.items():
            lines += ["", f"No {name}: {escape(why)}."]
        lines += self._loss_by_noise()
        lines += ["", "## What was compared", "", "| | samples | reference |", "|---|---|---|"]
        keys = [key for key in dict.fromkeys([*self.samples, *self.reference]) if key != "made_by"]
        lines += [f"| {escape(k)} | {escape(self.samples.get(k))} | {escape(self.reference.get(k))} |" for k in keys]
        for about, what in ((self.train, "Training images"), (self.held_out, "Held-out images")):
            if about:
                where = "those of the reference" if about == self.reference else escape(about["images"])
                lines += ["", f"{what}: {_count(about['count'])}, {where}."]
        lines += ["", "## How the samples were made", "", *_made_by(self.samples.get("made_by"))]
        lines += ["", ", ".join(f"{escape(name)} {escape(version)}" for name, version in self.versions.items())]
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown(pictures=False)

    def _pictures(self) -> list[str]:
        shown = min(SHOWN_SAMPLES, self.samples["count"])
        lines = ["", f"![samples]({GRID_FILE})", "", f"{shown} of the samples, selected at random."]
        if self.shown.get("neighbours"):
            lines += [
                "", f"![nearest training images]({NEIGHBOURS_FILE})", "",
                "Left: the samples that are nearest to a training image in the features. Right: the training images "
                "nearest to each. Copies would be shown here.",
            ]  # fmt: skip
        if self.shown.get("distances"):
            lines += ["", f"![distances to the training images]({DISTANCES_FILE})"]
        if self.shown.get("loss"):
            lines += ["", f"![loss on the training images and its floor]({LOSS_FILE})"]
        return lines

    def _loss_by_noise(self) -> list[str]:
        if self.loss is None:
            return []
        target = self.loss["target"]
        lines = [
            "", "## The loss on the training images", "",
            f"Squared error of {escape(target)} by timestep, on {_count(self.loss['images'])} training images, and "
            "its floor: the least that any model can have on them.",
            "", "| timesteps | loss | floor | above the floor |", "|---|---|---|---|",
        ]  # fmt: skip
        for level in self.loss["levels"]:
            first, last = level["timesteps"]
            found = [level[target][name] for name in ("loss", "floor", "excess")]
            means = [Metric(mean["value"], mean["error"]) for mean in found]
            lines.append(f"| {first:d} to {last:d} | {' | '.join(map(_short, means))} |")
        for sentence in self.loss["memorised"]:
            lines += ["", f"{escape(sentence)}."]
        return lines

    def _table_of_metrics(self) -> list[str]:
        columns = ["metric", f"{_count(self.samples['count'])} samples", ""]
        if self.real:
            columns.insert(2, f"{self.real.count:,} held-out real images")
        lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, metric in self.metrics.items():
            cells = [number(name, metric)]
            if self.real:
                real = self.real.metrics
                cells.append(number(name, real[name]) if name in real else "")
            lines.append(f"| {title(name)} | {' | '.join(cells)} | {EXPLAINED[name]} |")
        for name, why in self.missing.items():
            lines += ["", f"No {title(name)}: {escape(why)}."]
        return lines

    def save(self, folder: str | os.PathLike) -> str:
        """Write report.json, report.md and the pictures, all or none. Returns the path of report.md."""
        folder = os.fspath(folder)
        files.make_dirs(folder)
        contents, undrawn = self.pictures.encode() if self.pictures else ({}, {})
        shown = {name: there and _PLOTS.get(name) not in undrawn for name, there in self.shown.items()}
        saved = replace(self, shown=shown)
        contents[TEXT_FILE] = saved.markdown(undrawn=undrawn).encode(errors="replace")
        contents[JSON_FILE] = (json.dumps(saved.to_dict(), indent=1, allow_nan=False) + "\n").encode()
        files.write_together((files.join(folder, name), content) for name, content in contents.items())
        for name in {NEIGHBOURS_FILE, DISTANCES_FILE, LOSS_FILE} - contents.keys():  # of an earlier report
            files.remove(files.join(folder, name))
        return files.join(folder, TEXT_FILE)

    @classmethod
    def read(cls, path: str) -> Report:
        """The report of a report.json, or of the folder with one. Raises UserError for a file that is not one."""
        path = files.join(path, JSON_FILE) if files.is_dir(path) else path
        if not files.exists(path):
            raise UserError(
                f"{path} does not exist: name a folder with a report of the evaluate command, or its report.json"
            )
        text = files.read_bytes(path, files.MAX_TEXT_BYTES)
        try:
            report = cls.from_dict(files.parse_json(text, path))
            report.markdown()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a report of the evaluate command, or is damaged: write it again") from None
        return report


def _as_dicts(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: metric.to_dict() for name, metric in metrics.items()}


# What a report.json, or the description of a reference, holds. Each raises ValueError or TypeError for anything else.


def checked_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a set of images: plain values by name, and how they were made."""
    found, made_by = dict(about), dict(about.get("made_by") or {})
    plain = [value for name, value in found.items() if name != "made_by"]
    if not all(map(files.is_plain, [*plain, *made_by.values()])):
        raise ValueError("a value of a description is not plain")
    if "count" in found:
        _as_count(found["count"])
    for name in ("images", "name", "features", "features_sha256"):
        if name in found:
            _as_text(found[name])
    return found


def checked_loss(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The loss by noise level, as FloorReport.to_dict gives it."""
    for level in loss["levels"]:
        for mean in level[loss["target"]].values():
            _as_number(mean["value"])
            if mean["error"] is not None:
                _as_number(mean["error"])
    list(map(_as_text, list(loss["memorised"])))
    return dict(loss)


def _short(metric: Metric) -> str:
    return f"{metric.value:.4g}" + ("" if metric.error is None else f" ± {metric.error:.2g}")


def _as_metrics(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: Metric(_as_number(each["value"]), _as_number(each["error"]) if "error" in each else None)
        for name, each in content.items()
        if name in METRICS
    }


def _as_number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{shown(value)} is not a number")
    return float(value)


def _as_count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**63:
        raise ValueError(f"{shown(value)} is not a number of images")
    return value


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not a text")
    return value


def _made_by(made_by: Mapping[str, Any] | None) -> list[str]:
    if not made_by:
        return ["Not known: there is no samples.json beside them."]
    rest = sorted(key for key in made_by if key not in MADE_BY)
    keys = [key for key in (*MADE_BY, *rest) if key in made_by]
    return ["| | |", "|---|---|", *(f"| {escape(key)} | {escape(made_by[key])} |" for key in keys)]


def _count(count: Any) -> str:
    return f"{int(count):,}"


def _real_images(about: Mapping[str, Any]) -> str:
    return f"{_count(about['count'])} real images" if "count" in about else "statistics of real images"


def _name_of(about: Mapping[str, Any]) -> str:
    return escape(about.get("name") or about["images"])


# Emphasis by _ is at the edge of a word only; an address without markup becomes a link by its :// or www.
_MARKUP = re.compile(r"[\\`*\[\]|!#~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def escape(value: Any) -> str:
    """A value that came from a file, as Markdown shows it: one line, without markup of its own."""
    if value is None:
        return ""
    line = " ".join("".join(c if c.isprintable() else " " for c in _cut(value)).split())
    return _MARKUP.sub(r"\\\g<0>", html.escape(line, quote=False))


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}..."


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
