"""Train a diffusion model on images."""

from collections.abc import Sequence
from dataclasses import fields

from ..config import ReadingConfig
from ..config.recipes import AUTO
from ..config.settings import ImageTraining
from .command import Command

COMMAND = Command(
    "Train a diffusion model on images.",
    ImageTraining,
    "training:image_train",
    words="data_dir",
    first=(
        "data_dir", "preset", "image_size", "class_cond", "batch_size", "max_steps", "lr",
        "precision", "val_dir", "resume", "out_dir",
    ),
)  # fmt: skip

# Flags that say nothing of the model and its training.
_OF_A_START = {"--data_dir", "--labels", "--num_workers", "--seed", "--out_dir", "--resume", "--dry_run"}
_OF_A_START |= {f"--{f.name}" for f in fields(ReadingConfig)}


def with_recipe(words: Sequence[str]) -> list[str]:
    """A command line for one's own images: with `--preset auto` where it says nothing of the model and its training."""
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    return [*words, "--preset", AUTO] if flags <= _OF_A_START else list(words)
