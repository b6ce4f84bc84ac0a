"""Draw large images from small ones with a super-resolution model: an npz, PNGs and a grid of both."""

import torch as th

from improved_diffusion import dist_util
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import (
    BaseSamplesConfig,
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SuperResConfig,
    UserError,
    height_width,
)
from improved_diffusion.images import from_uint8
from improved_diffusion.run_util import describe_request, read_base_samples, samples_name, start_run
from improved_diffusion.sample_util import Labels, choose_labels, draw_images, write_samples
from improved_diffusion.script_util import load_model


def main():
    options = parse_options(
        (BaseSamplesConfig, SampleConfig, SuperResConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__
    )
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    base, base_labels = read_base_samples(options, metadata.get("class_names"))
    if "num_samples" not in options.given:
        options.num_samples = len(base)
    labels = choose_labels(options, metadata)
    if labels and not options.classes:
        if base_labels is None:
            raise UserError(
                f"{options.model_path} is class-conditional and {options.base_samples} has no classes: give --classes"
            )
        labels = Labels(labels.num_classes, options.seed, base_labels, labels.class_names)
    out_dir = start_run(options, samples_name(options, diffusion.num_timesteps))
    model.to(dist_util.dev())
    shape = (options.channels, *height_width(options.large_size))

    def draw(indices):
        kwargs = {"low_res": from_uint8(base[[i % len(base) for i in indices]]).to(dist_util.dev())}
        if labels:
            kwargs["y"] = th.tensor([labels.index(i) for i in indices], device=dist_util.dev())
        return draw_images(diffusion, model, options, shape, indices, kwargs)

    write_samples(
        draw,
        out_dir=out_dir,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        labels=labels,
        request=describe_request(options, metadata),
        beside=lambda i: base[i % len(base)],
    )


if __name__ == "__main__":
    dist_util.run_script(main)
