"""What is watched while a student trains: samples in as few steps as it is for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th

from ...config import SamplerConfig, UserError
from ...gaussian_diffusion import last_sample
from ...logs import logger
from ...respace import SpacedDiffusion
from ...sampling.noise import SeededNoise
from ...sampling.sampler import Sampler, build_sampler
from ...utils import images
from ..hooks import TrainingView
from ..preview import PreviewGrid
from ..validation import HeldOutImages, with_averages


class _Sampling(NamedTuple):
    sampler: SamplerConfig
    model: Any
    diffusion: Any


def few_steps(settings: Any, diffusion: SpacedDiffusion, name: str, grid: str = "auto") -> Sampler:
    """The sampler that a student is for.

    :param name: of the solver; :param grid: of its timesteps.
    """
    options = SamplerConfig(sampler=name, timestep_grid=grid, steps=settings.distill.to)
    return build_sampler(_Sampling(options, settings.model, settings.diffusion), diffusion)


class FewStepGrid(PreviewGrid):
    """Grids of samples in few steps.

    :param sampler: of the student; the other arguments are PreviewGrid's.
    """

    def __init__(self, sampler: Sampler, *arguments: Any):
        super().__init__(sampler.diffusion, *arguments)
        self.sampler = sampler

    def sample(self, view: TrainingView, noise: SeededNoise, model_kwargs: dict[str, Any]) -> th.Tensor:
        return last_sample(self.sampler.trajectory(view.model, self.shape, noise, model_kwargs))


class FewStepValidation(HeldOutImages):
    """The energy distance between samples in few steps and held-out images.

    It is 2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013), not negative in the limit, and 0 only where samples
    x and images y have the same distribution: a blurred sample costs as well as a wrong one. Its unit is the root mean
    square of a pixel's difference, in [0, 2]. Samples have the classes and the low_res of the held-out images, and the
    same noise every time.
    Logs `val_loss` and its standard error over the images `val_loss_se`, and the same of each average with `_ema_LABEL`
    after val_loss.
    :param sampler: of the student; the other arguments are HeldOutImages'.
    """

    def __init__(self, objective: Any, dataset: Any, *, sampler: Sampler, **options: Any):
        super().__init__(objective, dataset, **options)
        self.sampler = sampler
        if self.num_images < 2:
            raise UserError("--val_images 1: a distillation compares sets of samples and images: give two or more")

    def _rows(self, view: TrainingView, numbers: list[int]) -> np.ndarray:
        """A sample and a held-out image, uint8 [N, 2, C H W]."""
        batch, kwargs = self._batch(view, numbers)
        samples = last_sample(
            self.sampler.trajectory(view.model, tuple(batch.shape[1:]), self.noise_of(numbers), kwargs)
        )
        real = images.to_uint8(batch + 0.5 / 127.5)  # to_uint8 truncates
        pairs = np.stack([images.to_uint8(samples), real], axis=1)
        return pairs.reshape(len(numbers), 2, -1)

    def _table(self, view: TrainingView, params: Sequence[th.Tensor]) -> np.ndarray:
        return energy_terms(super()._table(view, params))[:, None]

    def log(self, steps: int, tables: Mapping[str, np.ndarray]) -> None:
        texts = {}
        for label, table in tables.items():
            mean, error = float(table.mean()), float(table.std(ddof=1)) / math.sqrt(len(table))
            suffix = f"_ema_{label}" if label else ""
            logger.logkv(f"val_loss{suffix}", mean)
            logger.logkv(f"val_loss{suffix}_se", error)
            texts[label] = f"{mean:.4f} +- {error:.4f}"
        counted = f"{self.sampler.steps} steps of {self.sampler.name}"
        logger.log(f"validation after {steps} steps: energy distance in {counted} {with_averages(texts)}")


def energy_terms(pairs: np.ndarray) -> np.ndarray:
    """Each pair's share of the energy distance between samples and images: float64 [N], whose mean estimates it.

    :param pairs: uint8 [N, 2, D], N > 1: a sample and an image, which are not compared with each other, since a sample
        may have been made from its image.
    """
    x, y = (th.from_numpy(pairs[:, i]).float() / 127.5 for i in (0, 1))
    n, unit = len(x), math.sqrt(x.shape[1])
    terms = th.zeros(n, dtype=th.float64)
    for one, other, sign in ((x, y, 1), (y, x, 1), (x, x, -1), (y, y, -1)):
        distances = th.cdist(one, other).double()
        terms += sign * (distances.sum(dim=1) - distances.diagonal()) / (n - 1)
    return terms.numpy() / unit
