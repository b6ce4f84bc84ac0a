"""Draw images from a trained model: an npz, PNGs and a grid."""

from improved_diffusion import distributed
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SamplerConfig,
)
from improved_diffusion.sampling.pipeline import Drawing
from improved_diffusion.training.run import start_run


def main():
    groups = (SampleConfig, SamplerConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig)
    options = parse_options(groups, __doc__)
    distributed.setup_dist()
    drawing = Drawing(options)
    if options.print_steps:
        distributed.from_rank0(print, drawing.sampler.table())
        return
    drawing.write(start_run(options, drawing.name))


if __name__ == "__main__":
    distributed.run_script(main)
