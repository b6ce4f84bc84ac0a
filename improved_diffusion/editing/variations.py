"""Variations of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoints.loading import LoadedModel
from ..sampling.sampler import Sampler
from .base import ImageEdit
from .model import EditingModel
from .options import renoising_settings


class Vary(ImageEdit):
    """Adds noise to images, up to a share of the noise levels, and removes it again (SDEdit, Meng et al. 2021)."""

    command = "variations"

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        return EditingModel.build(loaded, renoising_settings(loaded.settings, cls.command), _path)

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        return self.images_from(numbers, noise=self.model.to_device(self.originals(numbers)))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "strength": self.model.settings.variations.strength}


def _path(settings: Any, sampler: Sampler) -> list[int]:
    return noising_path(sampler, settings.variations.strength)


def noising_path(sampler: Sampler, strength: float) -> list[int]:
    """From the image in one go to the step nearest to timestep strength * (T-1), and down again step by step."""
    d = sampler.diffusion
    wanted = strength * (d.original_num_steps - 1)
    nearest = int(np.abs(np.array(d.timestep_map) - wanted).argmin())
    return [-1, *range(nearest, -2, -1)]
