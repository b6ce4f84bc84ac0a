"""The published runs: what each sets beyond the defaults, and what it reproduces. `recipes` has those for own images.

Scores are the papers' (Nichol & Dhariwal 2021, Ho et al. 2020), quoted from memory; NLL in bits/dim. A public
retraining of CIFAR-10 reported FID 6.7 at 100 steps with the flags of cifar10-hybrid, and 4.0 with a linear schedule
and dropout 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .messages import UserError, unknown_name
from .recipes import AUTO, RECIPES, Recipe
from .settings import ImageTraining, Settings


@dataclass(frozen=True)
class Preset:
    """The options of a published run and the score it reached. Batch sizes are totals over all ranks."""

    options: dict[str, Any]
    reported: str


_HYBRID = dict(
    num_res_blocks=3, learn_sigma=True, diffusion_steps=4000, noise_schedule="cosine", lr=1e-4, total_batch_size=128
)
_VLB = dict(use_kl=True, schedule_sampler="loss-second-moment")
_PLAIN_TIMESTEPS = dict(rescale_learned_sigmas=False, rescale_timesteps=False)
_CIFAR10 = dict(_HYBRID, image_size=32, dropout=0.3, max_steps=500_000)
_IMAGENET64 = dict(_HYBRID, image_size=64, max_steps=1_500_000)

PRESETS = {
    "cifar10-hybrid": Preset(_CIFAR10, "NLL 3.17, FID 3.19"),
    "cifar10-vlb": Preset({**_CIFAR10, **_VLB}, "NLL 2.94, FID 11.47"),
    "imagenet64-hybrid": Preset(_IMAGENET64, "NLL 3.57, FID 19.2"),
    "imagenet64-vlb": Preset({**_IMAGENET64, **_VLB}, "NLL 3.53, FID 40.1"),
    "imagenet64-cond": Preset(
        dict(
            image_size=64,
            num_channels=192,
            num_res_blocks=3,
            learn_sigma=True,
            class_cond=True,
            diffusion_steps=4000,
            noise_schedule="cosine",
            **_PLAIN_TIMESTEPS,
            lr=3e-4,
            total_batch_size=2048,
            max_steps=250_000,
        ),
        "FID 2.92 at 250 steps",
    ),
    "upsample64-256": Preset(
        dict(
            large_size=256,
            small_size=64,
            num_channels=192,
            learn_sigma=True,
            class_cond=True,
            diffusion_steps=4000,
            noise_schedule="linear",
            **_PLAIN_TIMESTEPS,
            lr=3e-4,
            total_batch_size=256,
            max_steps=500_000,
        ),
        "no score of its own",
    ),
    "lsun-bedroom": Preset(
        dict(
            image_size=256,
            num_heads=1,
            learn_sigma=True,
            use_scale_shift_norm=False,
            attention_resolutions="16",
            diffusion_steps=1000,
            noise_schedule="linear",
            **_PLAIN_TIMESTEPS,
            lr=1e-4,
            total_batch_size=128,
            max_steps=1_200_000,
        ),
        "no score of its own",
    ),
    "ddpm-cifar10": Preset(
        dict(
            image_size=32,
            num_res_blocks=2,
            attention_resolutions="16",
            num_heads=1,
            dropout=0.1,
            use_scale_shift_norm=False,
            diffusion_steps=1000,
            noise_schedule="linear",
            lr=2e-4,
            lr_schedule="constant",
            lr_warmup_steps=5000,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            random_flip=True,
            total_batch_size=128,
            ema_rate="0.9999",
            max_steps=800_000,
        ),
        "FID 3.17",
    ),
}


def options_for(name: str, kind: type[Settings]) -> dict[str, Any]:
    """The options that `--preset name` sets in a command's settings; those of other commands are left out.

    Raises UserError for an unknown name, and for a preset of another kind of model.
    """
    known = kind.options()
    options = preset_options(name)
    if name == AUTO and kind is not ImageTraining:
        raise UserError("--preset auto chooses options for training an image model: name another preset")
    if name != AUTO and ("large_size" in known) != ("large_size" in options):
        other = "super-resolution" if "large_size" in options else "image"
        raise UserError(f"--preset {name} is for the {other} commands: choose a preset of the other kind")
    return {key: value for key, value in options.items() if key in known}


def until_chosen(name: str | None) -> dict[str, Any]:
    """With `--preset auto`, options that stand in for those that training will choose, so that the ones given with them
    can be checked before; {} for other presets."""
    return dict(next(iter(RECIPES.values())).options) if name == AUTO else {}


def preset_options(name: str) -> dict[str, Any]:
    """The options that `--preset name` sets; an unknown name raises UserError with the nearest one.

    `auto` sets none here: training chooses them when it has seen the images.
    """
    if name == AUTO:
        return {}
    known: dict[str, Preset | Recipe] = {**RECIPES, **PRESETS}
    if name not in known:
        raise unknown_name("--preset", name, [AUTO, *known])
    return dict(known[name].options)
