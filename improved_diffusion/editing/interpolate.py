"""Images between two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, number_list
from ..config.settings import Interpolation
from ..logs import logger
from ..sampling.labels import Labels, label_kwargs
from ..sampling.noise import SeededNoise, slerp
from ..sampling.solvers import NOISY
from ..utils import files
from ..utils import images as image_files
from .base import Edit, full_paths, read_given, sha256, source_name
from .model import EditingModel, inversion_path, straight
from .options import inversion_settings, refuse_options


class Interpolate(Edit):
    """Makes --frames images between two, by going along the arc between their noises (DDIM sec. 5.3).

    :param images: uint8 [2, H, W, C] of the model's size; None: between the two images of --seed that --seeds names.
    :param labels: the classes of the two images; None where they have none.
    Each frame has the class of the nearer end.
    """

    command = "interpolate"

    def __init__(self, model: EditingModel, images: np.ndarray | None = None, labels: Sequence[int] | None = None):
        self.numbers = number_list(model.settings.interpolate.seeds)
        self.images = None if images is None else model.check_images(images)
        if bool(self.numbers) == (images is not None):
            raise UserError(
                "interpolate goes between two images or two seeds: give --images A.png,B.png or --seeds 3,7"
            )
        if self.images is not None and len(self.images) != 2:
            raise UserError(f"{source_name(model.settings)}: {len(self.images)} images, but interpolate takes two")
        if self.numbers and model.classes:
            drawn = Labels(model.classes.num, model.seed, [], None, model.classes.seen)
            labels = [drawn.index(number) for number in self.numbers]
        ends = model.labels(labels, 2, source_name(model.settings))
        super().__init__(model, ends and self._labels_of_frames(model.settings, ends))

    @staticmethod
    def _labels_of_frames(settings: Interpolation, ends: Labels) -> Labels:
        if len(ends.classes) > 2:
            raise UserError(f"--classes {settings.edit.classes}: give one for all frames, or one for each end")
        first, last = ends.classes[0], ends.classes[-1]
        of_frames = [last if weight > 0.5 else first for weight in _weights(settings.interpolate.frames)]
        return Labels(ends.num_classes, ends.seed, of_frames, ends.class_names)

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        if not loaded.settings.interpolate.seeds:
            return EditingModel.build(loaded, inversion_settings(loaded.settings, loaded.given), inversion_path)
        return EditingModel.build(loaded, settings_between_seeds(loaded.settings), straight)

    @classmethod
    def read(cls, model: EditingModel) -> Interpolate:
        if not model.settings.images.images:
            return cls(model)
        given = read_given(model)
        return cls(model, given.arrays, given.labels)

    @property
    def count(self) -> int:
        return self.model.settings.interpolate.frames

    @cached_property
    def ends(self) -> th.Tensor:
        """The noise of the two ends, [2, C, H, W]."""
        if self.images is not None:
            return self.model.find_noise(self.images, label_kwargs(self.labels, [0, self.count - 1]))
        empty = th.empty(2, *self.model.shape, device=distributed.dev())
        return SeededNoise(self.model.seed, self.numbers)(empty)

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        """The frames with these numbers, 0 the first end and `count` - 1 the other: uint8 [N, H, W, C]."""
        weights, ends = _weights(self.count), self.ends
        noise = th.cat([slerp(ends[:1], ends[1:], weights[i]) for i in numbers])
        return self.images_from(numbers, noise=noise)

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"frames": self.count, "seeds": self.model.settings.interpolate.seeds}
        if self.images is not None:
            found |= {"images": full_paths(self.model.settings.images.images), "images_sha256": sha256(self.images)}
        return found

    def write(self, out_dir: str) -> str:
        """Write the frames, and show them in a strip and an animation. Collective."""
        path = super().write(out_dir)
        distributed.from_rank0(_write_animation, out_dir, path)
        return path


def settings_between_seeds(settings: Interpolation) -> Interpolation:
    """The settings for going between two samples: DDIM unless another sampler is given, as in sampling.

    Raises UserError for a sampler that draws noise at each step.
    """
    if settings.sampler.sampler == "auto":
        settings = settings.replace(sampler="ddim")
    why = "draws noise at each step, so that the frames would not follow each other"
    if settings.sampler.sampler in NOISY:
        raise UserError(f"--sampler {settings.sampler.sampler} {why}: choose another, such as ddim or dpmpp_2m")
    refuse_options(settings, f"{why}: leave it out", ddim_eta=0, churn=0)
    return settings


def _weights(frames: int) -> list[float]:
    return [k / (frames - 1) for k in range(frames)]


def _write_animation(out_dir: str, path: str) -> None:
    """The frames side by side, and as an animation to the other end and back."""
    frames = image_files.load_npz(path)
    strip, gif = files.join(out_dir, "interpolation.png"), files.join(out_dir, "interpolation.gif")
    image_files.save_strip(strip, frames[None])
    image_files.save_gif(gif, np.concatenate([frames, frames[-2:0:-1]]))
    logger.log(f"wrote {strip} and {gif}")
