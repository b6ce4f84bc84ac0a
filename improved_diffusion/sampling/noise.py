"""Noise for sampling: one seed per image, and interpolation between noises."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch as th

from ..distributed import to_device


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
NUMBERS_PER_THREAD = 1 << 16  # two milliseconds' worth: fewer are not worth a thread
_STREAMS = {"noise": 0, "label": 1, "timesteps": 2}


def image_generator(seed: int, number: int, stream: str) -> np.random.Generator:
    """The random numbers of image `number` of a seed. No two (seed, number, stream) share any.

    :param stream: noise, label or timesteps: independent, so that a given class does not change the noise.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], number)))


class SeededNoise:
    """Noise whose images depend on the seed and their own numbers alone, whatever the batch, the ranks or the device.

    Drawn on the CPU, where it has the same bits on every machine: generators of GPUs give other numbers than those of
    CPUs, and logarithms and cosines other last bits. Threads draw large batches, and the copy to a GPU waits for
    nothing, so that the noise of a step is drawn while the GPU computes.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        self.generators = [image_generator(seed, int(number), "noise") for number in numbers]
        self._skipped: list[tuple[int, ...]] = []  # shapes of the draws to pass over before the next one

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
        self._catch_up()
        return to_device(th.from_numpy(self._draw(tuple(x.shape[1:]))), x.device).to(x)

    def skip(self, x: th.Tensor) -> None:
        """Pass over noise of x's shape: later draws are the same as if it had been drawn."""
        self._skipped.append(tuple(x.shape[1:]))

    def integers(self, high: int) -> th.Tensor:
        """One integer in 0..high-1 for each image: [N] int64."""
        self._catch_up()
        return th.tensor([int(generator.integers(high)) for generator in self.generators])

    def _catch_up(self) -> None:
        """Draw what was skipped, as more is drawn after it: after the last draw, nothing is."""
        while self._skipped:
            self._draw(self._skipped.pop(0))

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 [N, *shape]."""
        draws = np.empty((len(self), *shape), np.float32)

        def fill(rows: range) -> None:
            for i in rows:
                self.generators[i].standard_normal(dtype=np.float32, out=draws[i])

        threads = min(th.get_num_threads(), draws.size // NUMBERS_PER_THREAD, len(self))
        if threads < 2:
            fill(range(len(self)))
        else:  # NumPy lets go of the interpreter while it draws
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, [range(k, len(self), threads) for k in range(threads)]))
        return draws
