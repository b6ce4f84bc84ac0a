"""Images from files: JPEGs of 500x400 at 64x64, in batches, by the published loader and by ours."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import published
from improved_diffusion.data.stream import load_data

from .context import Context
from .ways import Way

BATCH, SIZE = 128, 64
DIFFERENT = 250  # JPEGs; the other names are links to them


def run(context: Context) -> None:
    """Report images a second, which a process of its own reads, or several, or this one."""
    count, batch = (60, 16) if context.quick else (5000, BATCH)
    title = f"{count:,} JPEGs of 500x400 at {SIZE}x{SIZE} in batches of {batch}"
    context.report.begin("loading", title, images=count, batch=batch)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        write_jpegs(folder, count)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ways = [
            Way("published, 1 worker", lambda: _batches(published.batches(folder, SIZE, batch)), memory=False),
            Way("ours, 1 worker", _ours(folder, batch, num_workers=1), memory=False),
            Way("ours, in the training process", _ours(folder, batch, num_workers=0), memory=False),
            Way(f"ours, {cores} workers", _ours(folder, batch, num_workers=cores), memory=False),
        ]
        context.compare(context.ways(ways), context.clock, batch)


def write_jpegs(folder: Path, count: int) -> None:
    """So many JPEGs of 500x400, of smooth shapes with noise, about 40 kB each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:400, 0:500] / 500
    names = [f"{i:06d}.jpg" for i in range(count)]
    for name in names[:DIFFERENT]:
        waves = [np.sin(rng.uniform(2, 40) * x + rng.uniform(2, 40) * y + rng.uniform(0, 6)) for _ in range(3)]
        array = 128 + 80 * np.stack(waves, axis=-1) + rng.normal(0, 8, (400, 500, 3))
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
    for i, name in enumerate(names[DIFFERENT:]):
        os.link(folder / names[i % DIFFERENT], folder / name)


def _ours(folder: Path, batch: int, **options: Any) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        return _batches(load_data(data_dir=str(folder), batch_size=batch, image_size=SIZE, **options))

    return make


def _batches(data: Iterator[Any]) -> Callable[[], Any]:
    return lambda: next(data)
