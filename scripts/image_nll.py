"""Evaluate the variational bound of a trained model on images, in bits/dim."""

from improved_diffusion import dist_util, logger
from improved_diffusion.bits_per_dim import Evaluation, describe_mean, write_results
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import DiffusionConfig, ModelConfig, NLLConfig, RunConfig, SourceConfig
from improved_diffusion.image_datasets import ImageDataset
from improved_diffusion.image_sources import open_images
from improved_diffusion.run_util import class_indices, samples_name, start_run
from improved_diffusion.script_util import load_model


def main():
    options = parse_options((NLLConfig, SourceConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    source = open_images(options.data_dir)
    classes = class_indices(options, source, metadata) if options.class_cond else None
    dataset = ImageDataset(options.image_size, source, classes, channels=options.channels)
    evaluation = Evaluation(options, diffusion, dataset)
    name = f"{samples_name(options, 'ancestral', diffusion.num_timesteps)}_nll{options.nll_timesteps or ''}"
    out_dir = start_run(options, name)
    result = evaluation.run(model.to(dist_util.dev()))
    logger.log(f"bits/dim: {describe_mean(result)}")
    if dist_util.get_rank() == 0:
        write_results(out_dir, result, options, metadata, diffusion.num_timesteps)


if __name__ == "__main__":
    dist_util.run_script(main)
