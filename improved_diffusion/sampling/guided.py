"""Prepare a model for sampling: device, precision, guidance."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel, load_classifier, load_model
from ..config import SamplerConfig, UserError, comma_list
from ..logs import logger
from ..models.acceleration import accelerate
from ..respace import SpacedDiffusion
from ..schedules import sigma_at, timestep_of_sigma
from .guidance import (
    EVERYWHERE,
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGradient,
    ClassifierGuidance,
    WithoutClasses,
)
from .labels import Classes, classes_of
from .sampler import PUBLISHED, Sampler
from .steady import Steady


def prepare_model(config: SamplerConfig, model: th.nn.Module, precision: str = "") -> th.nn.Module:
    """The model on the device, with the precision and speed options of the settings.

    Unless that replaces its calls, it gives each image the same bits whatever the batch, on CPUs; see `steady`.
    :param precision: instead of the options'.
    """
    to_device(model, precision or ("fp16" if config.use_fp16 else config.precision))
    fast = accelerate(model, config)
    return Steady(model) if fast is model else fast


def to_device(model: th.nn.Module, precision: str) -> th.nn.Module:
    """The model on the device, its blocks in this number format."""
    model.to(distributed.dev())
    if precision == "fp16" and distributed.dev().type == "cpu":
        _warn_of_slow_float16()
    if precision != "fp32":
        getattr(model, f"convert_to_{precision}")()
    return model


@functools.cache  # once in a process
def _warn_of_slow_float16() -> None:
    logger.warn(
        "float16 is much slower than float32 on CPUs: without the flag that asks for it (--use_fp16, "
        "--classifier_use_fp16, --precision fp16) the results are the same to rounding"
    )


def guide(
    loaded: LoadedModel, model: th.nn.Module, sampler: Sampler
) -> tuple[th.nn.Module, Sampler, Classes | None]:  # fmt: skip
    """(the model and the sampler with the guidance of the settings, the classes that the model takes, or None).

    :param model: prepared by `prepare_model`.
    Raises UserError where the model, the sampler, the guide or the classifier does not support what is asked.
    Collective.
    """
    options, classes = loaded.settings.guidance, classes_of(loaded)
    if options.classifier_guidance == "published":
        _check_published(options.classifier_path, sampler)
    interval = _interval(options.guidance_interval, sampler.diffusion)
    scale, rescale = options.guidance_scale, options.guidance_rescale
    if options.guide_path:
        weaker, takes_classes = _load_guide(loaded, classes)
        model = Autoguidance(model, weaker, scale, takes_classes, interval=interval, rescale=rescale)
    elif scale != 1:
        _check_null_class(loaded)
        model = ClassifierFreeGuidance(model, scale, interval, rescale)
    if options.classifier_path:
        classifier, classes = _load_classifier(loaded, classes)
        if not loaded.settings.model.class_cond:
            model = WithoutClasses(model)
        if options.classifier_guidance == "published":
            sampler = replace(sampler, cond_fn=ClassifierGradient(classifier, options.classifier_scale, interval))
        else:
            weight = sampler.diffusion.score_weight
            model = ClassifierGuidance(model, classifier, weight, options.classifier_scale, interval)
    return model, sampler, classes


def _check_published(classifier_path: str, sampler: Sampler) -> None:
    """Raise UserError where published guidance lacks a classifier, or has another sampler than the published ones."""
    if not classifier_path:
        raise UserError("--classifier_guidance published needs a classifier: give --classifier_path")
    if not sampler.make_rule().takes_cond_fn:
        raise UserError(
            f"--classifier_guidance published is for --sampler {' or '.join(PUBLISHED)}, not {sampler.name}: choose "
            "one of them, or --classifier_guidance prediction"
        )


def _interval(text: str, diffusion: SpacedDiffusion) -> tuple[float, float]:
    """The timesteps, as the network sees them, between the noise levels of --guidance_interval."""
    if not text:
        return EVERYWHERE
    base = diffusion.base_alphas_cumprod
    sigmas = np.array(comma_list(text, float))
    lowest, highest = sigma_at(base, np.array([0, len(base) - 1]))
    if sigmas[1] < lowest or sigmas[0] > highest:
        raise UserError(
            f"--guidance_interval {text} is outside of the model's noise levels, which go from {lowest:.3g} to "
            f"{highest:.3g}"
        )
    low, high = (diffusion.network_timestep(t) for t in timestep_of_sigma(base, sigmas))
    return (low if sigmas[0] > lowest else -math.inf), (high if sigmas[1] < highest else math.inf)


def _check_null_class(loaded: LoadedModel) -> None:
    flag = f"--guidance_scale {loaded.settings.guidance.guidance_scale}"
    if not loaded.settings.model.class_cond:
        raise UserError(
            f"{flag}: {loaded.path} was trained without classes. Train with --class_cond True --label_drop 0.1, or "
            "guide by a weaker checkpoint with --guide_path"
        )
    config = loaded.metadata.get("config", {})
    if "distilled" in loaded.metadata and config.get("guidance_scale", 1) != 1 and not config.get("label_drop"):
        raise UserError(
            f"{flag}: {loaded.path} has learned from a teacher guided at --guidance_scale {config['guidance_scale']}, "
            "and needs no guidance: leave the flag out"
        )
    if not config.get("label_drop"):
        raise UserError(
            f"{flag}: {loaded.path} was never trained with its class hidden. Train with --class_cond True "
            f"--label_drop 0.1, starting from --init_checkpoint {loaded.path} for example, or guide by an "
            "unconditional checkpoint with --guide_path"
        )


# What a guide must have in common with the model, and (_NOISE) a classifier too.
_NOISE = ("diffusion_steps", "noise_schedule", "schedule_shift", "zero_terminal_snr", "rescale_timesteps")
_SHARED = ("image_size", "large_size", "small_size", "channels", "predict_xstart", "predict_v", *_NOISE)


def _load_guide(loaded: LoadedModel, classes: Classes | None) -> tuple[th.nn.Module, bool]:
    """(the prepared guide, whether it takes classes); `classes` are the model's."""
    options = loaded.settings.guidance
    # What describes the model describes its guide too, where the guide's file does not say.
    theirs = load_model(loaded.settings, (), options.guide_path)
    flag, ours, guides = f"--guide_path {options.guide_path}", loaded.settings.values(), theirs.settings.values()
    for name in (name for name in _SHARED if name in ours):
        if ours[name] != guides[name]:
            raise UserError(f"{flag} has {name} {guides[name]}, but {loaded.path} has {ours[name]}: they must agree")
    takes_classes = theirs.settings.model.class_cond
    if takes_classes and classes is None:
        raise UserError(f"{flag} needs classes, which {loaded.path} does not have")
    if takes_classes:
        _compare_classes(flag, classes_of(theirs), loaded.path, classes)
    logger.log(f"guided by {options.guide_path}, scale {options.guidance_scale}")
    return prepare_model(loaded.settings.sampler, theirs.model), takes_classes


