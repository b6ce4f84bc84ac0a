"""Noise for sampling: seeded per image, and arcs between noises."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch as th


def slerp(a: th.Tensor, b: th.Tensor, weight: float) -> th.Tensor:
    """Noise [N, C, ...] on the arc from a (weight 0) to b (weight 1), of the same length (Shoemake 1985).

    Between a and itself it is a, bit for bit.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = th.acos(cosine.clamp(-1, 1)).view(-1, *[1] * (a.ndim - 1))
    # On an arc of no length the sines give 0/0, and the chord is as good.
    arc = (th.sin((1 - weight) * angle) * a.double() + th.sin(weight * angle) * b.double()) / th.sin(angle)
    chord = a.double() + weight * (b.double() - a.double())
    return th.where(angle > 1e-4, arc, chord).to(a)


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

    Drawn on the CPU, because generators of different devices give different numbers.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        self.generators = [image_generator(seed, int(number), "noise") for number in numbers]

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
