"""Checkpoint files to models, with the options that they were trained with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..cli.published_flags import args_to_dict
from ..config import (
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
    UserError,
    fixed_names,
    from_dict,
    height_width,
)
from ..config.published import model_and_diffusion_defaults, sr_model_and_diffusion_defaults
from ..logs import logger
from ..models.architecture import read_architecture
from ..models.classifier import NoisyClassifier
from ..models.factories import (
    attention_factors,
    create_classifier,
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
)
from ..respace import SpacedDiffusion
from ..unet import UNetModel
from . import checkpoint

# Checkpoints that describe themselves

_MODEL_OPTIONS = [
    f.name for group in (ModelConfig, DiffusionConfig, SuperResConfig, ClassifierConfig) for f in fields(group)
]
KINDS = {
    "image": ("an image model", "use the image_* scripts"),
    "super_res": ("a super-resolution model", "use the super_res_* scripts"),
    "classifier": (
        "a classifier",
        "it makes no images but guides a model that does (--classifier_path); classifier_train.py trains it",
    ),
}


def kind_of(names: Iterable[str]) -> str:
    """Which of KINDS a run with options of these names trains."""
    names = set(names)
    return "classifier" if "classifier_width" in names else "super_res" if "large_size" in names else "image"


def build(options: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """(model, diffusion) for a namespace of options; super-resolution where they have a large_size."""
    superres = hasattr(options, "large_size")
    create = sr_create_model_and_diffusion if superres else create_model_and_diffusion
    names = [
        *(sr_model_and_diffusion_defaults() if superres else model_and_diffusion_defaults()),
        "channels",
        "num_classes",
        "channel_mult",
        *(f.name for f in fields(DiffusionConfig) if not f.metadata["published"]),
    ]
    return create(**args_to_dict(options, names))


def adopt(options: argparse.Namespace, path: str, state_dict: Mapping[str, Any], metadata: Mapping[str, Any],
          names: Iterable[str] | None = None) -> None:  # fmt: skip
    """Take the options that were not given from a checkpoint. A contradiction raises UserError with both values.

    :param names: the options that may be taken; those of the model and the diffusion unless given.
    """
    stored = dict(metadata.get("config", {}))
    if stored and kind_of(stored) != kind_of(vars(options)):
        raise UserError(f"{path} is {': '.join(KINDS[kind_of(stored)])}")
    if not stored:
        stored = _config_from_shapes(options, path, state_dict)
        shown = ", ".join(f"{name}={value}" for name, value in stored.items())
        logger.log(
            f"{path} has no description. Read off its shapes: {shown}. By flag or default: "
            + ", ".join(
                f"{name}={getattr(options, name)}"
                for name in sorted(fixed_names())
                if hasattr(options, name) and name not in stored
            )
        )
    else:
        # An older file lacks newer options, which did not exist when it was trained.
        newer = {
            f.name: f.default for f in fields(DiffusionConfig) if f.metadata["fixed"] and not f.metadata["published"]
        }
        stored = {**{name: value for name, value in newer.items() if hasattr(options, name)}, **stored}
    fixed = fixed_names()
    refuse_contradictions(options, path, stored, fixed)
    for name in _MODEL_OPTIONS if names is None else names:
        if name in stored and hasattr(options, name) and (name in fixed or name not in options.given):
            setattr(options, name, stored[name])


def refuse_contradictions(options: argparse.Namespace, path: str, stored: Mapping[str, Any], names: set[str]) -> None:
    """Raise UserError where one of the names was given another value than a checkpoint has."""
    for name in sorted(options.given & stored.keys() & names):
        value, there = getattr(options, name), stored[name]
        if name in ("channel_mult", "num_classes") and not value:
            continue
        if value != there:
            raise UserError(
                f"--{name} {value} contradicts {path}, which was trained with --{name} {there}: leave the flag out"
            )


def _config_from_shapes(options: argparse.Namespace, path: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors' shapes say of a checkpoint that comes without a description."""
    if kind_of(vars(options)) == "classifier":
        raise UserError(f"{path} has no description: a classifier needs one, as classifier_train.py writes it")
    try:
        arch = read_architecture(state_dict)
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{path} is not a checkpoint of this method's networks") from None
    superres = hasattr(options, "large_size")
    channels = arch["in_channels"] // 2 if superres else arch["in_channels"]
    if channels > 4 or arch["out_channels"] not in (channels, 2 * channels):
        other = "an image" if superres else "a super-resolution"
        raise UserError(f"{path} is {other} model: use the other kind of script")
    mult = arch["channel_mult"]
    by_mult = {(1, 1, 2, 2, 4, 4): 256, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
    name = "large_size" if superres else "image_size"
    size = getattr(options, name) if name in options.given else by_mult.get(mult, getattr(options, name))
    side = min(height_width(size))
    stored = {
        name: size,
        "channels": channels,
        "num_channels": arch["model_channels"],
        "num_res_blocks": arch["num_res_blocks"],
        "channel_mult": ",".join(map(str, mult)),
        "class_cond": arch["num_classes"] is not None,
        "num_classes": arch["num_classes"] or 0,
        "learn_sigma": arch["out_channels"] == 2 * channels,
        "use_scale_shift_norm": arch["use_scale_shift_norm"],
    }
    listed = {f for f in attention_factors(size, options.attention_resolutions) if f < 2 ** len(mult)}
    if listed != set(arch["attention_resolutions"]):
        stored["attention_resolutions"] = ",".join(str(side // f) for f in arch["attention_resolutions"])
    return stored


def load_model(options: argparse.Namespace) -> tuple[UNetModel, SpacedDiffusion, dict[str, Any]]:
    """(model in eval mode on the CPU, diffusion, metadata) of --model_path; what training fixed need not be given.

    Raises UserError for a flag that contradicts the checkpoint, and for a file that is not a checkpoint. Collective.
    """
    if not options.model_path:
        raise UserError("--model_path is missing: name a checkpoint, such as runs/NAME/ema_0.9999_010000.pt")
    state_dict, metadata = checkpoint.load(options.model_path)
    adopt(options, options.model_path, state_dict, metadata)
    model, diffusion = build(options)
    checkpoint.load_into(model, state_dict, options.model_path)
    return model.eval(), diffusion, metadata


def load_classifier(path: str) -> tuple[NoisyClassifier, dict[str, Any], list[str] | None]:
    """(classifier in eval mode on the CPU, its run's options, its classes' names) of a checkpoint. Collective.

    Raises UserError for a file that is not a classifier's.
    """
    state_dict, metadata = checkpoint.load(path)
    stored = metadata.get("config", {})
    if not stored:
        raise UserError(f"{path} has no description: a classifier is a file that classifier_train.py wrote")
    if kind_of(stored) != "classifier":
        raise UserError(f"{path} is {KINDS[kind_of(stored)][0]}, not a classifier: classifier_train.py trains one")
    names = [f.name for f in fields(ClassifierConfig)]
    config = from_dict(ClassifierConfig, {name: stored[name] for name in names if name in stored})
    classifier = create_classifier(**vars(config))
    checkpoint.load_into(classifier, state_dict, path)
    return classifier.eval(), stored, metadata.get("class_names")
