"""Enlarge images with a super-resolution model: an npz, PNGs and a grid of both."""

from ... import distributed
from ...checkpoints.loading import load_model
from ...config.settings import SuperResSampling
from ...evaluation.super_resolution import read_reference, write_comparison
from ...logs.run_folder import open_run
from ...sampling.pipeline import SuperResPipeline
from ...sampling.sampler import build_sampler
from ...utils.terminal import show
from ..parsing import Parsed


def enlarge(parsed: Parsed[SuperResSampling]) -> None:
    """Enlarge the base images."""
    distributed.join_ranks(parsed.settings.run)
    loaded = load_model(parsed.settings, parsed.given, parsed.settings.sample.model_path)
    if parsed.settings.sampler.print_steps:
        distributed.from_rank0(show, build_sampler(loaded.settings, loaded.diffusion).table())
        return
    pipeline = SuperResPipeline(loaded)
    truth = read_reference(pipeline.loaded.settings, pipeline.base)
    out_dir = open_run(parsed.settings.run, pipeline.name)
    samples = pipeline.write(out_dir)
    if parsed.settings.base.reference:
        reference = parsed.settings.base.reference
        distributed.from_rank0(write_comparison, reference, out_dir, samples, pipeline.base.arrays, truth)
