"""Grids of samples during training, from the same noise every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.averages import LARGEST_SHARE
from ..config import UserError
from ..data.low_res import pairs
from ..logs import logger
from ..sampling.noise import SeededNoise
from ..sampling.timestep_grids import timestep_grid
from ..utils import files, images
from .hooks import TrainingView

PREVIEWS = 64  # images in a grid
STEPS = 25  # of DDIM, for each image


class PreviewGrid:
    """A hook for TrainLoop: a grid of samples of the model, and one of its first average that has learned enough.

    Written as previews/step_NNNNNN_raw.png and previews/step_NNNNNN.png, and sent to the trackers. While every average
    is still the first weights in part, both are the model's own. Draws nothing from the global generators, so that
    previews do not change the training.
    :param shape: (C, H, W).
    :param model_kwargs: of the given number of images, on the device; a "low_res" is shown beside each sample.
    :param seed: image i follows from (seed, i), whatever the number of ranks.
    :param captions: what to write below each image, such as its class.
    """

    def __init__(
        self, diffusion: Any, shape: Sequence[int], count: int, model_kwargs: Mapping[str, Any], out_dir: str,
        seed: int, captions: Sequence[str] = (),
    ):  # fmt: skip
        self.diffusion, self.shape, self.count, self.seed = diffusion, shape, count, seed
        self.model_kwargs, self.out_dir, self.captions = model_kwargs, out_dir, captions

    def __call__(self, view: TrainingView, /) -> None:
        """Draw the grids. Collective."""
        done = view.absolute_step + 1
        shares = view.initial_shares
        own = self._grid(view, view.parameter_sets[""])
        self._show(view, own, f"step_{done:06d}_raw.png", "samples_raw", "the model's own weights")
        if not shares:
            return
        label = next((label for label, share in shares.items() if share <= LARGEST_SHARE), None)
        grid = own if label is None else self._grid(view, view.parameter_sets[label])
        fastest = min(shares, key=lambda label: shares[label])
        still = f"the model's own weights: average {fastest} is still {shares[fastest]:.1%} initial weights"
        source = still if label is None else f"average {label}"
        self._show(view, grid, f"step_{done:06d}.png", "samples_ema", source)

    def _grid(self, view: TrainingView, params: Sequence[th.Tensor]) -> np.ndarray | None:
        """Samples of the parameters as one image, uint8 [H, W, C]; None except on rank 0. Collective."""
        with view.using(params):
            samples = self._draw(view)
        if distributed.get_rank() != 0:
            return None
        columns, captions = None, self.captions
        if "low_res" in self.model_kwargs:
            samples = pairs(images.to_uint8(self.model_kwargs["low_res"]), samples)
            columns = 2 * math.isqrt(self.count)
            captions = [text for caption in captions for text in ("", caption)]
        return images.grid(samples, columns, min_side=48, captions=captions)

    def _show(self, view: TrainingView, grid: np.ndarray | None, file_name: str, name: str, source: str) -> None:
        if grid is None:
            return
        logger.log_image(name, grid, view.absolute_step)
        directory = files.join(self.out_dir, "previews")
        try:
            files.make_dirs(directory)
            files.write_bytes(files.join(directory, file_name), images.encode_png(grid))
            logger.log(f"wrote {files.join(directory, file_name)} ({source})")
        except UserError as error:  # such as a full disk: training itself can continue
            logger.warn(f"no preview after {view.absolute_step + 1} steps: {error}")

    def _draw(self, view: TrainingView) -> np.ndarray:
        """All samples, uint8 [count, H, W, C]; each rank draws its share."""
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        mine = range(rank, self.count, world_size)
        parts = []
        # In parts as small as training's microbatches, so that a preview needs no more memory than a step.
        for start in range(0, len(mine), view.microbatch):
            numbers = list(mine[start : start + view.microbatch])
            kwargs = {key: value[numbers] for key, value in self.model_kwargs.items()}
            parts.append(images.to_uint8(self.sample(view, SeededNoise(self.seed, numbers), kwargs)))
        gathered = distributed.all_gather_object(np.concatenate(parts) if parts else None)
        samples = np.empty((self.count, *self.shape[1:], self.shape[0]), np.uint8)
        for i, part in enumerate(gathered):
            if part is not None:
                samples[i::world_size] = part
        return samples

    def sample(self, view: TrainingView, noise: SeededNoise, model_kwargs: dict[str, Any]) -> th.Tensor:
        """Samples of the present parameters [N, C, H, W], one from each noise."""
        shape = (len(noise), *self.shape)
        return self.diffusion.ddim_sample_loop(
            view.model, shape, model_kwargs=model_kwargs, device=view.device, noise_fn=noise
        )


def preview_diffusion(diffusion: Any) -> Any:
    """The diffusion on the few steps that a preview takes."""
    grid = timestep_grid("uniform", min(STEPS, diffusion.original_num_steps), diffusion.base_alphas_cumprod)
    return diffusion.respaced(grid)
