"""Low-resolution images of super-resolution: as input of the model, and in grids beside its output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F

from .. import distributed
from ..config import height_width
from .pixels import to_model_range


def downsample(batch: th.Tensor, small_size: Any) -> th.Tensor:
    """float [N, C, H, W] averaged over areas down to `small_size`: the side, or (height, width)."""
    return F.interpolate(batch, height_width(small_size), mode="area")


class WithLowRes:
    """The stream of training images, each batch with its low-resolution version under "low_res"."""

    def __init__(self, data: Any, small_size: Any):
        self.data, self.small_size = data, small_size
        self.num_images = data.num_images

    def seek(self, step: int) -> None:
        """Continue with the batch of step `step`."""
        self.data.seek(step)

    def close(self) -> None:
        """End the worker processes."""
        self.data.close()

    def __next__(self):
        batch, kwargs = next(self.data)
        batch = to_model_range(batch, distributed.dev())
        return batch, {**kwargs, "low_res": downsample(batch, self.small_size)}


def pairs(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """uint8 [N, h, w, C] and [N, H, W, C] -> [2N, H, W, C]: each small image, enlarged, before its large image."""
    height, width = (big // little for big, little in zip(large.shape[1:3], small.shape[1:3]))
    enlarged = small.repeat(height, axis=1).repeat(width, axis=2)
    return np.stack([enlarged, large], axis=1).reshape(-1, *large.shape[1:])
