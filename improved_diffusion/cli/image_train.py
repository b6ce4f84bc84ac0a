"""Train a diffusion model on images."""

from ..config.settings import ImageTraining
from .command import Command
from .training import train_command

COMMAND = Command(
    "Train a diffusion model on images.",
    ImageTraining,
    train_command("image_train"),
    first=(
        "data_dir", "image_size", "class_cond", "batch_size", "max_steps", "lr",
        "precision", "val_dir", "resize_mode", "background", "resume", "out_dir",
    ),
)  # fmt: skip
