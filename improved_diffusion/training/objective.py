"""The losses of a batch, in microbatches, and the random numbers they need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th


def seed_step(seed: int, step: int, rank: int, device: th.device) -> None:
    """Seed numpy's and torch's global generators, of the CPU and the device, so that a resumed run draws the same."""
    sequence = np.random.SeedSequence((seed, step, rank))
    for_torch, for_numpy = sequence.generate_state(2)
    # th.manual_seed would seed every kind of device, and keeps a traceback for each that is not in use.
    th.default_generator.manual_seed(int(for_torch))
    if device.type != "cpu":
        th.get_device_module(device).manual_seed(int(for_torch))
    np.random.seed(int(for_numpy))


def draw_noise(training_losses: Callable[..., Any], batch: th.Tensor) -> dict[str, th.Tensor]:
    """{"noise": of the batch's shape}, or {} for a `training_losses` that takes no noise and draws its own."""
    return (
        {"noise": th.randn_like(batch)} if _takes_noise(getattr(training_losses, "__func__", training_losses)) else {}
    )


@functools.lru_cache(maxsize=8)
def _takes_noise(training_losses: Callable[..., Any]) -> bool:
    parameters = inspect.signature(training_losses).parameters
    return "noise" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def split(tensors: Mapping[str, th.Tensor], part: slice) -> dict[str, th.Tensor]:
    """The same part of each tensor [N, ...]."""
    return {name: value[part] for name, value in tensors.items()}


def per_image(losses: Mapping[str, th.Tensor], count: int) -> dict[str, th.Tensor]:
    """Loss terms of shape [count]; one without dimensions, a mean over the images, counts for each of them."""
    return {name: term.expand(count) if term.ndim == 0 else term for name, term in losses.items()}
