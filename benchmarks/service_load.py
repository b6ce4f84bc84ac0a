"""Images a second of the HTTP service: many clients at once, one request after the other, and single images one after
the other. Every image of each way is checked.

python benchmarks/service_load.py runs/digits --clients 64 --images 4 --steps 10
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import improved_diffusion as idf

TOGETHER, REQUESTS, IMAGES = "all clients at once", "one request at a time", "one image at a time"


def ask(url, body):
    """The images of one request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/samples", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer, np.load(io.BytesIO(answer.read())) as arrays:
        return arrays["arr_0"]


def measure(url, bodies, clients):
    """(the images of each request, images a second), with so many requests at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda body: ask(url, body), bodies))
    return found, sum(map(len, found)) / (time.perf_counter() - started)


def count_wrong(found, bodies, expected):
    """How many of the requests' images are not those that the model draws."""
    return sum(
        not np.array_equal(image, right)
        for images, body in zip(found, bodies)
        for image, right in zip(images, expected[body["seed"]][_numbers(body)], strict=True)
    )


def _numbers(body):
    """Which images of its seed a request asks for."""
    first = int(body.get("seeds", 0))
    return slice(first, first + body.get("n", 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_path", help="a run or a checkpoint")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=int, default=4, help="of each request")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    command = [sys.executable, "-m", "improved_diffusion", "serve", "--model_path", args.model_path, "--port", "0"]
    env = {name: value for name, value in os.environ.items() if name != "IMPROVED_DIFFUSION_TOKEN"}
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = next(line for line in service.stdout if line.startswith("listening"))
        url = re.search(r"http://[^ ]+", line)[0]
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            name = json.load(answer)["models"][0]["name"]
        options = dict(sampler="dpmpp_2m", steps=args.steps)
        common = dict(model=name, format="npz", **options)
        bodies = [dict(common, n=args.images, seed=seed) for seed in range(args.clients)]
        few = bodies[:16]
        singles = [dict(common, seed=body["seed"], seeds=str(i)) for body in few for i in range(args.images)]
        ask(url, {**bodies[0], "seed": 10**6})  # loads the model
        ways = {IMAGES: (singles, 1), REQUESTS: (few, 1), TOGETHER: (bodies, args.clients)}
        found = {way: measure(url, asked, clients) for way, (asked, clients) in ways.items()}
    finally:
        service.terminate()
        service.communicate()
    model = idf.load(args.model_path)
    expected = [model.sample(args.images, seed=seed, progress=False, **options).array for seed in range(args.clients)]
    wrong = 0
    for way, (images, rate) in found.items():
        bad = count_wrong(images, ways[way][0], expected)
        wrong += bad
        times = f", {found[TOGETHER][1] / rate:.1f} times as fast together" if way != TOGETHER else ""
        print(f"{way}: {rate:.1f} images/s{times}; {sum(map(len, images))} images, {bad} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
