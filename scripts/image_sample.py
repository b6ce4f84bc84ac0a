"""Draw images from a trained model: an npz, PNGs and a grid."""

from improved_diffusion import dist_util, logger
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SamplerConfig,
    height_width,
)
from improved_diffusion.run_util import describe_request, samples_name, start_run
from improved_diffusion.sample_util import choose_labels, label_kwargs, last_images, write_samples, write_steps
from improved_diffusion.sampling import build_sampler, guide, prepare_model
from improved_diffusion.script_util import load_model


def main():
    options = parse_options(
        (SampleConfig, SamplerConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__
    )
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    sampler = build_sampler(options, diffusion)
    if options.print_steps:
        dist_util.from_rank0(print, sampler.table())
        return
    model, classes = guide(options, prepare_model(options, model), sampler.diffusion, metadata)
    labels = choose_labels(options, classes)
    out_dir = start_run(options, samples_name(options, sampler.name, sampler.steps))
    logger.log(sampler.describe())
    shape = (options.channels, *height_width(options.image_size))

    def walk(indices):
        seeds = [options.seed + i for i in indices]
        return sampler.walk(model, shape, seeds, label_kwargs(labels, indices))

    write_samples(
        lambda indices: last_images(walk(indices)),
        out_dir=out_dir,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        labels=labels,
        request=describe_request(options, metadata, sampler),
    )
    write_steps(walk, out_dir, min(options.num_samples, options.batch_size), sampler.steps, options.save_steps)


if __name__ == "__main__":
    dist_util.run_script(main)
