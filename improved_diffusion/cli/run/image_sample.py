"""Draw images from a trained model: an npz, PNGs and a grid."""

from ... import distributed
from ...checkpoints.loading import load_model
from ...config.settings import ImageSampling
from ...logs.run_folder import open_run
from ...sampling.pipeline import SamplingPipeline
from ...sampling.sampler import build_sampler
from ...utils.terminal import show
from ..parsing import Parsed


def sample(parsed: Parsed[ImageSampling]) -> None:
    """Draw the samples."""
    distributed.join_ranks(parsed.settings.run)
    loaded = load_model(parsed.settings, parsed.given, parsed.settings.sample.model_path)
    if parsed.settings.sampler.print_steps:
        distributed.from_rank0(show, build_sampler(loaded.settings, loaded.diffusion).table())
        return
    pipeline = SamplingPipeline(loaded)
    pipeline.write(open_run(parsed.settings.run, pipeline.name))
