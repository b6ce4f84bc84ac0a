"""A sweep: one model under several sampler settings, with a report for each, a table and a plot of all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from .. import distributed
from ..checkpoints import checkpoint
from ..checkpoints.loading import LoadedModel, find_file, load_model
from ..config import SWEEP_OPTIONS, UserError
from ..config.settings import Sweeping
from ..logs import logger
from ..logs.run_folder import open_run, run_folder
from ..sampling.pipeline import SamplingPipeline
from ..sampling.request import describe_request, model_name
from ..sampling.writer import check_request
from ..utils import files
from ..utils.figures import new_figure, save_figure
from . import report
from .evaluator import Evaluator, Inputs, prepare_like_training
from .metrics.scores import METRICS
from .provenance import implied_by
from .report import Metric, Report

TABLE_FILE, JSON_FILE, PLOT_FILE = "sweep.md", "sweep.json", "sweep.png"


@dataclass(frozen=True)
class Point:
    """One combination of the swept options.

    :param chosen: the value of each swept option, as text.
    :param settings: with these values.
    :param given: the options that the user gave.
    """

    chosen: Mapping[str, str]
    settings: Sweeping
    given: frozenset[str]

    @property
    def folder(self) -> str:
        """The folder of its samples and report, below that of the sweep."""
        return "_".join(f"{name}{value}" for name, value in self.chosen.items())

    @property
    def label(self) -> str:
        """What the log calls it."""
        return ", ".join(f"{name} {value}" for name, value in self.chosen.items())

    def load(self) -> LoadedModel[Sweeping]:
        """Its model. Collective."""
        path = distributed.from_rank0(find_checkpoint, self.settings.sample.model_path, self.settings.sweep.ema)
        return load_model(self.settings, self.given, path)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    chosen: Mapping[str, str]
    evaluations: int | None  # of the network, for each sample
    folder: str
    metrics: Mapping[str, Metric]

    def to_dict(self) -> dict[str, Any]:
        """As in sweep.json."""
        return {**asdict(self), "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()}}


def run_sweep(points: Sequence[Point]) -> str:
    """Evaluate every point, except those whose report exists already; returns the table's path. Collective.

    All points are checked before the first samples are drawn.
    """
    settings = points[0].settings
    if settings.evaluation.samples:
        raise UserError(f"--samples {settings.evaluation.samples}: a sweep draws its samples: give --model_path")
    if len(points) < 2:
        raise UserError(
            f"a sweep needs several values, such as --steps 10,20, of one or more of --{', --'.join(SWEEP_OPTIONS)}"
        )
    requests = []
    for point in points:
        pipeline = SamplingPipeline(point.load())
        features = prepare_like_training(pipeline.loaded.settings, pipeline.loaded.path, len(pipeline.numbers))
        requests.append(describe_request(pipeline.loaded, pipeline.sampler))
    inputs = Inputs.of(settings.evaluation, features, pipeline.loaded.settings.reading)
    inputs.check_model(settings.sample.model_path, len(pipeline.numbers))
    name = f"{model_name(settings.sample.model_path)}_sweep_seed{settings.run.seed}"
    folder = run_folder(settings.run, name)
    distributed.from_rank0(_check_folders, folder, points, requests)
    inputs.check_out_dir(folder)
    out_dir = open_run(settings.run, name)
    evaluator = inputs.prepare()
    rows: list[Row] = []
    try:
        path = _evaluate_points(evaluator, points, out_dir, rows)
    except KeyboardInterrupt as error:
        done = f"{len(rows)} of {len(points)} settings are done; rerun the same command to continue"
        raise KeyboardInterrupt(f"{error}; {done}" if str(error) else done) from None
    plot = f" and {PLOT_FILE}" if files.exists(files.join(out_dir, PLOT_FILE)) else ""
    logger.log(f"wrote {path}, and {JSON_FILE}{plot} beside it")
    return path


def _evaluate_points(evaluator: Evaluator, points: Sequence[Point], out_dir: str, rows: list[Row]) -> str:
    """Fill the table; returns its path. Collective. :param rows: gets a row for each point as it is done."""
    path = ""
    for number, point in enumerate(points, 1):
        logger.log(f"{number} of {len(points)}: {point.label}")
        pipeline = SamplingPipeline(point.load())
        found, is_new = _evaluate_point(evaluator, pipeline, os.path.join(out_dir, point.folder))
        evaluations = implied_by(describe_request(pipeline.loaded, pipeline.sampler)).get("evaluations")
        rows.append(Row(dict(point.chosen), evaluations, point.folder, found.metrics))
        if is_new or number == len(points):  # an interrupted sweep leaves a table too
            path = distributed.from_rank0(write_table, out_dir, rows, found)
    return path


def _evaluate_point(evaluator: Evaluator, pipeline: SamplingPipeline, folder: str) -> tuple[Report, bool]:
    """(the report in the folder, whether it is new). A report of the same samples, reference and network is kept."""
    asked = {
        "samples": describe_request(pipeline.loaded, pipeline.sampler),
        "num_samples": len(pipeline.numbers),
        **evaluator.describe(),
    }
    asked = distributed.from_rank0(lambda: json.loads(json.dumps(asked)))
    before = distributed.from_rank0(_read_report, folder)
    if before is not None and before.asked == asked:
        logger.log(f"{folder} has the report already")
        return before, False
    samples = evaluator.inputs.open_samples(pipeline.write(folder))
    return evaluator.evaluate(samples, folder, asked), True


def _read_report(folder: str) -> Report | None:
    if not files.exists(files.join(folder, report.JSON_FILE)):
        return None
    try:
        return Report.read(folder)
    except UserError:
        return None  # damaged: it is written again


def _check_folders(out_dir: str, points: Sequence[Point], requests: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where the folder holds a sweep of other options, or samples of other requests."""
    path, axes = files.join(out_dir, JSON_FILE), list(points[0].chosen)
    if files.exists(path):
        text = files.read_bytes(path, files.MAX_TEXT_BYTES)
        try:
            before = [str(axis) for axis in dict(files.parse_json(text, path)[0]["chosen"])]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path} is damaged: remove it, or choose another --out_dir") from None
        if before != axes:
            raise UserError(
                f"{out_dir} holds a sweep of --{', --'.join(before)}, not of --{', --'.join(axes)}: choose another "
                "--out_dir"
            )
    for point, request in zip(points, requests):
        folder = files.join(out_dir, point.folder)
        if files.exists(folder) and not files.is_dir(folder):
            raise UserError(f"{folder} must be a folder, for samples: remove the file, or choose another --out_dir")
        check_request(folder, request)


