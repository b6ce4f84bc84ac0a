"""What the command line asks for, as all groups get it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from improved_diffusion import distributed

from .kernels import Profiles
from .report import Report
from .ways import Clock, Timing, Way, compare
from .workloads import Workload, workloads


@dataclass(frozen=True)
class Context:
    """:param clock: the time of the group.
    :param quick: tiny networks and few rounds, to see that everything works.
    :param only_workloads, only_ways: patterns of names; none: all.
    :param profiled: patterns of the ways to profile; none: none.
    """

    report: Report
    clock: Clock
    quick: bool = False
    only_workloads: Sequence[str] = ()
    only_ways: Sequence[str] = ()
    profiled: Sequence[str] = ()
    profiles: Profiles | None = None

    @property
    def on_gpu(self) -> bool:
        return distributed.dev().type == "cuda"

    @property
    def rounds(self) -> dict[str, int]:
        """The fewest and the most rounds."""
        return {"least": 2, "most": 2} if self.quick else {"least": 5, "most": 20}

    def workloads(self) -> list[Workload]:
        """The networks to measure."""
        return [each for each in workloads(self.quick) if _wanted(each.name, self.only_workloads)]

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        """Those that are asked for, and the baseline, which is the first one."""
        return [way for i, way in enumerate(ways) if i == 0 or _wanted(way.name, self.only_ways)]

    def compare(
        self, ways: Sequence[Way], clock: Clock, per_call: float = 0.0, least: int = 0, **columns: Any
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Measure the ways in turns and report their rows, which are returned.

        :param per_call: things (images, rows) that a call handles; gives the column per_second.
        :param least: the fewest rounds, where the usual number is too many.
        """

        def inspect(way: Way, call: Callable[[], Any]) -> None:
            if self.profiles is not None and any(fnmatch(way.name, pattern) for pattern in self.profiled):
                self.profiles.add(" ".join([*map(str, columns.values()), way.name]), call)

        rounds = {**self.rounds, "least": min(least or self.rounds["least"], self.rounds["least"])}
        timings = compare(ways, clock, **rounds, inspect=inspect)
        rows = [self._row(timing, timings[0], per_call, columns) for timing in timings]
        self.report.add(*rows)
        return rows

    def _row(self, timing: Timing, baseline: Timing, per_call: float, columns: dict[str, Any]) -> dict[str, Any]:
        row = {**columns, **timing.row(baseline)}
        if "error" in row:
            return row
        if per_call:
            row["per_second"] = per_call / row["seconds"]
        flops, kinds = row.pop("flops", 0), row.pop("kinds", ("convolution", "matmul"))
        if flops:
            row["flops_per_second"] = flops / row["seconds"]
            for kind, peak in self.peaks.get(row.get("arithmetic", ""), {}).items():
                if kind in kinds:
                    row[f"share_of_{kind}_peak"] = row["flops_per_second"] / peak
        return row

    @property
    def peaks(self) -> dict[str, dict[str, float]]:
        """number format -> {"convolution", "convolution_step", "matmul"}: the machine's own FLOP/s, as the group `peak`
        measured them."""
        return self.report.groups.get("peak", {}).get("peaks", {})


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)
