"""Evaluate the variational bound of a trained model on images, in bits/dim."""

from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import DiffusionConfig, ModelConfig, NLLConfig, RunConfig, SourceConfig
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.given import class_indices
from improved_diffusion.data.sources import open_images
from improved_diffusion.evaluation.likelihood import Evaluation, describe_mean, write_results
from improved_diffusion.logs import logger
from improved_diffusion.sampling.request import samples_name
from improved_diffusion.training.run import start_run


def main():
    options = parse_options((NLLConfig, SourceConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    distributed.setup_dist()
    model, diffusion, metadata = load_model(options)
    source = open_images(options.data_dir)
    classes = class_indices(options, source, metadata) if options.class_cond else None
    dataset = ImageDataset(options.image_size, source, classes, channels=options.channels)
    evaluation = Evaluation(options, diffusion, dataset)
    name = f"{samples_name(options, 'ancestral', diffusion.num_timesteps)}_nll{options.nll_timesteps or ''}"
    out_dir = start_run(options, name)
    result = evaluation.run(model.to(distributed.dev()))
    logger.log(f"bits/dim: {describe_mean(result)}")
    if distributed.get_rank() == 0:
        write_results(out_dir, result, options, metadata, diffusion.num_timesteps)


if __name__ == "__main__":
    distributed.run_script(main)
