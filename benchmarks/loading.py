"""How fast images are read: the published way, ours from the files, and ours from the packed cache.

    python benchmarks/loading.py                      (10,000 JPEGs of 500x400 at 64x64)
    python benchmarks/loading.py --count 2000 --size 32

Everything runs in one process on one core, the ways in turns, and the time is that of the processor: the numbers are
images a second and core, whatever else the machine does. The JPEGs are smooth shapes with noise, of about 40 kB; a few
hundred different ones under many names, so that the packed file (123 MB) is far larger than the processor's caches. The
published way is written from its description: one image after another, with Pillow, to float32. Before anything is
timed, all ways are checked to give the same batches. Writes benchmarks/results/loading.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from improved_diffusion.data.pixels import to_model_range
from improved_diffusion.data.stream import load_data

RESULTS = Path(__file__).resolve().parent / "results"
DIFFERENT = 250  # JPEGs; the other names are links to them
BASELINE = "published"


class Published(Dataset):
    """Images as the published code reads them."""

    def __init__(self, folder, size):
        self.paths, self.size = sorted(Path(folder).iterdir()), size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as f:
            image = Image.open(f)
            image.load()
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
        array = np.array(image.convert("RGB"))
        top, left = (array.shape[0] - self.size) // 2, (array.shape[1] - self.size) // 2
        array = array[top : top + self.size, left : left + self.size].astype(np.float32) / 127.5 - 1
        return np.transpose(array, [2, 0, 1]), {}


def write_jpegs(folder, count, seed=0):
    """`count` names of JPEGs of 500x400."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:400, 0:500] / 500
    names = [f"{i:06d}.jpg" for i in range(count)]
    for name in names[:DIFFERENT]:
        waves = [np.sin(rng.uniform(2, 40) * x + rng.uniform(2, 40) * y + rng.uniform(0, 6)) for _ in range(3)]
        array = 128 + 80 * np.stack(waves, axis=-1) + rng.normal(0, 8, (400, 500, 3))
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
    for i, name in enumerate(names[DIFFERENT:]):
        os.link(folder / names[i % DIFFERENT], folder / name)
    return sum((folder / name).stat().st_size for name in names[:DIFFERENT]) / len(names[:DIFFERENT])


def ways(folder, cache, size, batch_size):
    """name -> an iterator of batches, in the order on disk where two are to be compared."""
    options = dict(data_dir=str(folder), batch_size=batch_size, image_size=size, num_workers=0)

    def as_bytes(**more):
        data = load_data(**options, **more, cache=str(cache))
        data.stream.as_bytes = True
        return data

    def from_files(**more):
        data = load_data(**options, **more)
        data.stream.dataset.store = None  # a set that does not stay in memory
        return data

    def published(shuffle=True):
        while True:
            yield from DataLoader(Published(folder, size), batch_size, shuffle, num_workers=0, drop_last=True)

    return {
        BASELINE: published(),
        "files": from_files(),
        "cache, float32": load_data(**options, cache=str(cache)),
        "cache, uint8": as_bytes(),
        "cache, uint8, flips": as_bytes(random_flip=True),
    }, (
        published(shuffle=False), from_files(deterministic=True),
        load_data(**options, deterministic=True, cache=str(cache)), as_bytes(deterministic=True),
    )  # fmt: skip


def check(several):
    """The ways give the same first batch."""
    batches = [to_model_range(next(data)[0], "cpu") for data in several]
    assert all(th.equal(batches[0], batch) for batch in batches[1:])


def rate(data, batch_size, seconds):
    """Images a second of processor time."""
    next(data)
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for _ in range(8):
            next(data)
            count += batch_size
            if time.process_time() - start > seconds:
                break
    return count / spent if spent else count / seconds


def run(count=10_000, size=64, batch_size=128, seconds=1.5, rounds=5, folder=None):
    """A row for each way: `way`, `per_second` (images a second and core, the median), `seconds` of a batch, `ratio` to
    the published way, and `all`, the rates of the rounds.

    :param folder: where the images and the cache are written; a temporary folder unless given.
    """
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            images = Path(scratch) / "images"
            images.mkdir()
            each = write_jpegs(images, count)
            start = time.perf_counter()
            measured, compared = ways(images, Path(scratch) / "cache", size, batch_size)
            print(f"{count:,} JPEGs of {each / 1e3:.0f} kB; packed and checked in {time.perf_counter() - start:.0f} s")
            check(compared)
            rates = {name: [] for name in measured}
            for _ in range(rounds):
                for name, data in measured.items():
                    rates[name].append(rate(data, batch_size, seconds))
    finally:
        th.set_num_threads(threads)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return [
        {
            "way": name, "per_second": median, "seconds": batch_size / median, "ratio": median / medians[BASELINE],
            "all": [round(found, 1) for found in rates[name]],
        }
        for name, median in medians.items()
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="images")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS / "loading.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = run(args.count, args.size, args.batch_size, rounds=args.rounds)
    print(f"{'images a second and core':<24} {'':>10} {'ratio':>8}")
    for row in rows:
        print(f"{row['way']:<24} {row['per_second']:10,.0f} {row['ratio']:7.1f}x")
    machine = {"torch": th.__version__, "pillow": PIL.__version__, "cores": os.cpu_count(), "load": load,
               "processor": platform.processor() or platform.machine()}  # fmt: skip
    settings = {"count": args.count, "jpegs": "500x400", "size": args.size, "batch_size": args.batch_size}
    Path(args.out).write_text(json.dumps({**settings, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
