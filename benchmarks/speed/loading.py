"""Images from files: JPEGs of 500x400 at 64x64, in batches, by the published loader and by ours.

All ways read in this process with one thread, so that the numbers are images a second and core; worker processes would
read ahead while others are measured.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from PIL import Image

from benchmarks import published
from improved_diffusion.data.stream import load_data

from .context import Context
from .ways import Way

BATCH, SIZE = 128, 64
DIFFERENT = 250  # JPEGs; the other names are links to them


def run(context: Context) -> None:
    """Report images a second and core."""
    count, batch = (40, 8) if context.quick else (10_000, BATCH)
    title = f"{count:,} JPEGs of 500x400 at {SIZE}x{SIZE} in batches of {batch}, on one core"
    context.report.begin("loading", title, images=count, batch=batch)
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder, cache = Path(scratch) / "images", str(Path(scratch) / "cache")
            folder.mkdir()
            write_jpegs(folder, count)
            theirs = published.batches(folder, SIZE, batch, workers=0)
            ways = [Way("published", lambda: lambda: next(theirs), 1, memory=False)]
            for name, options in _options(cache).items():
                ways.append(Way(name, _ours(folder, batch, options), 2, memory=False))
            context.compare(context.ways(ways), context.clock, batch)
    finally:
        th.set_num_threads(threads)


def _options(cache: str) -> dict[str, dict[str, Any]]:
    """Our ways: from the files and, where this version has it, from the packed cache."""
    if "cache" not in inspect.signature(load_data).parameters:
        return {"files": {}}
    return {
        "files": dict(cache="off"),
        "cache, float32": dict(cache=cache),
        "cache, uint8": dict(cache=cache, as_bytes=True),
        "cache, uint8, flips": dict(cache=cache, as_bytes=True, random_flip=True),
    }


def _ours(folder: Path, batch: int, options: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        given = {name: value for name, value in options.items() if name != "as_bytes"}
        data: Iterator[Any] = load_data(data_dir=str(folder), batch_size=batch, image_size=SIZE, num_workers=0, **given)
        if options.get("as_bytes"):
            data.stream.as_bytes = True  # type: ignore[attr-defined]
        return lambda: next(data)

    return make


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
