"""Images a second of the HTTP service: many clients at once, and one after the other. Every image is checked.

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
        bodies = [dict(model=name, n=args.images, seed=seed, format="npz", **options) for seed in range(args.clients)]
        ask(url, {**bodies[0], "seed": 10**6})  # loads the model
        alone = [bodies[i % len(bodies)] for i in range(min(16, len(bodies)))]
        _, one = measure(url, alone, 1)
        found, many = measure(url, bodies, args.clients)
    finally:
        service.terminate()
        service.communicate()
    model = idf.load(args.model_path)
    wrong = sum(
        not np.array_equal(images, model.sample(args.images, seed=seed, progress=False, **options).array)
        for seed, images in enumerate(found)
    )
    print(f"one client: {one:.1f} images/s; {args.clients} clients: {many:.1f} images/s, {many / one:.1f} times")
    print(f"{sum(map(len, found))} images, {wrong} requests with wrong ones")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
