"""Bits/dim of images under a trained model: evaluated on all ranks, and written so that others can check them."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..bound import BoundSummary, stratified_timesteps, summarize_bound
from ..config import UserError
from ..data.dataset import selection
from ..logs import logger
from ..logs.progress import Progress
from ..sampling.noise import SeededNoise
from ..utils import files, images
from .likelihood_plot import write_terms_plot

# Pixels of one forward pass, from which on more are no faster: on CPUs one image of 128x128 (benchmarks/nll_speed.py);
# on GPUs, which need more to be busy, four of 256x256.
PIXELS_PER_PASS = {"cpu": 2**14, "cuda": 2**18}
PUBLISHED_TERMS = ("vb", "mse", "xstart_mse")


class Evaluation:
    """The bound of images of a data set, as --num_samples, --nll_timesteps, ... ask for it.

    Image i's noise, and where only some timesteps are evaluated those too, come from seed + i alone.
    :param dataset: images and keyword arguments of the network, as ImageDataset gives them.
    Raises UserError for more timesteps than there are, and for one that would have to stand for all.
    """

    def __init__(self, options: argparse.Namespace, diffusion: Any, dataset: Any) -> None:
        self.options, self.diffusion, self.dataset = options, diffusion, dataset
        self.numbers = selection(len(dataset), options.num_samples).tolist()
        self.num_timesteps = diffusion.num_timesteps
        count = options.nll_timesteps
        if count > self.num_timesteps:
            raise UserError(
                f"--nll_timesteps {count} is more than the {self.num_timesteps} timesteps that there are: give at most "
                f"{self.num_timesteps}, or 0 for the whole bound"
            )
        if count == 1 < self.num_timesteps:
            raise UserError(
                f"--nll_timesteps 1 of {self.num_timesteps}: the last step, always evaluated, cannot stand for the "
                "others: give at least 2, or 0 for the whole bound"
            )
        self.evaluations = count or self.num_timesteps

    def run(self, model: Any) -> BoundSummary:
        """Evaluate. The terms are on rank 0 alone. Collective.

        `terms` has `prior_bpd` [N] and `vb`, `mse`, `xstart_mse` [N, T], of t = T-1 down to 0; of an estimate they are
        [N, K], of the rising `timesteps`, which count by their `weights`.
        """
        n, rank, world_size = len(self.numbers), distributed.get_rank(), distributed.get_world_size()
        logger.log(
            f"{n} of the {len(self.dataset)} images in {self.options.data_dir}, {self.evaluations} evaluations each"
        )
        step = self.options.batch_size * world_size
        rounds = [
            (np.array_split(self.numbers[start : start + step], world_size)[rank].tolist(),)
            for start in range(0, n, step)
        ]
        bar = Progress("evaluating", n, "image")

        def report(done: int, mean: float) -> None:
            logger.log(f"done {done} samples: bpd={mean}")
            bar.update(done - bar.done)

        def bound(indices: list[int]) -> dict[str, np.ndarray]:
            return self._bound(model, indices) if indices else {}

        result = summarize_bound(rounds, bound, distributed.all_gather_object, report, keep_terms=rank == 0)
        bar.close()
        return result

    def _bound(self, model: Any, indices: list[int]) -> dict[str, np.ndarray]:
        device = distributed.dev()
        batch, kwargs = th.utils.data.default_collate([self.dataset[i] for i in indices])
        seeds = [self.options.seed + i for i in indices]
        chosen: dict[str, np.ndarray] = {}
        if self.options.nll_timesteps:
            offsets = np.array([np.random.default_rng(seed).random() for seed in seeds])
            t, weights = stratified_timesteps(self.num_timesteps, self.evaluations, offsets)
            chosen = {"timesteps": t, "weights": weights}
        terms = self.diffusion.calc_bpd_loop(
            model,
            batch.to(device),
            clip_denoised=self.options.clip_denoised,
            model_kwargs={key: value.to(device) for key, value in kwargs.items()},
            noise_fn=SeededNoise(seeds),
            timesteps_per_pass=self.options.timesteps_per_pass
            or timesteps_per_pass(batch.shape, self.evaluations, device.type),
            **{key: th.from_numpy(value).to(device) for key, value in chosen.items()},
        )
        return {key: value.cpu().numpy() for key, value in terms.items()} | chosen


def timesteps_per_pass(shape: tuple[int, ...], count: int, device: str = "cpu") -> int:
    """How many of `count` timesteps to evaluate at once, of images [N, C, H, W]: a pass of small ones is faster for
    more of them, and one of large ones keeps its memory."""
    n, _, height, width = shape
    return min(max(PIXELS_PER_PASS.get(device, PIXELS_PER_PASS["cuda"]) // (n * height * width), 1), count)


def describe_mean(result: BoundSummary) -> str:
    """The mean and its standard error as text."""
    n = len(result.total_bpd)
    error = f" +- {result.standard_error:.4f} (standard error over {n} images)" if n > 1 else " (a single image)"
    return f"{result.mean:.4f}{error}"


def write_results(
    out_dir: str, result: BoundSummary, options: argparse.Namespace, metadata: dict[str, Any], num_timesteps: int
) -> None:
    """Write per_image.npz, nll.json and nll_terms.png, and of a whole bound the published means over the images.

    :param metadata: of the checkpoint.
    """
    if "weights" in result.terms:
        if not math.isnan(result.timesteps_error):
            logger.log(f"of the standard error, {result.timesteps_error:.4f} comes from the timesteps left out")
        logger.log("no vb_terms.npz and the like: an estimate has no means over the images at every timestep")
    else:
        for name in PUBLISHED_TERMS:
            means = result.terms[name].mean(axis=0, dtype=np.float64)
            images.save_npz(os.path.join(out_dir, f"{name}_terms.npz"), means.astype(np.float32))
    images.save_npz(os.path.join(out_dir, "per_image.npz"), total_bpd=result.total_bpd, **result.terms)
    content = describe_result(result, options, metadata, num_timesteps)
    files.write_bytes(os.path.join(out_dir, "nll.json"), (json.dumps(content, indent=1) + "\n").encode())
    path = os.path.join(out_dir, "nll_terms.png")
    try:
        write_terms_plot(path, result, num_timesteps)
    except UserError as error:
        logger.warn(f"no {path}: {error}")


def describe_result(
    result: BoundSummary, options: argparse.Namespace, metadata: dict[str, Any], num_timesteps: int
) -> dict[str, Any]:
    """The number, and what somebody needs to arrive at it too."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value  # which JSON does not have

    return {
        "bits_per_dim": result.mean,
        "standard_error": number(result.standard_error),
        "standard_error_of_timesteps": number(result.timesteps_error),
        "prior_bits_per_dim": float(result.terms["prior_bpd"].mean(dtype=np.float64)),
        "images": len(result.total_bpd),
        "timesteps": num_timesteps,
        "nll_timesteps": options.nll_timesteps,
        "diffusion_steps": options.diffusion_steps,
        "timestep_respacing": options.timestep_respacing,
        "clip_denoised": options.clip_denoised,
        "seed": options.seed,
        "data_dir": files.full_path(options.data_dir),
        "model_path": files.full_path(options.model_path),
        "model_sha256": files.sha256(options.model_path),
        "model_step": metadata.get("step"),
    }
