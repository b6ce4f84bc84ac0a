"""How long the measures of samples take once their features are there, and how much memory.

    python benchmarks/metrics_speed.py                           (50,000 rows against 50,000, 192 features, 10 classes)
    python benchmarks/metrics_speed.py --features 2048 --only frechet
    python benchmarks/metrics_speed.py --features 2048 --device cuda

Each measure after the other in one process, over random features with a spectrum that falls as those of networks do.
Beside the seconds, those of all processors together; far fewer than threads times as many say that others kept the
machine busy. The peak is that of the whole process up to then, torch and the features included. The number of threads
is that of the environment (OMP_NUM_THREADS). Writes benchmarks/results/metrics_speed.json; for a GPU, whose seconds
include the copies there, the file's name ends in its name.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch as th

from improved_diffusion.evaluation.metrics.copies import copy_score, nearest
from improved_diffusion.evaluation.metrics.frechet import frechet_distance, moments
from improved_diffusion.evaluation.metrics.inception_score import inception_score
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.evaluation.metrics.manifold import manifold_scores

RESULTS = Path(__file__).resolve().parent / "results"


def draw(rows, width, seed, shift=0.0):
    """Features [rows, width] float32, at least 0 as those behind a ReLU."""
    rng = np.random.default_rng(seed)
    scale = (1 + np.arange(width)) ** -0.5
    x = rng.standard_normal((rows, width), np.float32) * scale.astype(np.float32)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    return np.maximum(x @ turn.astype(np.float32) + np.float32(shift), 0)


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="of the samples, and as many of the real images")
    parser.add_argument("--features", type=int, default=192)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="one of the measures, and no result file")
    args = parser.parse_args()
    samples, real = draw(args.rows, args.features, 1, shift=0.02), draw(args.rows, args.features, 2)
    logits = 3 * np.random.default_rng(3).standard_normal((args.rows, args.classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    on = args.device
    where = platform.machine() if on == "cpu" else th.cuda.get_device_name()
    th.zeros(1, device=on)  # which starts the device

    def copies():
        distances, _ = nearest(samples, real, on)
        return copy_score(distances[::2], distances[1::2])

    measures = {
        "frechet": lambda: frechet_distance(moments(samples, on), moments(real, on), on),
        "inception score": lambda: inception_score(probabilities, device=on),
        "copies": copies,
        "manifold": lambda: manifold_scores(samples, real, device=on),
        "kid": lambda: kernel_distance(samples, real, device=on),
    }
    table = {}
    print(f"{'measure':<16} {'seconds':>8} {'of CPUs':>8} {'peak GB':>8}")
    print(f"{'(features)':<16} {'':>8} {'':>8} {peak_bytes() / 1e9:8.2f}")
    for name, measure in measures.items():
        if args.only in ("", name):
            start, start_cpu = time.perf_counter(), time.process_time()
            value = measure()
            seconds, of_cpus = time.perf_counter() - start, time.process_time() - start_cpu
            table[name] = {"seconds": seconds, "seconds_of_cpus": of_cpus, "peak_bytes_so_far": peak_bytes()}
            print(f"{name:<16} {seconds:8.2f} {of_cpus:8.2f} {peak_bytes() / 1e9:8.2f}  {value}", flush=True)
    total, total_of_cpus = (sum(row[key] for row in table.values()) for key in ("seconds", "seconds_of_cpus"))
    print(f"{'all':<16} {total:8.2f} {total_of_cpus:8.2f} {peak_bytes() / 1e9:8.2f}")
    if not args.only:
        content = dict(
            device=where, cores=os.cpu_count(), threads=th.get_num_threads(), numpy=np.__version__,
            torch=th.__version__, rows=args.rows, features=args.features, classes=args.classes, measures=table,
            seconds=total, seconds_of_cpus=total_of_cpus, peak_bytes=peak_bytes(),
        )  # fmt: skip
        name = "metrics_speed" if on == "cpu" else f"metrics_speed_{where.replace(' ', '_')}"
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
