"""Samples on the GPU: `gpu_sampling.py FOLDER`. Run by test_gpu.py.

No step waits for the GPU, noise is the CPU's to the bit, and a batch that does not fit is drawn in parts.
"""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch as th
from model_helpers import save_checkpoint, tiny_settings

from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.logs import logger
from improved_diffusion.sampling.batches import Halving
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.sampling.pipeline import SamplingPipeline

SAMPLERS = [
    dict(sampler="ancestral", steps=5), dict(sampler="ddim", steps=5), dict(sampler="ddim", steps=5, ddim_eta=0.5),
    dict(sampler="dpmpp_2m", steps=5), dict(sampler="dpmpp_2m_sde", steps=5), dict(sampler="heun", steps=4, churn=4),
    dict(sampler="renoise", steps=4),
]  # fmt: skip


def pipeline_of(path, **options):
    return SamplingPipeline(load_model(ImageSampling.of(options), options, str(path)))


def check_noise():
    for shape in ((5, 3, 8, 8), (300, 3, 32, 32)):
        on_gpu, on_cpu = SeededNoise(3, range(shape[0])), SeededNoise(3, range(shape[0]))
        for _ in range(3):
            assert th.equal(on_gpu(th.empty(shape, device="cuda")).cpu(), on_cpu(th.empty(shape)))


@contextlib.contextmanager
def no_waiting():
    """Waiting for the GPU is an error."""
    th.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        th.cuda.set_sync_debug_mode("default")


def check_that_no_step_waits(path):
    for options in SAMPLERS:
        pipeline = pipeline_of(path, num_samples=4, **options)
        pipeline.draw(range(4))  # tables of coefficients, cuDNN's plans
        steps = pipeline.trajectory(range(4))
        next(steps)
        with no_waiting():
            for _ in steps:
                pass


def check_batches(path):
    options = dict(sampler="ddim", steps=3, num_samples=3000)
    pipeline = pipeline_of(path, batch_size=0, **options)
    chosen = pipeline.batch_size
    assert chosen == 512, f"all fit: {chosen}"
    numbers = list(range(512))
    whole = pipeline.draw(numbers)
    distributed.empty_cache(distributed.dev())
    th.cuda.reset_peak_memory_stats()
    pipeline.draw(numbers)
    needed, total = th.cuda.max_memory_reserved(), th.cuda.get_device_properties(0).total_memory
    distributed.empty_cache(distributed.dev())
    th.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    draw = Halving(pipeline.draw)
    parts = draw(numbers)
    assert draw.most < 512, "the batch did not fit"
    off = np.abs(parts.astype(int) - whole) > 1  # kernels of another batch size round differently
    assert off.mean() < 1e-3
    th.cuda.set_per_process_memory_fraction(1.0)


def check_files(path, folder):
    pipeline = pipeline_of(path, batch_size=0, sampler="ddim", steps=3, num_samples=700)
    pipeline.write(os.path.join(folder, "out"))
    assert len(os.listdir(os.path.join(folder, "out", "samples"))) == 700


def main():
    folder = sys.argv[1]
    distributed.setup_dist()
    logger.configure(dir=folder, format_strs=["log"])
    path = save_checkpoint(Path(folder, "model.pt"), tiny_settings(image_size=32))
    check_noise()
    check_that_no_step_waits(path)
    check_batches(path)
    check_files(path, folder)


if __name__ == "__main__":
    distributed.run_script(main)
