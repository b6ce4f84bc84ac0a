"""Images from a checkpoint, as the options of image_sample.py ask for them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..checkpoints.loading import load_model
from ..config import height_width
from ..logs import logger
from .guided import guide, prepare_model
from .labels import choose_labels, label_kwargs
from .request import describe_request, samples_name
from .sampler import build_sampler
from .writer import last_images, write_samples, write_steps


class Drawing:
    """The model, guided, with its sampler and labels. Collective.

    Raises UserError for options that contradict each other or the checkpoint.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        model, diffusion, metadata = load_model(options)
        self.sampler = build_sampler(options, diffusion)
        self.model, classes = guide(options, prepare_model(options, model), self.sampler.diffusion, metadata)
        self.labels = choose_labels(options, classes)
        self.request = describe_request(options, metadata, self.sampler)
        self.name = samples_name(options, self.sampler.name, self.sampler.steps)

    def _walk(self, indices: list[int]) -> Iterator[dict[str, Any]]:
        shape = (self.options.channels, *height_width(self.options.image_size))
        seeds = [self.options.seed + i for i in indices]
        return self.sampler.walk(self.model, shape, seeds, label_kwargs(self.labels, indices))

    def write(self, out_dir: str) -> str:
        """Draw the samples that are not in the folder yet; returns the npz's path. Collective."""
        options = self.options
        logger.log(self.sampler.describe())
        path = write_samples(
            lambda indices: last_images(self._walk(indices)),
            out_dir=out_dir,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            labels=self.labels,
            request=self.request,
        )
        shown = min(options.num_samples, options.batch_size)
        write_steps(self._walk, out_dir, shown, self.sampler.steps, options.save_steps)
        return path