def _load_classifier(loaded: LoadedModel, classes: Classes | None) -> tuple[th.nn.Module, Classes]:
    """(the prepared classifier, its classes, which are the model's where it has any)."""
    options = loaded.settings.guidance
    theirs = load_classifier(options.classifier_path, options, loaded.given, loaded.settings.model.size)
    ours: dict[str, Any] = {**loaded.settings.values(), "image_size": loaded.settings.model.size}
    flag = f"--classifier_path {options.classifier_path}"
    for name in (*_NOISE, "image_size", "channels"):
        if ours[name] != theirs.config.get(name, ours[name]):
            raise UserError(
                f"{flag} was trained with {name} {theirs.config[name]}, but {loaded.path} with {ours[name]}: train a "
                f"classifier for it with classifier-train --model_path {loaded.path}"
            )
    names = theirs.class_names
    num = len(names) if names else theirs.config["num_classes"]
    their_classes = Classes(num, names, theirs.seen_classes)
    if classes is not None:
        _compare_classes(flag, their_classes, loaded.path, classes)
        named = their_classes.names or classes.names  # a published checkpoint has no names
        their_classes = their_classes._replace(names=named, seen=classes.seen or their_classes.seen)
    logger.log(
        f"guided by the classifier {options.classifier_path}, scale {options.classifier_scale} "
        f"(--classifier_guidance {options.classifier_guidance})"
    )
    sampler = loaded.settings.sampler
    precision = "fp16" if options.classifier_use_fp16 else sampler.precision
    return prepare_model(sampler, theirs.classifier, precision), their_classes


def _compare_classes(flag: str, theirs: Classes | None, model_path: str, classes: Classes | None) -> None:
    """Raise UserError where the labels of a guide and of the model mean different classes."""
    assert theirs is not None and classes is not None
    named = theirs.names and classes.names  # a published checkpoint has no names
    if theirs.num != classes.num or (named and list(theirs.names or []) != list(classes.names or [])):
        raise UserError(
            f"{flag} has the {theirs.num} classes {_names(theirs)}, but {model_path} has the {classes.num} classes "
            f"{_names(classes)}: they must agree"
        )


def _names(classes: Classes) -> str:
    return ", ".join((classes.names or ["without names"])[:10])
