"""A model prepared for editing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, height_width
from ..config.settings import Editing
from ..models.build import build_diffusion
from ..sampling.guided import guide, prepare_model
from ..sampling.images import SamplingStep
from ..sampling.labels import Classes, Labels, image_labels
from ..sampling.noise import SeededNoise
from ..sampling.sampler import Sampler, build_sampler
from ..sampling.solvers import BothWays, Rule
from ..utils.images import from_uint8


@dataclass(frozen=True)
class EditingModel:
    """A model prepared for one editing command.

    :param loaded: its settings include the command's defaults.
    :param sampler: with the command's path over the noise levels.
    :param model: on the device, with guidance.
    :param classes: what its labels mean; None for an unconditional model.
    :param on_step: called with a SamplingStep after each step of each batch.
    """

    loaded: LoadedModel[Any]
    sampler: Sampler
    model: th.nn.Module
    classes: Classes | None
    on_step: Callable[[SamplingStep], None] | None = None

    @classmethod
    def build(
        cls, loaded: LoadedModel[Any], settings: Editing, path: Callable[[Any, Sampler], Sequence[int]]
    ) -> EditingModel:
        """The model with a command's settings.

        :param path: (settings, sampler) -> the levels to visit. Collective.
        Raises UserError for options that contradict each other or the model.
        """
        changed = settings.diffusion != loaded.settings.diffusion
        diffusion = build_diffusion(settings.diffusion) if changed else loaded.diffusion
        loaded = replace(loaded, settings=settings, diffusion=diffusion)
        sampler = build_sampler(settings, diffusion)
        sampler = replace(sampler, path=path(settings, sampler))
        model, sampler, classes = guide(loaded, prepare_model(settings.sampler, loaded.model), sampler)
        return cls(loaded, sampler, model, classes)

    @property
    def settings(self) -> Any:
        """The command's settings."""
        return self.loaded.settings

    @property
    def seed(self) -> int:
        """The seed that all noise and random classes follow from, together with the images' numbers."""
        return self.settings.run.seed

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.settings.model.channels, *height_width(self.settings.model.size))

    def labels(self, found: Any, count: int, source: str) -> Labels | None:
        """The class of each of `count` images: of --classes, else `found` with the images; None without classes.

        :param source: where the images come from, for messages. Raises UserError where the model needs classes and
            there are none.
        """
        wanted = self.settings.edit.classes
        return image_labels(self.classes, wanted, self.seed, self.loaded.path, found, count, source)

    def trajectory(
        self, numbers: Sequence[int], model_kwargs: Mapping[str, th.Tensor], **start: Any
    ) -> Iterator[dict[str, th.Tensor]]:
        """`sample` and `pred_xstart` [N, C, H, W] after each step.

        :param numbers: of the images, which with the seed decide all noise that is drawn.
        :param model_kwargs: `y` of a model with classes.
        :param start: `noise`, `path` and `rule`, see Sampler.trajectory.
        """
        noise = SeededNoise(self.seed, numbers)
        outs = self.sampler.trajectory(self.model, self.shape, noise, model_kwargs, **start)
        return outs if self.on_step is None else self._watched(self.on_step, outs, numbers, **start)

    def _watched(
        self, on_step: Callable[[SamplingStep], None], outs: Iterator[dict[str, th.Tensor]], numbers: Sequence[int],
        path: Sequence[int] | None = None, rule: Rule | None = None, **start: Any,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """The steps, each shown to `on_step`; those that only add noise are not."""
        both_ways = rule is not None and rule.both_ways
        steps = sum(there < here or both_ways for here, there in pairwise(self.sampler.path if path is None else path))
        names, index = self.classes.names if self.classes else None, 0
        for out in outs:
            if out["pred_xstart"] is not None:
                on_step(SamplingStep(index, steps, numbers, out["pred_xstart"], out["sample"], names))
                index += 1
            yield out

    def to_device(self, images: np.ndarray) -> th.Tensor:
        """uint8 [N, H, W, C] as the network takes them: float32 [N, C, H, W] in [-1, 1]."""
        return from_uint8(images).to(distributed.dev())

    def find_noise(self, images: np.ndarray, model_kwargs: Mapping[str, th.Tensor]) -> th.Tensor:
        """The noise [N, C, H, W] that leads to the images, uint8 [N, H, W, C] (DDIM sec. 5.4)."""
        # The clean image enters at the least noisy level that the network knows.
        up, rule = range(self.sampler.diffusion.num_timesteps), BothWays(self.sampler.make_rule())
        numbers = range(len(images))  # no noise is drawn
        for out in self.trajectory(numbers, model_kwargs, noise=self.to_device(images), path=up, rule=rule):
            x = out["sample"]
        return x

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """The images, where they are uint8 [N, H, W, C] of the model's size. Raises UserError otherwise."""
        channels, height, width = self.shape
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
            raise UserError(
                f"the images are {images.dtype} {list(images.shape)}, but {self.loaded.path} takes uint8 "
                f"[N, {height}, {width}, {channels}] (height, width, channels): convert and resize them"
            )
        return images


def straight(settings: Any, sampler: Sampler) -> Sequence[int]:
    """The path of plain sampling."""
    return sampler.path


def inversion_path(settings: Any, sampler: Sampler) -> Sequence[int]:
    """The path of plain sampling. Raises UserError where it has a single step, which has no way back."""
    if sampler.diffusion.num_timesteps < 2:
        raise UserError(f"--steps {sampler.steps}: going from an image to its noise needs at least two steps")
    return sampler.path
