"""Factories and flags under their published names; their code is in `models.factories`, `config` and `cli`."""

from .cli.published_flags import add_dict_to_argparser, args_to_dict
from .config import NUM_CLASSES, str2bool
from .config.published import model_and_diffusion_defaults, sr_model_and_diffusion_defaults
from .models.factories import (
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    sr_create_model,
    sr_create_model_and_diffusion,
)

__all__ = [
    "NUM_CLASSES", "add_dict_to_argparser", "args_to_dict", "create_classifier", "create_gaussian_diffusion",
    "create_model", "create_model_and_diffusion", "model_and_diffusion_defaults", "sr_create_model",
    "sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults", "str2bool",
]  # fmt: skip
