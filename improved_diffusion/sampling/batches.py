"""How many images to draw at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..logs import logger

ON_CPU = 16  # where larger batches are no faster
TRIAL = 8  # images drawn to see how much memory they need
LARGEST = 512  # a GPU is busy with fewer, and what a lost run has not written yet is at most this
BATCH_MEMORY = 0.8  # of what is free: larger batches may need more for each image


def fitting_batch(try_out: Callable[[int], Any], count: int, device: th.device, memory: float = BATCH_MEMORY) -> int:
    """How many of `count` images fit an accelerator's free memory at once; on CPUs, a constant.

    :param try_out: takes a step of the sampler with this many images.
    :param memory: the share of the free memory to use.
    """
    trial = min(TRIAL, count)
    if trial < 1 or not distributed.knows_peak_memory(device):
        return max(1, min(ON_CPU, count))
    used = distributed.measure_memory(lambda: try_out(trial), device)
    free = distributed.available_memory(device)
    fits = int(memory * free / max(used, 1) * trial)
    fits -= fits % TRIAL if fits > TRIAL else 0
    return max(1, min(fits, LARGEST, count))


class Halving:
    """Draws images in as many parts as it takes to fit an accelerator's memory, and goes on with parts of that size.

    :param draw: numbers of images -> array [N, ...]; the same for an image whatever is drawn beside it.
    """

    def __init__(self, draw: Callable[[list[int]], np.ndarray]):
        self.draw = draw
        self.most = LARGEST**2

    def __call__(self, numbers: Sequence[int]) -> np.ndarray:
        """The images with these numbers. Raises the error of the device where one image alone does not fit."""
        numbers, parts = list(numbers), []
        while numbers:
            part = self._fitting(numbers[: self.most])
            parts.append(part)
            numbers = numbers[len(part) :]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _fitting(self, numbers: list[int]) -> np.ndarray:
        """The first of these images, as many as fit."""
        while True:
            try:
                return self.draw(numbers)
            except RuntimeError as error:
                if len(numbers) == 1 or not distributed.is_out_of_memory(error):
                    raise
            # Here, where the error no longer holds the tensors of its traceback.
            self.most = len(numbers) // 2
            logger.warn(
                f"a batch of {len(numbers)} images does not fit the memory of {distributed.dev()}: going on with "
                f"{self.most} at once (--batch_size {self.most})"
            )
            numbers = numbers[: self.most]
            distributed.empty_cache(distributed.dev())
