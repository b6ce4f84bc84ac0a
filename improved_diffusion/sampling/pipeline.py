"""A model with its sampler, guidance and labels: numbers of images in, images out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, comma_list, height_width, number_list, shorten
from ..config.settings import SuperResSampling
from ..data.given import GivenImages, read_images
from ..logs import logger
from ..models.acceleration import as_it_is
from ..models.build import with_levels
from ..utils.images import from_uint8
from .batches import BATCH_MEMORY, fitting_batch
from .guided import guide, prepare_model
from .labels import Labels, choose_labels, image_labels, label_kwargs
from .noise import SeededNoise
from .request import describe_request, samples_name
from .sampler import build_sampler
from .writer import last_images, write_samples, write_steps


class SamplingPipeline:
    """Draws the images of a model that its settings ask for. Collective.

    :param loaded: with the settings of image-sample or super-res-sample.
    Raises UserError for options that contradict each other or the checkpoint.
    """

    def __init__(self, loaded: LoadedModel):
        settings = loaded.settings
        self.loaded = loaded
        self._check_numbers()
        self.seed: int = settings.run.seed
        sampler = build_sampler(settings, loaded.diffusion)
        prepared = prepare_model(settings.sampler, loaded.model)
        self.model, self.sampler, self.classes = guide(loaded, prepared, sampler)
        self.labels = self._choose_labels()
        self.shape = (settings.model.channels, *height_width(settings.model.size))

    def _choose_labels(self) -> Labels | None:
        return choose_labels(self.classes, self.loaded.settings.sample.classes, self.seed, self.loaded.path)

    @property
    def name(self) -> str:
        """The default name of the samples' folder."""
        return samples_name(self.loaded, self.sampler.name, self.sampler.steps)

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the images that the settings ask for."""
        sample = self.loaded.settings.sample
        return number_list(sample.seeds) or range(sample.num_samples)

    @property
    def batch_size(self) -> int:
        """How many images this rank draws at once: --batch_size, or its share of all where that fits its memory."""
        asked: int = self.loaded.settings.sample.batch_size
        if asked:
            return asked
        share = math.ceil(len(self.numbers) / distributed.get_world_size())
        # CUDA graphs keep memory of their own, beside that of the trial runs that come before they are recorded.
        memory = BATCH_MEMORY / (2 if self.loaded.settings.sampler.cuda_graphs else 1)
        with as_it_is(self.model):
            return fitting_batch(self._try_out, share, distributed.dev(), memory)

    def _try_out(self, count: int) -> None:
        """Take the first step of some of the images."""
        next(self.trajectory(self.numbers[:count]))

    def _check_numbers(self) -> None:
        """Raise UserError where --num_samples is not the number of --seeds."""
        sample = self.loaded.settings.sample
        count = len(number_list(sample.seeds))
        if count and "num_samples" in self.loaded.given and sample.num_samples != count:
            raise UserError(
                f"--num_samples {sample.num_samples} contradicts --seeds {shorten(sample.seeds)}, which are {count:,} "
                "images: give one of them"
            )

    def asking(self, options: Mapping[str, Any]) -> SamplingPipeline:
        """The same model and sampler for other images: `options` are num_samples or seeds, seed, and classes.

        Raises UserError for a class that the model does not have, and for numbers that contradict each other.
        """
        other = copy.copy(self)
        settings = self.loaded.settings.replace(**{"seeds": "", "classes": "", **options})
        given = self.loaded.given - {"num_samples", "seeds"} | options.keys()
        other.loaded = replace(self.loaded, settings=settings, given=given)
        other._check_numbers()
        other.seed = other.loaded.settings.run.seed
        other.labels = other._choose_labels()
        return other

    def model_kwargs(self, numbers: Sequence[int]) -> dict[str, th.Tensor]:
        """What the network takes, besides x and t, for the images with these numbers."""
        return label_kwargs(self.labels, numbers)

    def trajectory(self, numbers: Sequence[int], **start: Any) -> Iterator[dict[str, th.Tensor]]:
        """`sample` and `pred_xstart` [N, C, H, W] after each step, of the images with these numbers.

        :param start: see Sampler.trajectory.
        """
        noise = SeededNoise(self.seed, numbers)
        return self.sampler.trajectory(self.model, self.shape, noise, self.model_kwargs(numbers), **start)

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        """The images with these numbers, uint8 [N, H, W, C]."""
        return last_images(self.trajectory(numbers))

    def shown_beside(self, number: int) -> np.ndarray | None:
        """An image to show beside the sample in the grid, uint8 [h, w, C]; None where there is none."""
        return None

    def write(self, out_dir: str) -> str:
        """Draw the samples that are not in the folder yet; returns the npz's path. Collective."""
        sample = self.loaded.settings.sample
        logger.log(self.sampler.describe())
        numbers = self.numbers
        if len(numbers) == sample.num_samples and not {"num_samples", "seeds"} & self.loaded.given:
            logger.log(f"drawing {len(numbers):,} images, as --num_samples is not given: --num_samples 16 draws 16")
        batch_size = min(distributed.all_gather_object(self.batch_size))
        if not sample.batch_size:
            logger.log(f"drawing {batch_size} images at once on each rank, as --batch_size is 0")
        path = write_samples(
            self.draw,
            out_dir=out_dir,
            numbers=numbers,
            batch_size=batch_size,
            labels=self.labels,
            request=describe_request(self.loaded, self.sampler),
            beside=self.shown_beside,
        )
        first = list(numbers)[:batch_size]
        write_steps(self.trajectory, out_dir, first, self.sampler.steps, sample.save_steps)
        return path


