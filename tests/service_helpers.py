"""Requests to an engine, and waiting for what it does."""

import time

from improved_diffusion.service.engine import Request

FAST = dict(sampler="ddim", steps=2)
WAIT = 60  # seconds, on a busy machine


def ask(model="plain", n=1, seed=0, **options):
    kwargs = {name: options.pop(name) for name in ("classes", "average", "images", "mask") if name in options}
    return Request("sample", model, n=n, seed=seed, options={**FAST, **options}, **kwargs)


def until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
