"""Enlarge images with a super-resolution model: an npz, PNGs and a grid of both."""

from ..config.settings import SuperResSampling
from .command import Command

COMMAND = Command(
    "Enlarge images with a super-resolution model: an npz, PNGs and a grid of both.",
    SuperResSampling,
    "super_res_sample:enlarge",
    first=(
        "model_path", "base_samples", "any_size", "num_samples", "batch_size", "classes", "sampler", "steps",
        "reference", "seed", "out_dir",
    ),
)  # fmt: skip
