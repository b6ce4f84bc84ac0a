"""Draw images from a trained model: an npz, PNGs and a grid."""

from ..config.settings import ImageSampling
from .command import Command

COMMAND = Command(
    "Draw images from a trained model: an npz, PNGs and a grid.",
    ImageSampling,
    "image_sample:sample",
    first=(
        "model_path", "num_samples", "batch_size", "classes", "sampler", "steps", "guidance_scale", "seed", "precision",
        "out_dir",
    ),
)  # fmt: skip
