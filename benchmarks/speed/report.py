"""The table that is printed, and the file that holds the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from improved_diffusion.utils import files

from . import machine


def _number(digits: int, scale: float = 1.0, unit: str = "") -> Callable[[Any], str]:
    def show(value: Any) -> str:
        scaled = value * scale
        return f"{scaled:,.{0 if scaled >= 1000 else digits}f}{unit}"

    return show


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


# What is shown of a row, in this order: key -> (heading, how).
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("time", _seconds),
    "per_second": ("per second", _number(1)),
    "ratio": ("speed", _number(2, unit="x")),
    "flops_per_second": ("TFLOP/s", _number(2, 1e-12)),
    "share_of_convolution_peak": ("of conv.", _number(0, 100, "%")),
    "share_of_convolution_step_peak": ("of conv. both ways", _number(0, 100, "%")),
    "share_of_matmul_peak": ("of matmul", _number(0, 100, "%")),
    "peak_bytes": ("peak GiB", _number(2, 2**-30)),
    "first_seconds": ("first", _seconds),
    "parameters": ("parameters", _number(0)),
    "operations": ("operations", _number(0)),
    "note": ("", str),
}


class Report:
    """The rows of all groups. The file is written again after each of them, so that a run that is ended keeps them.

    :param path: of the file; what is not measured again stays in it: groups, and rows of other networks or ways.
    """

    def __init__(self, path: Path):
        self.path = path
        self.groups: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def begin(self, group: str, title: str, **settings: Any) -> None:
        """A table of its own: its name and what it compares."""
        found, before = machine.description(), self.groups.get(group, {})
        same = all(before.get(name) == found[name] for name in ("device", "torch", "threads"))
        self.group = {"title": title, **found, **settings, "rows": before["rows"] if same and before else []}
        self.groups[group] = self.group
        print(f"\n{group}: {title}", flush=True)

    def add(self, *rows: dict[str, Any]) -> None:
        """More rows, which are shown as a table with a heading of its own."""
        names = {_name(row) for row in rows}
        self.group["rows"] = [row for row in self.group["rows"] if _name(row) not in names] + list(rows)
        files.write_bytes(str(self.path), json.dumps(self.groups, indent=1).encode() + b"\n")
        print(table(rows), flush=True)

    def note(self, **values: Any) -> None:
        """Further results of the group."""
        self.group |= values
        files.write_bytes(str(self.path), json.dumps(self.groups, indent=1).encode() + b"\n")


def _name(row: dict[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("workload", "way") if key in row)


def table(rows: Any) -> str:
    """The rows as text: the names of ways at the left; errors in place of numbers."""
    known = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [["", *(COLUMNS[key][0] for key in known)]]
    errors = {}
    for row in rows:
        if "error" in row:
            errors[len(lines)] = row["error"]
        lines.append([_name(row), *("" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in known)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for number, line in enumerate(lines):
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append("  ".join([line[0].ljust(widths[0]), *([errors[number]] if number in errors else cells)]).rstrip())
    return "\n".join(text)