def find_checkpoint(model_path: str, ema: str) -> str:
    """The checkpoint of an EMA rate, of the step of a model and in its folder; the model itself for "" and none.

    Raises UserError where there is none, naming the rates there are.
    """
    if ema in ("", "none"):
        return model_path
    if files.is_dir(model_path):
        return find_file(model_path, ema)
    folder, name = os.path.split(model_path)
    number = re.search(r"(\d+)\.pt$", name)
    if not number:
        raise UserError(f"--ema {ema} needs a --model_path such as runs/NAME/model010000.pt, in the folder of its EMAs")
    path = files.join(folder or ".", checkpoint.ema_name(ema, int(number.group(1))))
    if not files.exists(path):
        there = [n for n in files.list_dir(folder or ".") if n.startswith("ema_") and n.endswith(number.group(0))]
        raise UserError(f"--ema {ema}: {path} does not exist; that step has {', '.join(there) or 'no EMA'}")
    return path


def write_table(out_dir: str, rows: Sequence[Row], last: Report) -> str:
    """Write sweep.md, sweep.json and sweep.png; returns the path of the first. :param last: one of the reports."""
    plot, undrawn = files.join(out_dir, PLOT_FILE), ""
    try:
        save_figure(plot, figure_of, rows)
    except UserError as error:
        logger.warn(f"no {plot}: {error}")
        undrawn = str(error)
        files.remove(plot)  # of fewer rows
    content = json.dumps([row.to_dict() for row in rows], indent=1) + "\n"
    files.write_bytes(files.join(out_dir, JSON_FILE), content.encode())
    path = files.join(out_dir, TABLE_FILE)
    files.write_bytes(path, table(rows, last, undrawn).encode(errors="replace"))
    return path


