"""Noise that was found for images, back to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError
from ..logs import logger
from .base import Edit, full_paths, sha256
from .latents import STEP_OPTIONS, Latents, read_latents, read_step_options
from .model import EditingModel, straight
from .options import decoding_settings


class Decode(Edit):
    """Turns encoded noise back into images: image i from latent i modulo their number.

    :param latents: of the model's shape.
    Raises UserError for noise of another shape, and where the model needs classes and there are none.
    """

    command = "decode"

    def __init__(self, model: EditingModel, latents: Latents):
        path = model.settings.latents.latents
        source = f"--latents {path}" if path else "the array of latents"
        if latents.arrays.shape[1:] != model.shape:
            raise UserError(
                f"{source} has noise of {latents.arrays.shape[1:]}, but {model.loaded.path} makes images of "
                f"{model.shape} (channels, height, width): use the model that encoded them"
            )
        super().__init__(model, model.labels(latents.labels, len(latents.arrays), source))
        self.latents, self.sources = latents, latents.names

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any], step_options: Mapping[str, Any] | None = None) -> EditingModel:
        """The model with the steps that encoded the latents, unless the user gave others. Collective.

        :param step_options: of the latents; those of the file --latents unless given.
        """
        if step_options is None:
            step_options = distributed.from_rank0(read_step_options, loaded.settings.latents.latents)
        settings = loaded.settings
        if not loaded.given & {"use_ddim", *STEP_OPTIONS}:
            settings = settings.replace(**step_options)
        return EditingModel.build(loaded, decoding_settings(settings, loaded.given), straight)

    @classmethod
    def read(cls, model: EditingModel) -> Decode:
        return cls(model, distributed.from_rank0(read_latents, model.settings.latents.latents))

    @property
    def count(self) -> int:
        return self.model.settings.copies.num_samples or len(self.latents.arrays)

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        noise = self.latents.arrays[[i % len(self.latents.arrays) for i in numbers]]
        return self.images_from(numbers, noise=th.from_numpy(noise).to(distributed.dev()))

    def describe(self) -> dict[str, Any]:
        path = self.model.settings.latents.latents
        return {"latents": full_paths(path), "latents_sha256": sha256(self.latents.arrays)}

    def write(self, out_dir: str) -> str:
        request = self.request()
        if self.latents.model not in ("", request["model_sha256"]):
            logger.warn(
                f"{self.model.settings.latents.latents} was encoded with another checkpoint than "
                f"{self.model.loaded.path}: the images may be noise"
            )
        return self.write_images(self.draw, out_dir, request)
