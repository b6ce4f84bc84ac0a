"""Train the classifier that guides a diffusion model."""

from ..config.settings import ClassifierTraining
from .command import Command

COMMAND = Command(
    "Train the classifier that guides a diffusion model.",
    ClassifierTraining,
    "training:classifier_train",
    first=(
        "data_dir", "model_path", "labels", "batch_size", "max_steps", "lr", "val_dir", "resume",
        "out_dir",
    ),
)  # fmt: skip
