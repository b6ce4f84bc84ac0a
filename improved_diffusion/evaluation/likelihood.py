"""Bits/dim of images under a trained model: evaluated on all ranks, and written with what is needed to check them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..bound import BoundSummary, stratified_timesteps, summarize_bound
from ..checkpoints.loading import LoadedModel
from ..config import NLLConfig, UserError
from ..config.settings import Likelihood
from ..data.classes import class_indices
from ..data.dataset import ImageDataset, selection
from ..data.sources import open_images
from ..logs import logger
from ..logs.progress import Progress
from ..sampling.guided import to_device
from ..sampling.noise import SeededNoise, image_generator
from ..sampling.request import samples_name
from ..utils import files, images
from .likelihood_plot import write_terms_plot

# Pixels of one forward pass; more are no faster: on CPUs one image of 128x128 (`benchmarks bound`), on GPUs, which
# need more to be busy, four of 256x256.
PIXELS_PER_PASS = {"cpu": 2**14, "cuda": 2**18}
PUBLISHED_TERMS = ("vb", "mse", "xstart_mse")


class BoundEvaluation:
    """The variational bound (IDDPM eq. 4) of the images of a data set.

    The noise of image i, and its timesteps where only some are evaluated, depend on the seed and on i alone.
    :param config: how many images and timesteps.
    :param dataset: (float32 [C, H, W] in [-1, 1], keyword arguments of the network) by index, as in ImageDataset.
    Raises UserError for a number of timesteps that cannot be.
    """

    def __init__(self, config: NLLConfig, seed: int, diffusion: Any, dataset: Any) -> None:
        self.config, self.seed, self.diffusion, self.dataset = config, seed, diffusion, dataset
        self.numbers = selection(len(dataset), config.num_samples).tolist()
        self.num_timesteps = diffusion.num_timesteps
        count = config.nll_timesteps
        if count > self.num_timesteps:
            raise UserError(
                f"--nll_timesteps {count} is more than the {self.num_timesteps} timesteps of the process: give at most "
                f"{self.num_timesteps}, or 0 for the whole bound"
            )
        if count == 1 < self.num_timesteps:
            raise UserError(
                f"--nll_timesteps 1 of {self.num_timesteps}: the last step is always evaluated and cannot represent "
                "the others: give at least 2, or 0 for the whole bound"
            )
        self.evaluations = count or self.num_timesteps

    @classmethod
    def of(cls, loaded: LoadedModel[Likelihood]) -> BoundEvaluation:
        """The evaluation that a model's settings ask for."""
        settings = loaded.settings
        return cls(settings.nll, settings.run.seed, loaded.diffusion, open_dataset(loaded))

    def run(self, model: Any) -> BoundSummary:
        """Evaluate. The terms are on rank 0 only. Collective.

        `terms` has `prior_bpd` [N] and `vb`, `mse`, `xstart_mse` [N, T], for t = T-1 down to 0, in bits/dim. For an
        estimate they are [N, K], at the increasing `timesteps` with their `weights`.
        """
        n, rank, world_size = len(self.numbers), distributed.get_rank(), distributed.get_world_size()
        logger.log(f"{n:,} of {len(self.dataset):,} images, {self.evaluations} network evaluations for each")
        step = self.config.batch_size * world_size
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
        drawn: dict[str, np.ndarray] = {}
        if self.config.nll_timesteps:
            offsets = np.array([image_generator(self.seed, i, "timesteps").random() for i in indices])
            t, weights = stratified_timesteps(self.num_timesteps, self.evaluations, offsets)
            drawn = {"timesteps": t, "weights": weights}
        terms = self.diffusion.calc_bpd_loop(
            model,
            batch.to(device),
            clip_denoised=self.config.clip_denoised,
            model_kwargs={key: value.to(device) for key, value in kwargs.items()},
            noise_fn=SeededNoise(self.seed, indices),
            timesteps_per_pass=self.config.timesteps_per_pass
            or timesteps_per_pass(batch.shape, self.evaluations, device.type),
            **{key: distributed.to_device(th.from_numpy(value), device) for key, value in drawn.items()},
        )
        return {key: value.cpu().numpy() for key, value in terms.items()} | drawn


