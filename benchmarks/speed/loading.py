"""Images from files: JPEGs of 500x400 at 64x64, in batches, by the published loader, by ours and from the packed cache.

All ways read in this process with one thread, so that the numbers are images a second and core; worker processes would
read ahead while others are measured. First, all are checked to give the same batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import default_collate

from benchmarks import published
from improved_diffusion.data.cache import use_cache
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.pixels import to_model_range
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream

from .context import Context
from .ways import Way

BATCH, SIZE = 128, 64
DIFFERENT = 250  # JPEGs; the other names are links to them
OURS: dict[str, dict[str, Any]] = {
    "files": dict(cached=False),
    "cache, float32": dict(cached=True),
    "cache, uint8": dict(cached=True, as_bytes=True),
    "cache, uint8, flips": dict(cached=True, as_bytes=True, random_flip=True),
}


def run(context: Context) -> None:
    """Report images a second and core."""
    count, batch = (40, 8) if context.quick else (10_000, BATCH)
    title = f"{count:,} JPEGs of 500x400 at {SIZE}x{SIZE} in batches of {batch}, on one core"
    context.report.begin("loading", title, images=count, batch=batch)
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            reader = Reader(Path(scratch), batch)
            write_jpegs(reader.folder, count)
            reader.check()
            ways = [Way("published", lambda: _next(published.batches(reader.folder, SIZE, batch, workers=0)), 1,
                        memory=False)]  # fmt: skip
            for name, options in OURS.items():
                ways.append(Way(name, lambda options=options: _next(reader.ours(**options)), memory=False))
            context.compare(context.ways(ways), context.clock, batch)
    finally:
        th.set_num_threads(threads)


def _next(data: Iterator[Any]) -> Any:
    return lambda: next(data)


class Reader:
    """The images, and the streams that read them."""

    def __init__(self, scratch: Path, batch: int):
        self.folder, self.cache, self.batch = scratch / "images", str(scratch / "cache"), batch
        self.folder.mkdir()

    def ours(self, cached: bool, **options: Any) -> BatchStream:
        """Our stream, from the packed cache or from the files, which do not stay in memory."""
        dataset = ImageDataset(SIZE, open_images(str(self.folder)))
        dataset.store = None
        use_cache(dataset, self.cache if cached else "off", str(self.folder))
        return BatchStream(dataset, self.batch, num_workers=0, check=False, **options)

    def check(self) -> None:
        """The first images are the same in all ways."""
        images = published.Images(self.folder, SIZE)
        expected, _ = default_collate([images[i] for i in range(self.batch)])
        for options in OURS.values():
            found, _ = next(self.ours(**{**options, "random_flip": False}, shuffle=False))
            assert th.equal(to_model_range(found, "cpu"), expected), f"other images: {options}"


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
