"""Distil a trained model into one that samples in a few steps."""

from ..config.settings import Distilling
from .command import Command

COMMAND = Command(
    "Distil a trained model into one that samples in a few steps.",
    Distilling,
    "training:distill",
    first=(
        "teacher", "data_dir", "method", "steps", "to", "max_steps", "lr", "batch_size", "max_q", "guidance_scale",
        "precision", "val_dir", "resume", "out_dir",
    ),
)  # fmt: skip
