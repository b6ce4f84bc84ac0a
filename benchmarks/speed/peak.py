"""What the machine can do at most: convolutions and matrix products of the networks' own shapes, by number format.

A convolution's forward pass alone is faster than with its backward pass, of which a training step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch as th
from torch.nn import functional as F

from improved_diffusion import distributed

from .context import Context
from .ways import Clock, Way, compare

# (images, channels in and out, side) of 3x3 convolutions: levels of the CIFAR-10 and the ImageNet-64 network.
ON_GPU = [(128, 256, 32), (128, 256, 16), (128, 128, 64), (128, 384, 16)]
ON_CPU = [(8, 128, 32), (8, 256, 16), (8, 256, 8), (32, 32, 16)]
QUICK = [(2, 32, 8)]
FORWARD, BOTH = "forward", "forward and backward"
FORMATS = {"fp32": th.float32, "tf32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}


def run(context: Context) -> None:
    """Report the best of each, and keep it for the other groups."""
    context.report.begin("peak", "the machine's own: the fastest convolutions and the fastest matrix product")
    formats = ["fp32", "tf32", "bf16", "fp16"] if context.on_gpu else ["fp32", "bf16"]
    peaks: dict[str, dict[str, float]] = {}
    for number, name in enumerate(formats):
        clock = context.clock.part(1 / (len(formats) - number))
        found = {"convolution": _measure(_convolutions(name, context), context, clock.part(0.7))}
        found["matmul"] = _measure(_matmuls(name, context), context, clock)
        best = {kind: rows[0] for kind, rows in found.items()}
        best["convolution_step"] = next(row for row in found["convolution"] if BOTH in row["way"])
        context.report.add(*best.values())
        peaks[name] = {kind: row["flops_per_second"] for kind, row in best.items() if "error" not in row}
        context.report.note(peaks=peaks, **{f"{name}_{kind}": rows for kind, rows in found.items()})


def _measure(ways: Iterator[Way], context: Context, clock: Clock) -> list[dict[str, Any]]:
    """The rows of the ways, the fastest first."""
    rows = []
    for timing in compare(list(ways), clock, **context.rounds, block=0.01):
        row = timing.row(None)
        flops = row.pop("flops")
        rows.append(row if timing.error else {**row, "flops_per_second": flops / timing.median})
    return sorted(rows, key=lambda row: -row.get("flops_per_second", 0.0))


def _convolutions(name: str, context: Context) -> Iterator[Way]:
    shapes = QUICK if context.quick else ON_GPU if context.on_gpu else ON_CPU
    for n, channels, side in shapes:
        flops = 2 * 9 * n * channels * channels * side * side
        for layout in (th.channels_last, th.contiguous_format):
            for direction in (BOTH, FORWARD):
                last = ", channels last" if layout is th.channels_last else ""
                yield Way(
                    f"{name} convolution {n}x{channels}x{side}x{side}{last}, {direction}",
                    _convolution(name, n, channels, side, layout, direction == BOTH),
                    memory=False,
                    columns={"flops": flops * (3 if direction == BOTH else 1)},
                )


def _convolution(
    name: str, n: int, channels: int, side: int, layout: th.memory_format, backward: bool
) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        _set_arithmetic(name)
        kwargs: Any = dict(device=distributed.dev(), dtype=FORMATS[name])
        x = th.randn(n, channels, side, side, **kwargs).to(memory_format=layout)
        weight = th.randn(channels, channels, 3, 3, **kwargs).to(memory_format=layout)
        gradient = th.randn_like(x)

        def forward() -> Any:
            with th.no_grad():
                return F.conv2d(x, weight, padding=1)

        def both() -> Any:
            y = F.conv2d(x.detach().requires_grad_(), weight.detach().requires_grad_(), padding=1)
            y.backward(gradient)

        return both if backward else forward

    return make


def _matmuls(name: str, context: Context) -> Iterator[Way]:
    for side in [64] if context.quick else [8192, 4096] if context.on_gpu else [2048, 1024]:

        def make(side: int = side) -> Callable[[], Any]:
            _set_arithmetic(name)
            a, b = (th.randn(side, side, device=distributed.dev()).to(FORMATS[name]) for _ in range(2))
            return lambda: a @ b

        yield Way(f"{name} matmul {side}", make, memory=False, columns={"flops": 2 * side**3})


def _set_arithmetic(name: str) -> None:
    """torch's switches for a number format; the fastest of cuDNN's algorithms."""
    th.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    th.backends.cudnn.allow_tf32 = name == "tf32"
    th.backends.cudnn.benchmark = True
