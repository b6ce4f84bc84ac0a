"""Edit images with a trained model: to their noise and back, between two of them, painting parts, varying them."""

from functools import partial

from improved_diffusion import config, dist_util, editing, logger
from improved_diffusion.command_line import Command, parse_command
from improved_diffusion.run_util import describe_request, read_images, samples_name, start_run
from improved_diffusion.sampling import build_sampler, guide, prepare_model
from improved_diffusion.script_util import load_model

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
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    editing.settle(name, options)
    sampler = editing.route(name, options, build_sampler(options, diffusion))
    if options.print_steps:
        return dist_util.from_rank0(print, sampler.table())
    model, classes = guide(options, prepare_model(options, model), sampler.diffusion, metadata)
    read = partial(read_images, options, "images", "image_size", classes and classes.names)
    source = editing.read_source(name, options, read)
    labels = editing.choose_classes(name, options, classes, source)
    job = editing.Job(name, options, model, sampler, source, labels)
    out_dir = start_run(options, f"{name}_{samples_name(options, sampler.name, sampler.steps)}")
    logger.log(sampler.describe())
    job.run(out_dir, describe_request(options, metadata, sampler))


if __name__ == "__main__":
    dist_util.run_script(main)
