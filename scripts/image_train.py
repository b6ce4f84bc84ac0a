"""Train a diffusion model on images."""

import functools

import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, RunConfig, TrainConfig, height_width
from improved_diffusion.run_util import open_training_data, prepare_training, start_run, train
from improved_diffusion.sample_util import PreviewGrid
from improved_diffusion.script_util import create_gaussian_diffusion, parse_options

PREVIEWS = 64  # images in a grid of samples


def main():
    options = parse_options((DataConfig, TrainConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    start_run(options, options.preset or "image_train")
    metadata = prepare_training(options)
    data = open_training_data(options, metadata)
    logger.log("training...")
    train(options, data, data.class_names, functools.partial(previews, options))


def previews(options, diffusion):
    """The hook that draws a grid every --sample_interval steps."""
    steps = options.diffusion_steps
    quick = create_gaussian_diffusion(
        steps=steps, learn_sigma=options.learn_sigma, sigma_small=options.sigma_small,
        noise_schedule=options.noise_schedule, predict_xstart=options.predict_xstart,
        rescale_timesteps=options.rescale_timesteps, timestep_respacing=str(min(25, steps)),
    )  # fmt: skip
    kwargs = {}
    if options.class_cond:
        kwargs["y"] = th.arange(PREVIEWS, device=dist_util.dev()) % options.num_classes
    shape = (options.channels, *height_width(options.image_size))
    return [(options.sample_interval, PreviewGrid(quick, shape, PREVIEWS, kwargs, logger.get_dir(), options.seed))]


if __name__ == "__main__":
    dist_util.run_script(main)
