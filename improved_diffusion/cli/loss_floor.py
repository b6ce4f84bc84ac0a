"""The least loss that any model can have on a set of images, by noise level, and a model's loss beside it."""

from ..config.settings import LossFloor
from .command import Command

COMMAND = Command(
    "Estimate the least loss that any model can have on a set of images, by noise level: loss-floor FOLDER.",
    LossFloor,
    "loss_floor:evaluate",
    first=(
        "data_dir", "model_path", "image_size", "channels", "noise_schedule", "diffusion_steps", "predict_v",
        "class_cond", "labels", "random_flip", "floor_draws", "floor_images", "floor_levels", "out_dir",
    ),
    words="data_dir",
)  # fmt: skip
