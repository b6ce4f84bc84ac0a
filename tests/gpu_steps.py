"""Trains on the GPU where waiting for it is an error: `gpu_steps.py PRECISION FOLDER`. Run by test_gpu.py."""

import sys

import torch as th
from train_helpers import Data, make_loop

from improved_diffusion import distributed
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_model_and_diffusion

MODEL = ImageModel.of(
    {
        "image_size": 8, "num_channels": 32, "channel_mult": "1,1", "attention_resolutions": "4", "learn_sigma": True,
        "dropout": 0.1,
    }
)  # fmt: skip


class PinnedData(Data):
    """Batches in pinned memory, as the DataLoader gives them."""

    def __next__(self):
        batch, kwargs = super().__next__()
        return (batch.pin_memory() if distributed.dev().type == "cuda" else batch), kwargs


def train(precision, steps):
    """The means of the log after some steps; on a GPU waiting for it during the steps after the third is an error."""
    model, diffusion = build_model_and_diffusion(MODEL.model, MODEL.diffusion)
    loop = make_loop(
        model=model.to(distributed.dev()), diffusion=diffusion, data=PinnedData(), precision=precision, grad_clip=1.0,
        ema_rate="0.9,0.99", ema_warmup=True, ema_sigma_rel="0.1", microbatch=2, max_steps=100, log_interval=1000,
    )  # fmt: skip
    for step in range(steps):
        if step == 3:  # before: tables of coefficients, cuDNN's plans, the optimizer's state
            th.cuda.set_sync_debug_mode("error")
        loop.run_step(*next(loop.data))
        loop.step += 1
    th.cuda.set_sync_debug_mode("default")
    return loop.run_log.meter.read()


def main():
    distributed.setup_dist()
    logger.configure(dir=sys.argv[2], format_strs=["csv"])
    means = train(sys.argv[1], 13)
    assert means["skipped_steps"] < 1 and means["loss"] > 0


if __name__ == "__main__":
    distributed.run_script(main)
