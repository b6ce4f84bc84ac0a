"""Train a super-resolution model: large images from their own area-downsampled versions."""

import torch.nn.functional as F

from improved_diffusion import dist_util, logger
from improved_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    SuperResConfig,
    TrainConfig,
    height_width,
)
from improved_diffusion.run_util import open_training_data, prepare_training, start_run, train
from improved_diffusion.script_util import parse_options


class WithLowRes:
    """The stream of training images, each batch with its low-resolution version under "low_res"."""

    def __init__(self, data, small_size):
        self.data = data
        self.size = height_width(small_size)

    def seek(self, step):
        self.data.seek(step)

    def __next__(self):
        batch, kwargs = next(self.data)
        batch = batch.to(dist_util.dev(), non_blocking=True)
        return batch, {**kwargs, "low_res": F.interpolate(batch, self.size, mode="area")}


def main():
    options = parse_options((DataConfig, TrainConfig, SuperResConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    start_run(options, options.preset or "super_res_train")
    metadata = prepare_training(options)
    data = open_training_data(options, metadata)
    logger.log("training...")
    train(options, WithLowRes(data, options.small_size), data.class_names, lambda diffusion: [])


if __name__ == "__main__":
    dist_util.run_script(main)