def joined_trajectory(parts: Sequence[tuple[SamplingPipeline, Sequence[int]]]) -> Iterator[dict[str, th.Tensor]]:
    """`sample` and `pred_xstart` [N, C, H, W] after each step, of images of several pipelines in one batch.

    :param parts: (pipeline, numbers of its images); all pipelines from one by `asking`.
    """
    first = parts[0][0]
    noise = SeededNoise.joined((pipeline.seed, number) for pipeline, numbers in parts for number in numbers)
    each = [pipeline.model_kwargs(numbers) for pipeline, numbers in parts]
    kwargs = {name: th.cat([found[name] for found in each]) for name in each[0]}
    return first.sampler.trajectory(first.model, first.shape, noise, kwargs)


class SuperResPipeline(SamplingPipeline):
    """Enlarges images: sample i is made from base image i modulo their number. Collective.

    With --any_size the pipeline's settings have the size of the base images and that of their enlargements.
    :param base: the images; those of --base_samples unless given.
    """

    def __init__(self, loaded: LoadedModel, base: GivenImages | None = None):
        self._given = base
        super().__init__(loaded)
        if loaded.settings.base.any_size:
            settings = at_size(loaded.settings, self.base.arrays.shape[1:3])
            self.loaded = replace(loaded, settings=settings)
            self.shape = (settings.model.channels, *height_width(settings.model.large_size))

    def _choose_labels(self) -> Labels | None:
        settings = self.loaded.settings
        path, wanted = settings.base.base_samples, settings.sample.classes
        names = self.classes.names if self.classes else None
        self.base = self._given or read_images(
            "--base_samples", path, "--small_size", base_size(settings), settings.model.channels, names,
            settings.reading, exact_npz=True,
        )  # fmt: skip
        source = f"--base_samples {path}" if path else "the base images"
        found, count = self.base.labels, len(self.base.arrays)
        return image_labels(self.classes, wanted, self.seed, self.loaded.path, found, count, source)

    @property
    def numbers(self) -> Sequence[int]:
        if {"num_samples", "seeds"} & self.loaded.given:
            return super().numbers
        return range(len(self.base.arrays))

    def model_kwargs(self, numbers: Sequence[int]) -> dict[str, th.Tensor]:
        low_res = from_uint8(np.stack([self.shown_beside(i) for i in numbers])).to(distributed.dev())
        return {"low_res": low_res, **super().model_kwargs(numbers)}

    def shown_beside(self, number: int) -> np.ndarray:
        return self.base.arrays[number % len(self.base.arrays)]


def base_size(settings: SuperResSampling) -> Any:
    """The size that base images are resized to; None: they keep theirs."""
    return None if settings.base.any_size else settings.model.small_size


def at_size(settings: SuperResSampling, size: tuple[int, int]) -> SuperResSampling:
    """The settings for base images of (height, width), enlarged as much as in training.

    Raises UserError where the levels of the network do not divide the enlarged size.
    """
    model = with_levels(settings.model)
    factor = height_width(model.large_size)[0] // height_width(model.small_size)[0]
    large = (factor * size[0], factor * size[1])
    halvings = len(comma_list(model.channel_mult, float)) - 1
    if any(side % 2**halvings for side in large):
        raise UserError(
            f"--any_size True: base images of {size[0]}x{size[1]} would become {large[0]}x{large[1]}, which the "
            f"network cannot halve {halvings} times: give sides that are multiples of "
            f"{2**halvings // math.gcd(2**halvings, factor)}"
        )
    return settings.replace(small_size=size, large_size=large, channel_mult=model.channel_mult)
