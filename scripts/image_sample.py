"""Draw images from a trained model: an npz, PNGs and a grid."""

from improved_diffusion import dist_util
from improved_diffusion.command_line import parse_options
from improved_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SamplerConfig,
)
from improved_diffusion.drawing import Drawing
from improved_diffusion.run_util import start_run


def main():
    groups = (SampleConfig, SamplerConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig)
    options = parse_options(groups, __doc__)
    dist_util.setup_dist()
    drawing = Drawing(options)
    if options.print_steps:
        dist_util.from_rank0(print, drawing.sampler.table())
        return
    drawing.write(start_run(options, drawing.name))


if __name__ == "__main__":
    dist_util.run_script(main)
