"""The same model judged under many settings of the sampler: a report for each, a table and a plot of all."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import distributed
from ..checkpoints import checkpoint
from ..config import UserError
from ..logs import logger
from ..sampling.pipeline import Drawing
from ..sampling.request import samples_name
from ..sampling.writer import check_request
from ..training.run import run_folder, start_run
from ..utils import files
from ..utils.figures import new_figure, save_figure
from . import report
from .evaluator import Judge, implied_by, settle_for
from .metrics.scores import METRICS

# The options that may have several values.
AXES = (
    "ema", "sampler", "steps", "guidance_scale", "classifier_scale", "ddim_eta", "churn", "dynamic_threshold", "seed",
)  # fmt: skip
TABLE_FILE, JSON_FILE, PLOT_FILE = "sweep.md", "sweep.json", "sweep.png"


def run_sweep(options: argparse.Namespace) -> str:
    """Judge every combination, but for those whose report is there already; returns the table's path. Collective.

    All combinations are checked before the first is drawn. :param options: with `cells`, as parse_command gives them.
    """
    if options.samples:
        raise UserError(f"--samples {options.samples}: a sweep draws its samples itself: give --model_path")
    if len(options.cells) < 2:
        raise UserError(
            "a sweep varies something: give several values, such as --steps 10,20, of one or more of "
            f"--{', --'.join(AXES)}"
        )
    run = samples_name(options, "ancestral", 0).rpartition("_0steps")[0]  # of the model that was named, not of --ema
    requests = []
    for cell in options.cells:
        cell.model_path = distributed.from_rank0(_checkpoint, cell)
        drawing = _drawing(cell)
        settle_for(options, drawing.options)
        requests.append(drawing.request)
    judge = Judge(options)
    judge.expect_drawn()
    name = f"{run}_sweep_seed{options.seed}"
    distributed.from_rank0(_check_folders, run_folder(options, name), options.cells, requests)
    judge.check_out_dir(run_folder(options, name))
    out_dir = start_run(options, name)
    judge.prepare()
    rows: list[dict[str, Any]] = []
    try:
        path = _judge_all(judge, options.cells, out_dir, rows)
    except KeyboardInterrupt as error:
        done = f"{len(rows)} of {len(options.cells)} settings are judged; the same command goes on"
        raise KeyboardInterrupt(f"{error}; {done}" if str(error) else done) from None
    logger.log(f"wrote {path}, and {JSON_FILE} and {PLOT_FILE} beside it")
    return path


def _judge_all(judge: Judge, cells: Sequence[argparse.Namespace], out_dir: str, rows: list[dict[str, Any]]) -> str:
    """Fill the table; returns its path. Collective. :param rows: takes a row for each cell as it is done."""
    path = ""
    for number, cell in enumerate(cells):
        folder = _folder(cell)
        logger.log(f"{number + 1} of {len(cells)}: {', '.join(f'{k} {v}' for k, v in cell.chosen.items())}")
        drawing = _drawing(cell)
        result, is_new = _judged(judge, drawing, os.path.join(out_dir, folder))
        evaluations = implied_by(drawing.request).get("evaluations")
        rows.append({"chosen": cell.chosen, "evaluations": evaluations, "folder": folder, "metrics": result["metrics"]})
        if is_new or cell is cells[-1]:  # in between too: a sweep that is cut off has shown something
            path = distributed.from_rank0(write_table, out_dir, rows, result)
    return path


def _drawing(cell: argparse.Namespace) -> Drawing:
    return Drawing(copy.copy(cell))  # which settles options that were left open


def _check_folders(out_dir: str, cells: Sequence[argparse.Namespace], requests: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where the folder holds a sweep of other options, or samples that are not these."""
    path, axes = files.join(out_dir, JSON_FILE), list(cells[0].chosen)
    if files.exists(path):
        try:
            before = list(json.loads(files.read_bytes(path))[0]["chosen"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path} is damaged: remove it, or choose another --out_dir") from None
        if before != axes:
            raise UserError(
                f"{out_dir} holds a sweep of --{', --'.join(before)}, not of --{', --'.join(axes)}: choose another "
                "--out_dir"
            )
    for cell, request in zip(cells, requests):
        folder = files.join(out_dir, _folder(cell))
        if files.exists(folder) and not files.is_dir(folder):
            raise UserError(f"{folder} is in the way of a setting's samples: remove it, or choose another --out_dir")
        check_request(folder, request)


def _folder(cell: argparse.Namespace) -> str:
    return "_".join(f"{name}{value}" for name, value in cell.chosen.items())


def _checkpoint(cell: argparse.Namespace) -> str:
    """The checkpoint of --ema, of the step of --model_path and beside it."""
    if cell.ema in ("", "none"):
        return cell.model_path
    folder, name = os.path.split(cell.model_path)
    number = re.search(r"(\d+)\.pt$", name)
    if not cell.model_path or not number:
        raise UserError(
            f"--ema {cell.ema} needs a --model_path such as runs/NAME/model010000.pt, beside which averages lie"
        )
    path = files.join(folder or ".", checkpoint.ema_name(cell.ema, int(number.group(1))))
    if not files.exists(path):
        there = [n for n in files.list_dir(folder or ".") if n.startswith("ema_") and n.endswith(number.group(0))]
        raise UserError(f"--ema {cell.ema}: {path} does not exist; of that step there are {', '.join(there) or 'none'}")
    return path


def _judged(judge: Judge, drawing: Drawing, folder: str) -> tuple[dict[str, Any], bool]:
    """The report in the folder, made where there is none of the same samples, reference and network; whether it was."""
    sets = {name: found.about for name in ("reference", "train", "held_out") if (found := getattr(judge, name))}
    asked = {"samples": drawing.request, "num_samples": drawing.options.num_samples, **sets, **judge.network.describe()}
    asked = distributed.from_rank0(lambda: json.loads(json.dumps(asked)))
    before = distributed.from_rank0(_read_report, folder)
    if before is not None and before.get("asked") == asked:
        logger.log(f"the report in {folder} is there already")
        return before, False
    return judge.judge(judge.open_samples(drawing.write(folder)), folder, asked), True


def _read_report(folder: str) -> dict[str, Any] | None:
    if not files.exists(files.join(folder, report.JSON_FILE)):
        return None
    try:
        return report.read(folder)
    except UserError:
        return None  # damaged: it is made again


def write_table(out_dir: str, rows: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> str:
    """Write sweep.md, sweep.json and sweep.png; returns the path of the first. :param last: one of the reports."""
    axes = list(rows[0]["chosen"])
    names = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    head = [*axes, "evaluations", *map(report.title, names)]
    samples, reference = last["samples"], last["reference"]
    lines = [
        "# Sweep", "",
        f"{samples['count']:,} samples a row, of {(samples['made_by'] or {}).get('model_path')} or its averages,",
        f"against {reference.get('name') or reference['images']}, by the features {samples['features']}.",
    ]  # fmt: skip
    for warning in last["warnings"]:
        lines += ["", f"**Warning:** {warning}."]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [report.number(name, row["metrics"][name]) if name in row["metrics"] else "" for name in names]
        lines.append(f"| {' | '.join([*row['chosen'].values(), str(row['evaluations'] or ''), *cells])} |")
    lines += [
        "",
        f"![the metrics against what varies]({PLOT_FILE})",
        "",
        "Each row's report lies in a folder of its own:",
        "",
    ]
    lines += [f"- [{row['folder']}]({row['folder']}/{report.TEXT_FILE})" for row in rows]
    save_figure(files.join(out_dir, PLOT_FILE), figure_of(rows))
    files.write_bytes(files.join(out_dir, JSON_FILE), (json.dumps(list(rows), indent=1) + "\n").encode())
    path = files.join(out_dir, TABLE_FILE)
    files.write_bytes(path, ("\n".join(lines) + "\n").encode(errors="replace"))
    return path


def figure_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A panel for each metric, against the option with the most values, a line for each combination of the others."""
    values = {axis: list(dict.fromkeys(row["chosen"][axis] for row in rows)) for axis in rows[0]["chosen"]}
    x_axis = max(values, key=lambda axis: (axis == "steps" and len(values[axis]) > 1, len(values[axis])))
    names = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    across = min(3, len(names))
    figure = new_figure((4.6 * across, 3.4 * -(-len(names) // across)))
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        varied = {axis: value for axis, value in row["chosen"].items() if axis != x_axis and len(values[axis]) > 1}
        label = ", ".join(f"{axis} {value}" for axis, value in varied.items())
        lines.setdefault(label, []).append(row)
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // across), across, i + 1)
        factor = report.factor(name)
        for (label, line), marker in zip(lines.items(), "ovs^D<>PX*" * len(lines)):
            there = [row for row in line if name in row["metrics"]]
            points = [(_position(row, x_axis, values[x_axis]), row["metrics"][name]) for row in there]
            points.sort(key=lambda point: point[0])
            x, y = [point[0] for point in points], [factor * point[1]["value"] for point in points]
            error = [factor * point[1].get("error", 0) for point in points]
            axes.errorbar(x, y, error, marker=marker, markersize=4, linewidth=1, capsize=2, label=label)
        axes.set_title(f"{report.title(name)}: {report.direction(name)}", fontsize=10)
        axes.set_xlabel("evaluations of the network, guided or not" if x_axis == "steps" else x_axis)
        if not _is_numeric(values[x_axis]):
            axes.set_xticks(range(len(values[x_axis])), values[x_axis], rotation=30)
        axes.grid(alpha=0.3)
        if i == 0 and len(lines) > 1:
            axes.legend(fontsize=8)
    return figure


def _is_numeric(values: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\d+(\.\d+)?", value) for value in values)


def _position(row: Mapping[str, Any], axis: str, values: Sequence[str]) -> float:
    if axis == "steps":
        return row["evaluations"]
    value = row["chosen"][axis]
    return float(value) if _is_numeric(values) else values.index(value)
