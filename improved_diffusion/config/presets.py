"""The published runs: what each sets beyond the defaults, and what it reproduces. `recipes` has those for own images.

Scores are the papers' (Nichol & Dhariwal 2021, Ho et al. 2020, Dhariwal & Nichol 2021), quoted from memory; NLL in
bits/dim. A public retraining of CIFAR-10 reported FID 6.7 at 100 steps with the flags of cifar10-hybrid, and 4.0 with a
linear schedule and dropout 0.1. Those that begin with adm- are the models of guided-diffusion, and go with the
checkpoints of its release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

_ADM = dict(
    learn_sigma=True,
    diffusion_steps=1000,
    noise_schedule="linear",
    **_PLAIN_TIMESTEPS,
    num_res_blocks=2,
    resblock_updown=True,
    attention_resolutions="32,16,8",
)
_ADM_IMAGE = dict(_ADM, num_channels=256, num_head_channels=64, lr=1e-4, total_batch_size=256)
_ADM_UPSAMPLER = dict(_ADM, num_channels=192, class_cond=True, lr=1e-4, total_batch_size=256)
_ADM_LSUN = dict(_ADM_IMAGE, image_size=256, dropout=0.1)
_ADM_CLASSIFIER = dict(
    diffusion_steps=1000,
    noise_schedule="linear",
    rescale_timesteps=False,
    classifier_width=128,
    classifier_depth=2,
    lr=3e-4,
    weight_decay=0.05,
    lr_schedule="linear",
    total_batch_size=256,
)

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
    "adm-imagenet64": Preset(
        dict(
            _ADM,
            image_size=64,
            class_cond=True,
            num_channels=192,
            num_head_channels=64,
            num_res_blocks=3,
            use_new_attention_order=True,
            noise_schedule="cosine",
            dropout=0.1,
            lr=3e-4,
            total_batch_size=2048,
            max_steps=540_000,
        ),
        "FID 2.07 at 250 steps",
    ),
    "adm-imagenet128": Preset(
        dict(_ADM_IMAGE, image_size=128, class_cond=True, num_heads=4, num_head_channels=-1, max_steps=4_360_000),
        "FID 5.91 at 250 steps, 2.97 with guidance",
    ),
    "adm-imagenet256": Preset(
        dict(_ADM_IMAGE, image_size=256, class_cond=True, max_steps=1_980_000),
        "FID 10.94 at 250 steps, 4.59 with guidance",
    ),
    "adm-imagenet256-uncond": Preset(
        dict(_ADM_IMAGE, image_size=256, class_cond=False, max_steps=1_980_000), "no score of its own"
    ),
    "adm-imagenet512": Preset(
        dict(_ADM_IMAGE, image_size=512, class_cond=True, max_steps=1_940_000),
        "FID 23.24 at 250 steps, 7.72 with guidance",
    ),
    "adm-lsun-bedroom": Preset(_ADM_LSUN, "FID 1.90 at 1000 steps"),
    "adm-lsun-cat": Preset(_ADM_LSUN, "FID 5.57 at 1000 steps"),
    "adm-lsun-horse": Preset(_ADM_LSUN, "FID 2.57 at 1000 steps"),
    "adm-lsun-horse-nodropout": Preset({**_ADM_LSUN, "dropout": 0.0}, "no score of its own"),
    "adm-upsample-64-256": Preset(
        dict(_ADM_UPSAMPLER, large_size=256, small_size=64, num_heads=4), "no score of its own"
    ),
    "adm-upsample-128-512": Preset(
        dict(_ADM_UPSAMPLER, large_size=512, small_size=128, num_head_channels=64, attention_resolutions="32,16"),
        "no score of its own",
    ),
    "adm-classifier64": Preset(
        dict(
            _ADM_CLASSIFIER,
            image_size=64,
            classifier_depth=4,
            noise_schedule="cosine",
            lr=6e-4,
            total_batch_size=1024,
            max_steps=300_000,
        ),
        "no score of its own",
    ),
    "adm-classifier128": Preset(dict(_ADM_CLASSIFIER, image_size=128, max_steps=300_000), "no score of its own"),
    "adm-classifier256": Preset(dict(_ADM_CLASSIFIER, image_size=256, max_steps=500_000), "no score of its own"),
    "adm-classifier512": Preset(dict(_ADM_CLASSIFIER, image_size=512, max_steps=500_000), "no score of its own"),
}


def options_for(name: str, kind: type[Settings]) -> dict[str, Any]:
    """The options that `--preset name` sets in a command's settings; those of other commands are left out.

    Raises UserError for an unknown name, and for a preset of another kind of model.
    """
    options = preset_options(name)
    if name == AUTO and kind is not ImageTraining:
        raise UserError("--preset auto chooses options for training an image model: name another preset")
    theirs = _kind_of(options)
    if name != AUTO and theirs not in _kinds_of(kind):
        raise UserError(f"--preset {name} is for the {theirs} commands: choose a preset of the other kind")
    return _taken(options, kind)


def _taken(options: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Those of a preset's options that settings of a kind have, and take."""
    return {key: value for key, value in options.items() if key in kind.options().keys() - kind.not_from_presets}


def _kind_of(names: Iterable[str]) -> str:
    """The commands that options are of."""
    if "large_size" in names:
        return "super-resolution"
    return "classifier" if "classifier_width" in names and "num_channels" not in names else "image"


def _kinds_of(kind: type[Settings]) -> set[str]:
    """The commands whose presets are for settings of a kind."""
    known = kind.options()
    return {"image", "super-resolution"} if {"image_size", "large_size"} <= known.keys() else {_kind_of(known)}


def presets_like(stored: Mapping[str, Any], kind: type[Settings]) -> list[str]:
    """The published models whose network has all these options."""
    found = []
    for name, preset in PRESETS.items():
        if _kind_of(preset.options) in _kinds_of(kind):
            options = kind.of(_taken(preset.options, kind)).values()
            same = (value == options[key] for key, value in stored.items() if key in options and key not in _DERIVED)
            if all(same):
                found.append(name)
    return found


# Options that presets leave to the image size or to the data.
_DERIVED = ("channel_mult", "num_classes")


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
