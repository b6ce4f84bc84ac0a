"""A model prepared for sampling: device, precision, guidance."""

from __future__ import annotations

import argparse
import copy
import math
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import load_classifier, load_model
from ..config import UserError, comma_list
from ..logs import logger
from ..respace import SpacedDiffusion
from ..schedules import sigma_at, timestep_of_sigma
from .guidance import EVERYWHERE, Autoguidance, ClassifierFreeGuidance, ClassifierGuidance
from .labels import Classes, classes_of


def prepare_model(options: argparse.Namespace, model: th.nn.Module) -> th.nn.Module:
    """The model on the device, in the precision and layout of the options, compiled where asked."""
    model.to(distributed.dev())
    if options.precision != "fp32":
        getattr(model, f"convert_to_{options.precision}")()
    if options.channels_last:
        model.to(memory_format=th.channels_last)  # type: ignore[call-overload]
    if options.compile:
        if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise UserError("--compile needs a C++ compiler, such as g++: install one, or leave the flag out")
        model.compile()
    return model


def guide(
    options: argparse.Namespace, model: th.nn.Module, diffusion: SpacedDiffusion, metadata: Mapping[str, Any]
) -> tuple[th.nn.Module, Classes | None]:
    """(the prepared model, guided as the options say; the classes that it takes, or None).

    :param diffusion: the sampler's; :param metadata: of the model's checkpoint.
    Raises UserError where the model, the guide or the classifier cannot do what is asked. Collective.
    """
    interval, classes = _interval(options, diffusion), classes_of(options, metadata)
    scale, rescale = options.guidance_scale, options.guidance_rescale
    if options.guide_path:
        weaker, takes_classes = _load_guide(options, classes)
        model = Autoguidance(model, weaker, scale, takes_classes, interval=interval, rescale=rescale)
    elif scale != 1:
        _check_null_class(options, metadata)
        model = ClassifierFreeGuidance(model, scale, interval, rescale)
    if options.classifier_path:
        classifier, classes = _load_classifier(options, classes)
        model = ClassifierGuidance(
            model, classifier, diffusion.score_weight, options.classifier_scale, options.class_cond, interval
        )
    return model, classes


def _interval(options: argparse.Namespace, diffusion: SpacedDiffusion) -> tuple[float, float]:
    """The timesteps, as the network sees them, between the noise levels of --guidance_interval."""
    if not options.guidance_interval:
        return EVERYWHERE
    base = diffusion.base_alphas_cumprod
    sigmas = np.array(comma_list(options.guidance_interval, float))
    lowest, highest = sigma_at(base, np.array([0, len(base) - 1]))
    if sigmas[1] < lowest or sigmas[0] > highest:
        raise UserError(
            f"--guidance_interval {options.guidance_interval} lies outside of the model's noise levels, which go from "
            f"{lowest:.3g} to {highest:.3g}"
        )
    low, high = (diffusion.network_timestep(t) for t in timestep_of_sigma(base, sigmas))
    return (low if sigmas[0] > lowest else -math.inf), (high if sigmas[1] < highest else math.inf)


def _check_null_class(options: argparse.Namespace, metadata: Mapping[str, Any]) -> None:
    if not options.class_cond:
        raise UserError(
            f"--guidance_scale {options.guidance_scale}: {options.model_path} was trained without classes. Train with "
            "--class_cond True --label_drop 0.1, or guide by a weaker checkpoint with --guide_path"
        )
    if not metadata.get("config", {}).get("label_drop"):
        raise UserError(
            f"--guidance_scale {options.guidance_scale}: {options.model_path} never saw an image without its class. "
            f"Train with --label_drop 0.1, from --init_checkpoint {options.model_path} for one, or guide by an "
            "unconditional checkpoint with --guide_path"
        )


# What two networks must have in common for one to guide the other, and what a classifier must share with both.
_NOISE = ("diffusion_steps", "noise_schedule", "schedule_shift", "zero_terminal_snr", "rescale_timesteps")
_SHARED = ("image_size", "large_size", "small_size", "channels", "predict_xstart", "predict_v", *_NOISE)


def _load_guide(options: argparse.Namespace, classes: Classes | None) -> tuple[th.nn.Module, bool]:
    """(the prepared guide, whether it takes classes); `classes` are the model's."""
    theirs = copy.copy(options)
    # What describes the model describes its guide too, where the guide's file does not say.
    theirs.model_path, theirs.given = options.guide_path, set()
    guide, _, metadata = load_model(theirs)
    for name in (name for name in _SHARED if hasattr(options, name)):
        if getattr(options, name) != getattr(theirs, name):
            raise UserError(
                f"--guide_path {options.guide_path} has {name} {getattr(theirs, name)}, but {options.model_path} has "
                f"{getattr(options, name)}: they must agree"
            )
    if theirs.class_cond and not options.class_cond:
        raise UserError(f"--guide_path {options.guide_path} needs classes, which {options.model_path} has not")
    if theirs.class_cond:
        _compare_classes(f"--guide_path {options.guide_path}", classes_of(theirs, metadata), options, classes)
    logger.log(f"guided by {options.guide_path}, scale {options.guidance_scale}")
    return prepare_model(options, guide), theirs.class_cond


def _load_classifier(options: argparse.Namespace, classes: Classes | None) -> tuple[th.nn.Module, Classes]:
    """(the prepared classifier, its classes, which are the model's where it has any)."""
    path = options.classifier_path
    classifier, config, names = load_classifier(path)
    for name in (*_NOISE, "image_size", "channels"):
        value = getattr(options, "large_size" if name == "image_size" and hasattr(options, "large_size") else name)
        if value != config.get(name, value):
            raise UserError(
                f"--classifier_path {path} was trained with {name} {config[name]}, but {options.model_path} with "
                f"{value}: train a classifier for it with classifier_train.py --model_path {options.model_path}"
            )
    theirs = Classes(len(names) if names else config["num_classes"], names)
    if classes is not None:
        _compare_classes(f"--classifier_path {path}", theirs, options, classes)
    logger.log(f"guided by the classifier {path}, scale {options.classifier_scale}")
    # Where the checkpoint has no names, the classifier's will do.
    return prepare_model(options, classifier), theirs


def _compare_classes(guide: str, theirs: Classes | None, options: argparse.Namespace, classes: Classes | None) -> None:
    """Raise UserError where a label means one thing to a guide and another to the model."""
    assert theirs is not None and classes is not None
    named = theirs.names and classes.names  # a published checkpoint has no names
    if theirs.num != classes.num or (named and list(theirs.names or []) != list(classes.names or [])):
        raise UserError(
            f"{guide} has the {theirs.num} classes {_names(theirs)}, but {options.model_path} has the {classes.num} "
            f"classes {_names(classes)}: they must agree"
        )


def _names(classes: Classes) -> str:
    return ", ".join((classes.names or ["without names"])[:10])
