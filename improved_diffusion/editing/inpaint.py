"""Painting the masked part of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, height_width
from ..sampling import solvers
from ..sampling.sampler import Sampler
from ..sampling.timestep_grids import repaint_path
from .base import ImageEdit, read_given, sha256
from .masks import GREY, read_masks
from .model import EditingModel
from .options import renoising_settings


class Inpaint(ImageEdit):
    """Paints the masked part of each image to fit the rest (RePaint, Lugmayr et al. 2022, arXiv 2201.09865).

    :param images: uint8 [N, H, W, C] of the model's size.
    :param masks: bool [1 or N, H, W], true where to paint; all other pixels are kept exactly.
    :param labels: the images' classes; None where they have none.
    Raises UserError for arrays of another shape, and where the model needs classes and there are none.
    """

    command = "inpaint"

    def __init__(self, model: EditingModel, images: np.ndarray, masks: np.ndarray, labels: Sequence[int] | None = None):
        super().__init__(model, images, labels)
        _, height, width = model.shape
        if masks.dtype != bool or masks.shape[1:] != (height, width) or len(masks) not in (1, len(images)):
            each = f" or [{len(images)}, {height}, {width}]" if len(images) > 1 else ""
            raise UserError(
                f"the masks are {masks.dtype} {list(masks.shape)}: give bool [1, {height}, {width}]{each}, true where "
                "to paint"
            )
        self.masks = masks

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        return EditingModel.build(loaded, renoising_settings(loaded.settings, cls.command), _path)

    @classmethod
    def read(cls, model: EditingModel) -> Inpaint:
        given = read_given(model)
        settings = model.settings
        size = height_width(settings.model.size)
        masks = read_masks(settings.inpaint.mask, size, given.names, settings.reading)
        edit = cls(model, given.arrays, masks, given.labels)
        edit.sources = given.file_names
        return edit

    def masks_of(self, numbers: Sequence[int]) -> np.ndarray:
        """The masks of images with these numbers, bool [N, H, W]."""
        return self.masks[[i % len(self.images) % len(self.masks) for i in numbers]]

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        originals, masks = self.originals(numbers), self.masks_of(numbers)
        unknown = th.from_numpy(masks[:, None].astype(np.float32)).to(distributed.dev())
        rule = solvers.Inpaint(self.model.sampler.make_rule(), self.model.to_device(originals), unknown)
        painted = self.images_from(numbers, rule=rule)
        # Rounding to 8 bits would change some of the known pixels by one.
        return np.where(masks[..., None], painted, originals)

    def shown_beside(self, number: int) -> np.ndarray:
        return np.where(self.masks_of([number])[0][..., None], np.uint8(GREY), super().shown_beside(number))

    def describe(self) -> dict[str, Any]:
        options = self.model.settings.inpaint
        repaint = {"jump_length": options.jump_length, "resamplings": options.resamplings}
        return {**super().describe(), **repaint, "masks_sha256": sha256(self.masks)}


def _path(settings: Any, sampler: Sampler) -> list[int]:
    options = settings.inpaint
    return repaint_path(sampler.diffusion.num_timesteps, options.jump_length, options.resamplings)