def network_of(loaded: LoadedModel[Likelihood]) -> th.nn.Module:
    """The model's network on the device, in the number format of the options."""
    return to_device(loaded.model, "fp16" if loaded.settings.nll.use_fp16 else "fp32")


def open_dataset(loaded: LoadedModel[Any]) -> ImageDataset:
    """The images of --data_dir as the model takes them, with their classes where it has classes.

    Raises UserError for images or classes that the model does not take.
    """
    settings, model = loaded.settings, loaded.settings.model
    data_dir, classes = settings.source.data_dir, None
    source = open_images(data_dir)
    if model.class_cond:
        names = loaded.metadata.get("class_names")
        classes = class_indices(source, settings.source.labels, data_dir, names, model.num_classes, loaded.path)
    return ImageDataset(model.size, source, classes, channels=model.channels, reading=settings.reading)


def results_name(loaded: LoadedModel[Likelihood]) -> str:
    """The default folder of the results."""
    name = samples_name(loaded, "ancestral", loaded.diffusion.num_timesteps)
    return f"{name}_nll{loaded.settings.nll.nll_timesteps or ''}"


def timesteps_per_pass(shape: tuple[int, ...], count: int, device: str = "cpu") -> int:
    """How many of `count` timesteps to evaluate in one pass for images [N, C, H, W]: as many as are faster for small
    images, and one for large ones, which need the memory."""
    n, _, height, width = shape
    return min(max(PIXELS_PER_PASS.get(device, PIXELS_PER_PASS["cuda"]) // (n * height * width), 1), count)


def describe_mean(result: BoundSummary) -> str:
    """The mean and its standard error as text."""
    n = len(result.total_bpd)
    error = f" +- {result.standard_error:.4f} (standard error over {n} images)" if n > 1 else " (a single image)"
    return f"{result.mean:.4f}{error}"


def write_results(out_dir: str, result: BoundSummary, loaded: LoadedModel[Likelihood]) -> None:
    """Write per_image.npz, nll.json and nll_terms.png, and for a whole bound the published means over the images."""
    if "weights" in result.terms:
        if not math.isnan(result.timesteps_error):
            logger.log(f"{result.timesteps_error:.4f} of the standard error is due to the timesteps left out")
        logger.log("no vb_terms.npz etc.: an estimate has no means over the images at every timestep")
    else:
        for name in PUBLISHED_TERMS:
            means = result.terms[name].mean(axis=0, dtype=np.float64)
            images.save_npz(files.join(out_dir, f"{name}_terms.npz"), means.astype(np.float32))
    images.save_npz(files.join(out_dir, "per_image.npz"), total_bpd=result.total_bpd, **result.terms)
    content = json.dumps(describe_result(result, loaded), indent=1) + "\n"
    files.write_bytes(files.join(out_dir, "nll.json"), content.encode())
    path = files.join(out_dir, "nll_terms.png")
    try:
        write_terms_plot(path, result, loaded.diffusion.num_timesteps)
    except UserError as error:
        logger.warn(f"no {path}: {error}")


def describe_result(result: BoundSummary, loaded: LoadedModel[Likelihood]) -> dict[str, Any]:
    """The number, and what is needed to reproduce it."""
    settings = loaded.settings
    return {
        "bits_per_dim": result.mean,
        "standard_error": _number(result.standard_error),
        "standard_error_of_timesteps": _number(result.timesteps_error),
        "prior_bits_per_dim": float(result.terms["prior_bpd"].mean(dtype=np.float64)),
        "images": len(result.total_bpd),
        "timesteps": loaded.diffusion.num_timesteps,
        "nll_timesteps": settings.nll.nll_timesteps,
        "diffusion_steps": settings.diffusion.diffusion_steps,
        "timestep_respacing": settings.diffusion.timestep_respacing,
        "clip_denoised": settings.nll.clip_denoised,
        "use_fp16": settings.nll.use_fp16,
        "seed": settings.run.seed,
        "data_dir": files.full_path(settings.source.data_dir),
        "model_path": files.full_path(loaded.path),
        "model_sha256": files.sha256(loaded.path),
        "model_step": loaded.metadata.get("step"),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN
