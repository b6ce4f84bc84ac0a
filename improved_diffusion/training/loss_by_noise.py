"""The error of a model's predictions by noise level on a finite set of images, and the floor of that error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch as th

from .. import distributed
from ..config import UserError
from ..data.dataset import ImageDataset, UnreadableImage, max_unreadable, quiet, selection
from ..gaussian_diffusion import ModelMeanType
from ..logs import logger
from ..logs.progress import Progress
from ..optimal_denoiser import error_factor, posterior
from ..sampling.noise import SeededNoise

SEED = 20250616  # of timesteps and noise: not an option, so that the numbers of different runs can be compared
MAX_BYTES = 2**30  # of the images in memory, as bytes
PART_BYTES = 2**25  # of the pixels in float64 that are worked on at once
BATCH = 512  # noisy images at once, at most: more make the products of matrices no faster
ERRORS_BELOW = 4.0  # standard errors below the floor that are no chance
# Memorised: a loss of less than NEAR times the floor, where a noisy image could be of less than FEW of the images (of
# its class), or of hardly more than one.
NEAR, FEW, ONE = 1.25, 0.1, 1.5

TARGETS = {ModelMeanType.EPSILON: "epsilon", ModelMeanType.START_X: "x_0", ModelMeanType.VELOCITY: "v"}


class FiniteSet:
    """Images in memory: those of a data set, or a fixed selection of them.

    :param usable: indices of the images to take them from.
    :param most: how many to take at most; no more than fit into MAX_BYTES in any case.
    :param mirror: the set has the mirror image of each too, as with --random_flip.
    Reads the images; a few unreadable ones are left out, as in training. Raises UserError for more, and for random
    crops, which are no finite set.
    """

    def __init__(self, dataset: ImageDataset, usable: np.ndarray, most: int, mirror: bool = False):
        if dataset.reading.resize_mode == "random_crop":
            raise UserError(
                "the floor of the loss is that of a finite set of images, but --resize_mode random_crop takes other "
                "pixels each time: choose another --resize_mode"
            )
        self.shape = (dataset.channels, *dataset.resolution)
        self.dims, self.total, self.mirror = math.prod(self.shape), len(usable), mirror
        chosen = usable[selection(len(usable), min(most, max(MAX_BYTES // self.dims, 1)))]
        self.pixels, read = _read(dataset, chosen)
        self.classes = None if dataset.local_classes is None else np.asarray(dataset.local_classes, np.int64)[read]
        self.is_whole = len(chosen) == len(usable)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def per_class(self) -> float:
        """How many images there are, or of a class on average; mirror images count."""
        classes = 1 if self.classes is None else len(np.unique(self.classes))
        return len(self) * (1 + self.mirror) / classes

    def pick(self, rows: np.ndarray, mirrored: np.ndarray, device: th.device | str = "cpu") -> th.Tensor:
        """Some of the images: float64 [M, C, H, W] in [-1, 1]. :param mirrored: bool [M], left to right."""
        batch = in_model_range(self.pixels[th.from_numpy(rows)].to(device))
        return th.where(th.from_numpy(mirrored).to(device)[:, None, None, None], batch.flip(3), batch)

    def parts(self, rows: np.ndarray, device: th.device | str) -> Iterator[th.Tensor]:
        """Some of the images, then the mirror images of the same if the set has them: float64 [n, D] each."""
        size = max(min(PART_BYTES // (8 * self.dims), PART_BYTES // (8 * BATCH)), 1)
        for flip in (False, True) if self.mirror else (False,):
            for start in range(0, len(rows), size):
                part = self.pixels[th.from_numpy(rows[start : start + size])].to(device)
                yield in_model_range(part.flip(3) if flip else part).flatten(1)

    def model_kwargs(self, rows: np.ndarray, device: th.device) -> dict[str, th.Tensor]:
        """What the network gets with these images."""
        return {} if self.classes is None else {"y": th.from_numpy(self.classes[rows]).to(device)}


def _read(dataset: ImageDataset, numbers: np.ndarray) -> tuple[th.Tensor, np.ndarray]:
    """(uint8 [n, C, H, W], the indices of those that could be read)."""
    pixels = th.empty(len(numbers), dataset.channels, *dataset.resolution, dtype=th.uint8)
    read: list[int] = []
    problems: list[str] = []
    with closing(Progress("reading images", len(numbers), "image")) as bar, quiet():
        for number in numbers.tolist():
            try:
                pixels[len(read)] = th.from_numpy(dataset.pixels(number)).permute(2, 0, 1)
                read.append(number)
            except UnreadableImage as error:
                problems.append(str(error))
            bar.update(1)
    if not read or len(problems) > max_unreadable(len(numbers)):
        raise UserError(
            f"{len(problems)} of {len(numbers)} images are unreadable: {problems[0]}: repair or remove them"
        )
    for problem in problems:
        logger.warn(f"{problem}: left out")
    return pixels[: len(read)], np.array(read)


def in_model_range(pixels: th.Tensor) -> th.Tensor:
    """float64 in [-1, 1] of bytes."""
    return pixels.double().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Level:
    """A range of timesteps, and the numbers of the draws in it."""

    index: int
    first: int
    last: int
    chosen: np.ndarray


@dataclass(frozen=True)
class Draws:
    """Which of the images get the noise of which timesteps. Draw number k has the noise of (SEED, k)."""

    images: FiniteSet
    alpha_bar: np.ndarray  # [T]
    rows: np.ndarray  # int64 [M], of the images
    mirrored: np.ndarray  # bool [M]
    t: np.ndarray  # int64 [M]

    @classmethod
    def of(cls, images: FiniteSet, alpha_bar: np.ndarray, count: int) -> Draws:
        """`count` draws. Each image has its share of them, and each of `count` equal strata of the timesteps one."""
        rng, n = np.random.default_rng(SEED), len(images)
        rows = np.concatenate([rng.permutation(n) for _ in range(-(-count // n))])[:count]
        t = ((rng.permutation(count) + rng.random(count)) * len(alpha_bar) / count).astype(np.int64)
        return cls(images, alpha_bar, rows, images.mirror & (rng.random(count) < 0.5), t)

    def __len__(self) -> int:
        return len(self.t)

    def at(self, numbers: np.ndarray) -> Draws:
        """Some of them."""
        return replace(self, rows=self.rows[numbers], mirrored=self.mirrored[numbers], t=self.t[numbers])

    def in_units_of(self, target: str, errors: np.ndarray) -> np.ndarray:
        """Squared errors of x_0 at each draw, [M], as those of `target`: x_0, epsilon or v."""
        return errors * error_factor(self.alpha_bar, target)[self.t]

    def levels(self, count: int) -> list[Level]:
        """The draws by `count` equal ranges of timesteps, such as the 4 quarters of the log; ranges without draws are
        left out."""
        num_timesteps = len(self.alpha_bar)
        count = min(count, num_timesteps)
        first = [-(-k * num_timesteps // count) for k in range(count + 1)]
        place = count * self.t // num_timesteps
        found = [Level(k, first[k], first[k + 1] - 1, np.flatnonzero(place == k)) for k in range(count)]
        return [level for level in found if len(level.chosen)]


class Mean(NamedTuple):
    """A mean and its standard error, which is nan for a single value."""

    value: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        n = len(values)
        return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)


@dataclass(frozen=True)
class LossByNoise:
    """The floor of the squared error at each draw, and where a model was measured its squared error: float64 [M].

    Both are of x_0, mean over the pixels.
    """

    draws: Draws
    floor: np.ndarray
    concentration: np.ndarray  # sum of the posterior's squared weights
    model: np.ndarray | None = None

    def with_model(self, errors: np.ndarray) -> LossByNoise:
        """The same with the errors of a model, at the same draws."""
        return replace(self, model=errors)

    def floor_at(self, level: Level, target: str) -> Mean:
        """The floor of a range of timesteps."""
        return self._mean(self.floor, level, target)

    def model_at(self, level: Level, target: str) -> Mean:
        """The model's mean squared error of a range of timesteps."""
        assert self.model is not None
        return self._mean(self.model, level, target)

    def excess_at(self, level: Level, target: str) -> Mean:
        """The model's error above the floor: at the same draws, so that much of the chance cancels."""
        assert self.model is not None
        return self._mean(self.model - self.floor, level, target)

    def images_at(self, level: Level) -> float:
        """Of how many images a noisy image of these timesteps could be, about: 1 / the mean sum of squared weights."""
        return float(1 / self.concentration[level.chosen].mean())

    def below_floor(self, target: str, count: int) -> list[str]:
        """A sentence for each of `count` ranges of timesteps in which the model is below the floor by more than
        chance."""
        return [self._sentence(level, target) for level in self.draws.levels(count) if self._is_below(level, target)]

    def memorised(self, target: str, count: int) -> list[str]:
        """A sentence for each of `count` ranges of timesteps in which the model knows the images one by one: a noisy
        image could be of few of them, and the model is as good as the floor."""
        found = []
        for level in self.draws.levels(count):
            images, floor, model = self.images_at(level), self.floor_at(level, target), self.model_at(level, target)
            if images < max(FEW * self.draws.images.per_class, ONE) and model.value < NEAR * floor.value:
                found.append(
                    f"timesteps {level.first} to {level.last}: the loss, {model.value:.4g}, is that of a model that "
                    f"has memorised the images: the floor is {floor.value:.4g}, and a noisy image could be of about "
                    f"{images:.3g} of them"
                )
        return found

    def _mean(self, errors: np.ndarray, level: Level, target: str) -> Mean:
        return Mean.of(self.draws.in_units_of(target, errors)[level.chosen])

    def _is_below(self, level: Level, target: str) -> bool:
        excess = self.excess_at(level, target)
        return excess.value < -ERRORS_BELOW * excess.error  # False for nan

    def _sentence(self, level: Level, target: str) -> str:
        model, floor, excess = (f(level, target) for f in (self.model_at, self.floor_at, self.excess_at))
        return (
            f"timesteps {level.first} to {level.last}: the loss on these images, {model.value:.4g}, is below its "
            f"floor, {floor.value:.4g}, by {-excess.value:.2g} +- {excess.error:.2g}: no prediction from a noisy image "
            "and its class can be, so the network is given more than these, or its loss is computed wrongly"
        )


def measure_floor(draws: Draws) -> LossByNoise:
    """The floor at each draw; of images with classes, that of a model that is told the class. Collective."""
    images = draws.images
    device = distributed.dev() if distributed.has_float64(distributed.dev()) else th.device("cpu")
    classes = np.zeros(len(images), np.int64) if images.classes is None else images.classes
    size = min(max(PART_BYTES // (8 * images.dims), 1), BATCH)
    found, mine = np.zeros((2, len(draws))), _mine(draws)
    with closing(Progress("floor of the loss", len(mine), "noisy image")) as bar:
        for c in np.unique(classes):
            rows = np.flatnonzero(classes == c)
            of_class = mine[classes[draws.rows[mine]] == c]
            for start in range(0, len(of_class), size):
                numbers = of_class[start : start + size]
                found[:, numbers] = _posterior(draws.at(numbers), numbers, rows, device)
                bar.update(len(numbers))
    floor, concentration = sum(distributed.all_gather_object(found))
    return LossByNoise(draws, floor, concentration)


def _mine(draws: Draws) -> np.ndarray:
    """The numbers of this rank's share of the draws."""
    return np.arange(len(draws))[distributed.get_rank() :: distributed.get_world_size()]


def _posterior(draws: Draws, numbers: np.ndarray, rows: np.ndarray, device: th.device) -> np.ndarray:
    """Variance and concentration at some draws, among the images `rows` only: [2, M]."""
    x_0 = draws.images.pick(draws.rows, draws.mirrored, device)
    own = np.searchsorted(rows, draws.rows) + draws.mirrored * len(rows)
    alpha_bar = draws.alpha_bar[draws.t]
    found = posterior(
        x_0.flatten(1), SeededNoise(SEED, numbers)(x_0).flatten(1), th.from_numpy(own).to(device),
        th.from_numpy(alpha_bar).to(device), draws.images.parts(rows, device),
    )  # fmt: skip
    return th.stack(found).cpu().numpy()


def model_errors(
    model: Any, diffusion: Any, draws: Draws, batch_size: int, device: th.device,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:  # fmt: skip
    """The squared error of the x_0 that a model predicts at each draw, mean over the pixels: float64 [M]. Collective.

    :param report: called with the number of draws after each batch.
    """
    found, mine = np.zeros(len(draws)), _mine(draws)
    for start in range(0, len(mine), batch_size):
        numbers = mine[start : start + batch_size]
        part = draws.at(numbers)
        x_0 = part.images.pick(part.rows, part.mirrored).float().to(device)
        t = th.from_numpy(part.t).to(device)
        x_t = diffusion.q_sample(x_0, t, noise=SeededNoise(SEED, numbers)(x_0))
        kwargs = part.images.model_kwargs(part.rows, device)
        with th.no_grad():
            out = diffusion.p_mean_variance(model, x_t, t, clip_denoised=False, model_kwargs=kwargs)
        found[numbers] = (out["pred_xstart"] - x_0).square().mean(dim=(1, 2, 3)).cpu().double().numpy()
        report(len(numbers))
    return sum(distributed.all_gather_object(found))


def target_of(diffusion: Any) -> str:
    """What the squared error of training, `mse`, is of: epsilon, x_0 or v."""
    return TARGETS[diffusion.model_mean_type]
