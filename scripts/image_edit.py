"""Edit images with a trained model: to their noise and back, between two of them, painting parts, varying them."""

from functools import partial

from improved_diffusion import config, distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.cli.parsing import Command, parse_command
from improved_diffusion.data.given import read_images
from improved_diffusion.editing import commands
from improved_diffusion.logs import logger
from improved_diffusion.sampling.guided import guide, prepare_model
from improved_diffusion.sampling.request import describe_request, samples_name
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.training.run import start_run

SHARED = (
    config.EditConfig, config.SamplerConfig, config.GuidanceConfig, config.ModelConfig, config.DiffusionConfig,
    config.RunConfig,
)  # fmt: skip
COMMANDS = {
    "encode": Command(
        "Find the noise that a deterministic sampler takes to each image, by 200 steps of DDIM unless told.",
        (config.ImagesConfig, *SHARED),
    ),
    "decode": Command(
        "Take encoded noise back to images, by the steps that encoded it; --classes makes them others.",
        (config.LatentsConfig, config.CopiesConfig, *SHARED),
    ),
    "interpolate": Command(
        "Draw what lies between two images, in 200 steps of DDIM unless told, or between those of two seeds, in all.",
        (config.ImagesConfig, config.InterpolateConfig, *SHARED),
    ),
    "inpaint": Command(
        "Paint what a mask leaves open, to fit what is known (RePaint), in 100 ancestral steps unless told.",
        (config.ImagesConfig, config.InpaintConfig, config.CopiesConfig, *SHARED),
    ),
    "variations": Command(
        "Put noise on images and take it off again, in a share of 100 ancestral steps unless told.",
        (config.ImagesConfig, config.VariationsConfig, config.CopiesConfig, *SHARED),
    ),
}


def main():
    name, options = parse_command(COMMANDS, __doc__)
    distributed.setup_dist()
    model, diffusion, metadata = load_model(options)
    commands.settle(name, options)
    sampler = commands.route(name, options, build_sampler(options, diffusion))
    if options.print_steps:
        return distributed.from_rank0(print, sampler.table())
    model, classes = guide(options, prepare_model(options, model), sampler.diffusion, metadata)
    read = partial(read_images, options, "images", "image_size", classes and classes.names)
    source = commands.read_source(name, options, read)
    labels = commands.choose_classes(name, options, classes, source)
    job = commands.Job(name, options, model, sampler, source, labels)
    out_dir = start_run(options, f"{name}_{samples_name(options, sampler.name, sampler.steps)}")
    logger.log(sampler.describe())
    job.run(out_dir, describe_request(options, metadata, sampler))


if __name__ == "__main__":
    distributed.run_script(main)