def table(rows: Sequence[Row], last: Report, undrawn: str = "") -> str:
    """The text of sweep.md.

    :param last: one of the reports; :param undrawn: why there is no plot.
    """
    names = _metrics_of(rows)
    head = [*rows[0].chosen, "evaluations", *map(report.title, names)]
    model = (last.samples.get("made_by") or {}).get("model_path")
    reference = last.reference.get("name") or last.reference["images"]
    lines = [
        "# Sweep", "",
        f"{last.samples['count']:,} samples a row, from {report.escape(model)} or an EMA of it,",
        f"against {report.escape(reference)}, in the features {report.escape(last.samples.get('features'))}.",
    ]  # fmt: skip
    for warning in last.warnings:
        lines += ["", f"**Warning:** {report.escape(warning)}."]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [report.number(name, row.metrics[name]) if name in row.metrics else "" for name in names]
        chosen = map(report.escape, row.chosen.values())
        lines.append(f"| {' | '.join([*chosen, str(row.evaluations or ''), *cells])} |")
    lines += [
        "",
        f"No {PLOT_FILE}: {report.escape(undrawn)}." if undrawn
        else f"![the metrics against the swept options]({PLOT_FILE})",
        "",
        "The report of each row is in its folder:", "",
    ]  # fmt: skip
    lines += [f"- [{report.escape(row.folder)}]({quote(row.folder)}/{report.TEXT_FILE})" for row in rows]
    return "\n".join(lines) + "\n"


def figure_of(rows: Sequence[Row]) -> Any:
    """A panel for each metric against the option with the most values, with a line for each value of the others."""
    values = {axis: list(dict.fromkeys(row.chosen[axis] for row in rows)) for axis in rows[0].chosen}
    x_axis = max(values, key=lambda axis: (axis == "steps" and len(values[axis]) > 1, len(values[axis])))
    names = _metrics_of(rows)
    across = min(3, len(names))
    figure = new_figure((4.6 * across, 3.4 * -(-len(names) // across)))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        varied = {axis: value for axis, value in row.chosen.items() if axis != x_axis and len(values[axis]) > 1}
        label = ", ".join(f"{axis} {value}" for axis, value in varied.items())
        lines.setdefault(label, []).append(row)
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // across), across, i + 1)
        _draw_panel(axes, name, lines, x_axis, values[x_axis])
        if i == 0 and len(lines) > 1:
            axes.legend(fontsize=8)
    return figure


def _draw_panel(axes: Any, name: str, lines: Mapping[str, Sequence[Row]], x_axis: str, values: Sequence[str]) -> None:
    """One metric: a line for each of `lines`, against the values of `x_axis`."""
    for (label, line), marker in zip(lines.items(), "ovs^D<>PX*" * len(lines)):
        there = [row for row in line if name in row.metrics]
        scaled = [(_position(row, x_axis, values), row.metrics[name].scaled(report.factor(name))) for row in there]
        scaled.sort(key=lambda point: point[0])
        x, y = [position for position, _ in scaled], [metric.value for _, metric in scaled]
        error = [metric.error or 0 for _, metric in scaled]
        axes.errorbar(x, y, error, marker=marker, markersize=4, linewidth=1, capsize=2, label=label)
    axes.set_title(f"{report.title(name)}: {report.direction(name)}", fontsize=10)
    axes.set_xlabel("evaluations of the network" if x_axis == "steps" else x_axis)
    if not _is_numeric(values):
        axes.set_xticks(range(len(values)), values, rotation=30)
    axes.grid(alpha=0.3)


def _metrics_of(rows: Sequence[Row]) -> list[str]:
    return [name for name in METRICS if any(name in row.metrics for row in rows)]


def _is_numeric(values: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\d+(\.\d+)?", value) for value in values)


def _position(row: Row, axis: str, values: Sequence[str]) -> float:
    if axis == "steps" and row.evaluations is not None:
        return row.evaluations
    value = row.chosen[axis]
    return float(value) if _is_numeric(values) else values.index(value)
