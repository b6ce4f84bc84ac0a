"""Evaluate the variational bound of a trained model on images, in bits/dim."""

import os

import numpy as np
import torch as th

from improved_diffusion import dist_util, images, logger
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import DiffusionConfig, ModelConfig, NLLConfig, RunConfig, SourceConfig
from improved_diffusion.evaluation.nll import summarize_bound
from improved_diffusion.image_datasets import ImageDataset
from improved_diffusion.image_sources import open_images
from improved_diffusion.run_util import class_indices, samples_name, start_run
from improved_diffusion.samplers import SeededNoise
from improved_diffusion.script_util import load_model


def main():
    options = parse_options((NLLConfig, SourceConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    source = open_images(options.data_dir)
    classes = class_indices(options, source, metadata) if options.class_cond else None
    dataset = ImageDataset(options.image_size, source, classes, channels=options.channels)
    out_dir = start_run(options, samples_name(options, "ancestral", diffusion.num_timesteps) + "_nll")
    model.to(dist_util.dev())
    n = min(options.num_samples, len(dataset))
    logger.log(f"{n} of the {len(dataset)} images in {options.data_dir}, {diffusion.num_timesteps} evaluations each")
    bar = logger.Progress("evaluating", n, "image")

    def bound(indices):
        if not indices:
            return {}
        batch, kwargs = th.utils.data.default_collate([dataset[i] for i in indices])
        terms = diffusion.calc_bpd_loop(
            model,
            batch.to(dist_util.dev()),
            clip_denoised=options.clip_denoised,
            model_kwargs={key: value.to(dist_util.dev()) for key, value in kwargs.items()},
            noise_fn=SeededNoise([options.seed + i for i in indices]),
        )
        return {key: terms[key].cpu().numpy() for key in ("total_bpd", "vb", "mse", "xstart_mse")}

    def report(done, mean):
        logger.log(f"done {done} samples: bpd={mean}")
        bar.update(done - bar.done)

    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    step = options.batch_size * world_size
    rounds = [(list(range(n))[start + rank : start + step : world_size],) for start in range(0, n, step)]
    result = summarize_bound(rounds, bound, dist_util.all_gather_object, report)
    bar.close()
    if rank == 0:
        for name, values in result.terms.items():
            images.save_npz(os.path.join(out_dir, f"{name}_terms.npz"), values.astype(np.float32))
    logger.log(f"bits/dim: {result.mean:.4f} +- {result.standard_error:.4f} (standard error over {n} images)")


if __name__ == "__main__":
    dist_util.run_script(main)
