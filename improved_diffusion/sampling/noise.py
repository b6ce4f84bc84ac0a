"""Noise for sampling: seeded per image, and arcs between noises."""

from __future__ import annotations

from collections.abc import Sequence

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


class SeededNoise:
    """Noise whose i-th image depends on the i-th seed alone, whatever the batch, the ranks or the device.

    Drawn on the CPU, because generators of different devices give different numbers.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [th.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Standard normal noise of x's shape, [N, ...] with N the number of seeds."""
        shape = x.shape[1:]
        return th.stack([th.randn(shape, generator=generator) for generator in self.generators]).to(x)

    def integers(self, high: int) -> th.Tensor:
        """One integer in 0..high-1 for each seed: [N] int64."""
        return th.cat([th.randint(high, (1,), generator=generator) for generator in self.generators])
