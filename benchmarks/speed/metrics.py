"""The measures of samples, once the features are there: ours on the device, and others' where there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from improved_diffusion import distributed
from improved_diffusion.evaluation.metrics.copies import nearest
from improved_diffusion.evaluation.metrics.frechet import frechet_distance, moments
from improved_diffusion.evaluation.metrics.inception_score import inception_score
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.evaluation.metrics.manifold import manifold_scores

from .context import Context
from .ways import Way

SLOW = 10.0  # seconds that others may take


def run(context: Context) -> None:
    """Report each measure, a table for each."""
    rows, width = (2000, 16) if context.quick else (50_000, 2048 if context.on_gpu else 192)
    context.report.begin("metrics", f"{rows:,} rows against {rows:,}, {width} features", rows_of_each=rows, width=width)
    samples, real = draw(rows, width, 1, shift=0.02), draw(rows, width, 2)
    logits = 3 * np.random.default_rng(3).standard_normal((rows, 1000 if context.on_gpu else 10))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    on: dict[str, Any] = {"device": distributed.dev()} if context.on_gpu else {}
    measures: dict[str, Callable[..., Any]] = {
        "frechet": lambda **on: frechet_distance(moments(samples, **on), moments(real, **on), **on),
        "inception score": lambda **on: inception_score(probabilities, **on),
        "copies": lambda **on: nearest(samples, real, **on),
        "manifold": lambda **on: manifold_scores(samples, real, **on),
        "kid": lambda **on: kernel_distance(samples, real, **on),
    }
    seconds = 0.0
    for number, (name, measure) in enumerate(measures.items()):
        ways = [Way("ours", _call(measure, on), 1, memory=context.on_gpu)]
        if context.on_gpu:
            ways.append(Way("ours on the CPU", _call(measure, {}), 1, SLOW, memory=False))
        if name == "frechet":
            by_sqrtm = Way("published, scipy's sqrtm", lambda: lambda: _frechet_by_sqrtm(samples, real), 1, SLOW,
                           memory=False)  # fmt: skip
            ways.append(by_sqrtm)
        clock = context.clock.part(1 / (len(measures) - number))
        seconds += context.compare(context.ways(ways), clock, rows, least=1, workload=name)[0].get("seconds", 0.0)
    context.report.note(seconds_of_all=seconds, peak_bytes_of_process=distributed.peak_memory(distributed.dev()))
    print(f"ours, all together: {seconds:.1f} s")


def draw(rows: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Features [rows, width] float32: at least 0 as those behind a ReLU, with a spectrum that falls as networks' do."""
    rng = np.random.default_rng(seed)
    scale = (1 + np.arange(width)) ** -0.5
    x = rng.standard_normal((rows, width), np.float32) * scale.astype(np.float32)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    return np.maximum(x @ turn.astype(np.float32) + np.float32(shift), 0)


def _call(measure: Callable[..., Any], on: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    return lambda: lambda: measure(**on)


def _frechet_by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The distance by the matrix square root of the covariances' product."""
    from scipy.linalg import sqrtm

    a, b = (np.cov(each.astype(np.float64), rowvar=False) for each in (x, y))
    root = sqrtm(a @ b).real
    return float(((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root))
