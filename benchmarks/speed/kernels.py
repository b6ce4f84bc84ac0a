"""Where the time of a call goes: a GPU's kernels, or the CPU's operations, by kind, and the time without any."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from improved_diffusion import distributed
from improved_diffusion.utils import files

from .machine import description, synchronize

# The first pattern that occurs in a kernel's or operation's name gives its kind.
KINDS = {
    "optimizer": r"adam|multi_tensor|foreach|lerp",
    "norms": r"norm|moments|welford|fused_params|internalgradients|gammabeta",
    "copies": r"memcpy|memset|copy|catarray|aten::cat|nchwtonhwc|nhwctonchw|fill|zero_",
    "attention": r"attention|flash|fmha|softmax|sdpa|_mha",
    "convolutions": r"conv|fprop|dgrad|wgrad|winograd|implicit|cudnn",
    "matrix products": r"gemm|nvjet|gemv|splitk|aten::(add|b|baddb)?mm|cutlass",
    "elementwise": r"",
}
STEPS = 3
SHOWN = 25  # single kernels


def profile_call(call: Callable[[], Any]) -> dict[str, Any]:
    """Of a call, the mean over a few: `seconds`; `kinds` and `kernels`, each {name: {seconds, share, count}}, by share;
    `idle_share` of the time without a kernel; on CPUs also `operations` that were dispatched."""
    on_cpu = distributed.dev().type == "cpu"
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            call()
        synchronize()
    spent: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in profiler.events():
        # Annotations are shown beside the kernels that they contain.
        if on_cpu or (event.device_type != DeviceType.CPU and not getattr(event, "is_user_annotation", False)):
            spent[event.name] += (event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us()) / 1e6 / STEPS
            counts[event.name] += 1
    found = {
        "seconds": seconds, "kernels_per_step": sum(counts.values()) / STEPS,
        "idle_share": max(0.0, 1 - sum(spent.values()) / seconds),
        "kinds": _shares(_by_kind(spent), _by_kind(counts), seconds),
        "kernels": dict(list(_shares(spent, counts, seconds).items())[:SHOWN]),
    }  # fmt: skip
    if on_cpu:
        with Operations() as operations:
            call()
        found["operations"] = operations.count
    return found


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched.

    :param without: names of operations that do not count.
    """

    def __init__(self, without: Collection[str] = ()):
        super().__init__()
        self.count, self.without = 0, without

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.without
        return func(*args, **(kwargs or {}))


def kind_of(name: str) -> str:
    """The kind of a kernel or operation."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I))


def _by_kind(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defaultdict(float)
    for name, value in values.items():
        found[kind_of(name)] += value
    return found


def _shares(spent: dict[str, float], counts: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    return {
        name: {"seconds": value, "share": value / seconds, "count": counts[name] / STEPS}
        for name, value in sorted(spent.items(), key=lambda item: -item[1])
    }


def as_text(name: str, found: dict[str, Any]) -> str:
    """The profile as a table."""
    lines = [f"{name}: {found['seconds'] * 1e3:.2f} ms, {found['kernels_per_step']:.0f} kernels or operations"]
    if "operations" in found:
        lines[0] += f", {found['operations']} dispatched"
    rows: Iterable[tuple[str, dict[str, float]]] = [*found["kinds"].items(), *found["kernels"].items()]
    lines += [f"  {found['idle_share']:6.1%}  without a kernel"]
    for number, (label, row) in enumerate(rows):
        if number == len(found["kinds"]):
            lines.append("  single ones:")
        milliseconds = row["seconds"] * 1e3
        lines.append(f"  {row['share']:6.1%}  {milliseconds:9.3f} ms  {row['count']:7.1f} x  {label[:150]}")
    return "\n".join(lines)


class Profiles:
    """Profiles, in a file of numbers and one of text, written again after each; those of other calls stay in them."""

    def __init__(self, path: Path):
        self.path = path
        before = path.with_suffix(".json")
        self.found: dict[str, Any] = json.loads(before.read_text())["profiles"] if before.exists() else {}

    def add(self, name: str, call: Callable[[], Any]) -> None:
        """Profile the call."""
        self.found[name] = profile_call(call)
        content = {**description(), "profiles": self.found}
        files.write_bytes(str(self.path.with_suffix(".json")), json.dumps(content, indent=1).encode() + b"\n")
        text = "\n\n".join(as_text(*item) for item in self.found.items())
        files.write_bytes(str(self.path.with_suffix(".txt")), text.encode() + b"\n")
