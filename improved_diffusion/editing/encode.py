"""Images to the noise that leads to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..logs import logger
from ..sampling.labels import label_kwargs
from ..sampling.writer import claim
from ..utils import images as image_files
from .base import ImageEdit
from .latents import STEP_OPTIONS, Latents, write_latents
from .model import EditingModel, inversion_path
from .options import inversion_settings


class Encode(ImageEdit):
    """Finds the noise that a deterministic sampler turns into each image (DDIM sec. 5.4).

    `draw` gives the images encoded and decoded again.
    """

    command = "encode"

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        settings = inversion_settings(loaded.settings, loaded.given)
        return EditingModel.build(loaded, settings, inversion_path)

    @property
    def count(self) -> int:
        return len(self.images)

    def invert(self, numbers: Sequence[int]) -> np.ndarray:
        """The noise of the images with these numbers, float32 [N, C, H, W]."""
        return self.model.find_noise(self.originals(numbers), label_kwargs(self.labels, numbers)).cpu().numpy()

    def latents(self) -> Latents:
        """The noise of all images, found in batches of --batch_size."""
        size = self.model.settings.edit.batch_size
        batches = [range(i, min(i + size, self.count)) for i in range(0, self.count, size)]
        labels = [self.labels.index(i) for i in range(self.count)] if self.labels else None
        arrays = np.concatenate([self.invert(batch) for batch in batches])
        return Latents(arrays, labels, self.step_options, "", self.sources)

    @property
    def step_options(self) -> dict[str, Any]:
        """The options that decoding needs to go back by the same steps."""
        values = self.model.settings.values()
        return {name: values[name] for name in STEP_OPTIONS}

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        return self._decode(self.invert(numbers), numbers)

    def _decode(self, noise: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        return self.images_from(numbers, noise=th.from_numpy(noise).to(distributed.dev()))

    def write(self, out_dir: str) -> str:
        """Write latents.npz, and the images that it is decoded to; returns the latter's path. Collective."""
        request = self.request()
        distributed.from_rank0(claim, out_dir, request)
        latents = write_latents(
            self.invert,
            out_dir=out_dir,
            count=self.count,
            shape=self.model.shape,
            batch_size=self.model.settings.edit.batch_size,
            labels=self.labels,
            step_options=self.step_options,
            model=request["model_sha256"],
            names=self.sources,
        )
        path = self.write_images(lambda numbers: self._decode(latents[numbers], numbers), out_dir, request)
        distributed.from_rank0(_log_psnr, path, self.images)
        return path


def psnr(images_a: np.ndarray, images_b: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of uint8 [N, H, W, C] to others, in dB: [N], inf for equal ones."""
    errors = ((images_a.astype(np.float64) - images_b) ** 2).mean(axis=(1, 2, 3))
    return np.array([10 * math.log10(255**2 / error) if error else math.inf for error in errors])


def _log_psnr(path: str, originals: np.ndarray) -> None:
    decibels = psnr(image_files.load_npz(path), originals)
    worst = int(decibels.argmin())
    logger.log(
        f"{len(decibels)} images encoded and decoded: mean PSNR {decibels.mean():.1f} dB, lowest "
        f"{decibels[worst]:.1f} dB (image {worst})"
    )
