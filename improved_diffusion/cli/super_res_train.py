"""Train a super-resolution model: large images from their own area-downsampled versions."""

from ..config.settings import SuperResTraining
from .command import Command

COMMAND = Command(
    "Train a super-resolution model: large images from their own area-downsampled versions.",
    SuperResTraining,
    "training:super_res_train",
    first=(
        "data_dir", "large_size", "small_size", "class_cond", "batch_size", "max_steps", "lr",
        "precision", "val_dir", "resume", "out_dir",
    ),
)  # fmt: skip
