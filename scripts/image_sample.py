"""Draw images from a trained model: an npz, PNGs and a grid."""

import torch as th

from improved_diffusion import dist_util
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import DiffusionConfig, ModelConfig, RunConfig, SampleConfig, height_width
from improved_diffusion.run_util import describe_request, samples_name, start_run
from improved_diffusion.sample_util import choose_labels, draw_images, write_samples
from improved_diffusion.script_util import load_model


def main():
    options = parse_options((SampleConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    dist_util.setup_dist()
    model, diffusion, metadata = load_model(options)
    out_dir = start_run(options, samples_name(options, diffusion.num_timesteps))
    model.to(dist_util.dev())
    labels = choose_labels(options, metadata)
    shape = (options.channels, *height_width(options.image_size))

    def draw(indices):
        kwargs = {}
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
    )


if __name__ == "__main__":
    dist_util.run_script(main)
