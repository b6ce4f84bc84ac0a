"""Noise for sampling: one seed per image, and interpolation between noises."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch as th


def slerp(a: th.Tensor, b: th.Tensor, weight: float) -> th.Tensor:
    """Noise [N, C, ...] on the arc from a (weight 0) to b (weight 1), of the same length (Shoemake 1985).

    Between a and itself it is a, bit for bit. Computed in float64 on the CPU, which not every device has.
    """
    x, y = a.cpu().double(), b.cpu().double()
    flat_x, flat_y = x.flatten(1), y.flatten(1)
    cosine = (flat_x * flat_y).sum(1) / (flat_x.norm(dim=1) * flat_y.norm(dim=1))
    angle = th.acos(cosine.clamp(-1, 1)).view(-1, *[1] * (a.ndim - 1))
    # Without an angle the arc is 0/0; the straight line is as good.
    arc = (th.sin((1 - weight) * angle) * x + th.sin(weight * angle) * y) / th.sin(angle)
    line = x + weight * (y - x)
    return th.where(angle > 1e-4, arc, line).to(a.dtype).to(a.device)


# Which scheme turns (seed, number of the image) into an image. Samples made by another one do not mix with ours.
SEED_SCHEME = "SeedSequence(seed, (stream, number))"
_STREAMS = {"noise": 0, "label": 1, "timesteps": 2}


def image_generator(seed: int, number: int, stream: str) -> np.random.Generator:
    """The random numbers of image `number` of a seed. No two (seed, number, stream) share any.

    :param stream: noise, label or timesteps: independent, so that a given class does not change the noise.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], number)))


class SeededNoise:
    """Noise whose images depend on the seed and their own numbers alone, whatever the batch, the ranks or the device.

    Drawn on the CPU: the generators of different devices give different numbers.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        self.generators = [image_generator(seed, int(number), "noise") for number in numbers]

    @classmethod
    def joined(cls, rows: Iterable[tuple[int, int]]) -> SeededNoise:
        """Noise for images of several seeds: (seed, number) of each."""
        noise = cls(0, [])
        noise.generators = [image_generator(seed, int(number), "noise") for seed, number in rows]
        return noise

    def __len__(self) -> int:
        return len(self.generators)

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Standard normal noise of x's shape, [N, ...] with N the number of images."""
        shape = tuple(x.shape[1:])
        draws = [generator.standard_normal(shape, dtype=np.float32) for generator in self.generators]
        return th.from_numpy(np.stack(draws)).to(x)

    def integers(self, high: int) -> th.Tensor:
        """One integer in 0..high-1 for each image: [N] int64."""
        return th.tensor([int(generator.integers(high)) for generator in self.generators])
