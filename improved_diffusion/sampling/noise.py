"""Noise for sampling: one seed per image, and interpolation between noises."""

from __future__ import annotations

from collections.abc import Sequence

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


class SeededNoise:
    """Noise whose i-th image depends only on the i-th seed, whatever the batch, the ranks or the device.

    Drawn on the CPU: the generators of different devices give different numbers.
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
