"""A hook for training: the loss by quarter of the timesteps, on training images beside its floor, and held-out ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import distributed
from ..data.dataset import ImageDataset
from ..logs import logger
from ..utils.text import counted
from .hooks import TrainingView
from .loss_by_noise import Draws, FiniteSet, measure_floor, model_errors, target_of

QUARTERS = 4
MOST_READ = 10_000  # images read for the floor where they are not in memory or in a packed cache
# Multiplications that the floor may take at the start of a run: about a minute of one CPU core.
MOST_WORK = 5e11


def training_set(dataset: ImageDataset, usable: np.ndarray, mirror: bool, num_draws: int) -> FiniteSet:
    """The images of a run that the floor is of: all, or as many as can be read and compared at its start."""
    dims = dataset.channels * dataset.resolution[0] * dataset.resolution[1]
    most = int(MOST_WORK / (2 * num_draws * dims * (1 + mirror)))
    if dataset.store is None or not dataset.store.holds(usable):
        most = min(most, MOST_READ)
    images = FiniteSet(dataset, usable, max(most, 1), mirror)
    if not images.is_whole:
        logger.log(
            f"--loss_floor: the floor is that of {len(images):,} of the {counted(images.total, 'image')}, as more "
            "would take too long at the start of a run: a lower bound of the floor of all"
        )
    return images


class LossFloor:
    """Logs by quarter of the timesteps the floor (floor_q0 to floor_q3) and the squared error of what the network
    predicts, on training images (train_mse_q0, ...) and on held-out ones (val_mse_q0, ...), of the model and of each
    average.

    Timesteps and noise are the same every time; nothing is drawn from the global generators. The floor is computed
    once, here. A model below it is a warning.
    :param train: images of the training; of a model with classes, with their classes.
    :param held_out: held-out images; None: there are none.
    :param num_draws: noisy images to measure on, of each set.
    :param batch_size: images in one forward pass.
    Collective.
    """

    def __init__(
        self, diffusion: Any, train: FiniteSet, held_out: FiniteSet | None, num_draws: int, batch_size: int
    ) -> None:
        self.diffusion, self.batch_size, self.target = diffusion, batch_size, target_of(diffusion)
        with distributed.working("the floor of the loss"):
            self.train = measure_floor(Draws.of(train, diffusion.alphas_cumprod, num_draws))
        self.held_out = None if held_out is None else Draws.of(held_out, diffusion.alphas_cumprod, num_draws)
        means = [self.train.floor_at(level, self.target).value for level in self.train.draws.levels(QUARTERS)]
        logger.log(f"floor of mse by quarter of the timesteps, from least to most noise: {_text(means)}")

    def __call__(self, view: TrainingView, /) -> None:
        """Measure and log. Collective."""
        self._log("floor", self.train.draws, self.train.floor)
        for label, params in view.parameter_sets.items():
            suffix, of = (f"_ema_{label}", f" of EMA {label}") if label else ("", "")
            with view.using(params):
                errors = self._errors(view, self.train.draws)
                text = f"on training images {self._log(f'train_mse{suffix}', self.train.draws, errors)}"
                if self.held_out is not None:
                    held_out = self._errors(view, self.held_out)
                    text += f", on held-out ones {self._log(f'val_mse{suffix}', self.held_out, held_out)}"
            logger.log(f"mse by quarter{of} after {view.absolute_step + 1} steps: {text}")
            for sentence in self.train.with_model(errors).below_floor(self.target, QUARTERS):
                logger.warn(f"EMA {label}: {sentence}" if label else sentence)

    def _errors(self, view: TrainingView, draws: Draws) -> np.ndarray:
        return model_errors(view.model, self.diffusion, draws, self.batch_size, view.device)

    def _log(self, name: str, draws: Draws, errors: np.ndarray) -> str:
        """Log the means by quarter; returns them as text."""
        scaled = draws.in_units_of(self.target, errors)
        means = {level.index: float(scaled[level.chosen].mean()) for level in draws.levels(QUARTERS)}
        for quarter, mean in means.items():
            logger.logkv(f"{name}_q{quarter}", mean)
        return _text(means.values())


def _text(means: Iterable[float]) -> str:
    return " ".join(f"{mean:.4g}" for mean in means)
