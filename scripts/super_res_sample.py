"""Draw large images from small ones with a super-resolution model: an npz, PNGs and a grid of both."""

from functools import partial

from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import (
    BaseSamplesConfig,
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SamplerConfig,
    SuperResConfig,
    height_width,
)
from improved_diffusion.data.given import read_images
from improved_diffusion.evaluation.super_resolution import read_reference, write_comparison
from improved_diffusion.logs import logger
from improved_diffusion.sampling.guided import guide, prepare_model
from improved_diffusion.sampling.labels import image_labels, label_kwargs
from improved_diffusion.sampling.request import describe_request, samples_name
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.sampling.writer import last_images, write_samples, write_steps
from improved_diffusion.training.run import start_run
from improved_diffusion.utils.images import from_uint8


def main():
    groups = (BaseSamplesConfig, SampleConfig, SamplerConfig, GuidanceConfig, SuperResConfig)
    options = parse_options((*groups, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    distributed.setup_dist()
    model, diffusion, metadata = load_model(options)
    sampler = build_sampler(options, diffusion)
    if options.print_steps:
        distributed.from_rank0(print, sampler.table())
        return
    model, classes = guide(options, prepare_model(options, model), sampler.diffusion, metadata)
    names = classes and classes.names
    given = read_images(options, "base_samples", "small_size", names, exact_npz=True)
    read = partial(read_images, options, "reference", "large_size", None, exact_npz=True, enlarge=False)
    base, truth = given.arrays, read_reference(options, given, read)
    if "num_samples" not in options.given:
        options.num_samples = len(base)
    labels = image_labels(options, classes, given.labels, options.base_samples, "--base_samples")
    out_dir = start_run(options, samples_name(options, sampler.name, sampler.steps))
    logger.log(sampler.describe())
    shape = (options.channels, *height_width(options.large_size))

    def walk(indices):
        kwargs = {"low_res": from_uint8(base[[i % len(base) for i in indices]]).to(distributed.dev())}
        seeds = [options.seed + i for i in indices]
        return sampler.walk(model, shape, seeds, {**kwargs, **label_kwargs(labels, indices)})

    samples = write_samples(
        lambda indices: last_images(walk(indices)),
        out_dir=out_dir,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        labels=labels,
        request=describe_request(options, metadata, sampler),
        beside=lambda i: base[i % len(base)],
    )
    write_steps(walk, out_dir, min(options.num_samples, options.batch_size), sampler.steps, options.save_steps)
    if options.reference:
        distributed.from_rank0(write_comparison, options, out_dir, samples, base, truth)


if __name__ == "__main__":
    distributed.run_script(main)
