"""Evaluate the variational bound of a trained model on images, in bits/dim."""

from ..config.settings import Likelihood
from .command import Command

COMMAND = Command(
    "Evaluate the variational bound of a trained model on images, in bits/dim.",
    Likelihood,
    "image_nll:evaluate",
    first=(
        "model_path", "data_dir", "num_samples", "batch_size", "nll_timesteps", "timestep_respacing", "labels", "seed",
        "out_dir",
    ),
)  # fmt: skip
