"""What drawing several requests together gains: the images a second of many clients, batched against one at a time.

    python benchmarks/service_batching.py --model_path runs/digits
    python benchmarks/service_batching.py --model_path runs/digits --clients 16 --rounds 1

Each client asks for a few images of its own seed. In turns, the engine draws batches of up to --max_batch images of
all requests, single requests one after the other, and single images. Every image is compared with that of the first
way: on CPUs it is the same to the byte, on GPUs some pixels differ by 1 of 255, whose share is printed. Writes
benchmarks/results/service_batching_<device>.json.
"""

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
from common import RESULTS

from improved_diffusion.config.service import EngineConfig
from improved_diffusion.service.engine import Catalogue, Engine, Request

BATCHED, REQUESTS, IMAGES = "batched", "one request at a time", "one image at a time"


def draw(engine, requests, together):
    """(seconds, images of each request) for all requests at once, or one after the other."""
    start = time.perf_counter()
    if together:
        jobs = [engine.submit(request, client=str(i)) for i, request in enumerate(requests)]
        found = [job.result() for job in jobs]
    else:
        found = [engine.submit(request).result() for request in requests]
    return time.perf_counter() - start, [images.array for images in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--max_batch", type=int, default=EngineConfig.max_batch)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    options = {"sampler": args.sampler, "steps": args.steps}
    catalogue = Catalogue("", [args.model_path])
    (name,) = catalogue.names()
    requests = [Request("sample", name, n=args.images, seed=i, options=options) for i in range(args.clients)]
    singles = [
        Request("sample", name, seed=i, options={**options, "seeds": str(number)})
        for i in range(args.clients)
        for number in range(args.images)
    ]
    ways = {BATCHED: (requests, True), REQUESTS: (requests, False), IMAGES: (singles, False)}
    seconds, expected, differing = {way: [] for way in ways}, None, 0.0
    with Engine(catalogue, EngineConfig(max_batch=args.max_batch)) as engine:
        engine.submit(requests[0]).result()  # loads the model
        largest = 0 if engine.health().devices[0] == "cpu" else 1
        for _ in range(args.rounds):
            for way, (asked, together) in ways.items():
                took, arrays = draw(engine, asked, together)
                seconds[way].append(took)
                arrays = np.concatenate(arrays)
                expected = arrays if expected is None else expected
                difference = abs(arrays.astype(int) - expected)
                differing = max(differing, (difference > 0).mean())
                assert difference.max() <= largest, f"{way}: other images"
        devices = engine.health().devices
    total = args.clients * args.images
    rates = {way: total / statistics.median(took) for way, took in seconds.items()}
    gains = {way: rates[BATCHED] / rates[way] for way in (REQUESTS, IMAGES)}
    for way, rate in rates.items():
        print(f"{way}: {rate:.1f} images/s" + (f" (batched: {gains[way]:.1f} times)" if way in gains else ""))
    print(f"pixels that differ: {differing:.2%}")
    found = {
        "clients": args.clients, "images_each": args.images, **options, "max_batch": args.max_batch,
        "images_per_second": rates, "batched_is_times": gains, "seconds": seconds, "differing_pixels": float(differing),
        "devices": devices, "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip
    path = RESULTS / f"service_batching_{devices[0].split(':')[0]}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
