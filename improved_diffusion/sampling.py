"""From options to what draws: the rule and its steps, and the model as it is evaluated, in its precision and guided."""

from __future__ import annotations

import argparse
import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from . import dist_util, logger
from .config import UserError, comma_list
from .guidance import (
    EVERYWHERE,
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    dynamic_threshold,
)
from .respace import SpacedDiffusion
from .sample_util import Classes, classes_of
from .samplers import DDIM, RULES, Euler, Heun, Rule, SeededNoise
from .schedules import timestep_of_sigma
from .script_util import load_classifier, load_model
from .timestep_grids import churned, straight_path, table, timestep_grid

STEPS = 20  # of the rules that were made for few
PUBLISHED = ("ancestral", "ddim")  # whose default is all steps
# Where each rule's steps lie unless told: as published, and for the others where benchmarks/sampler_quality.py finds
# the smallest errors.
GRIDS = {"ancestral": "uniform", "ddim": "ddim"}
OTHER_GRID = "logsnr"


@dataclass(frozen=True)
class Sampler:
    """A rule on the steps that it takes.

    :param grid: what its timesteps are called.
    :param make_rule: gives a fresh rule for each batch.
    :param path: the timesteps of `diffusion` to visit; -1 is the image.
    """

    name: str
    grid: str
    diffusion: SpacedDiffusion
    make_rule: Callable[[], Rule]
    path: Sequence[int]
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None

    @property
    def steps(self) -> int:
        """How many steps go down."""
        return sum(there < here for here, there in zip(self.path, self.path[1:]))

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for each sample."""
        return self.make_rule().evaluations(self.steps)

    def walk(
        self, model: th.nn.Module, shape: Sequence[int], seeds: Sequence[int], model_kwargs: Mapping[str, Any],
        noise: th.Tensor | None = None, path: Sequence[int] | None = None, rule: Rule | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """`sample` and `pred_xstart` [N, C, H, W] after each step.

        :param shape: (C, H, W); :param seeds: of each sample's noise.
        :param noise, path, rule: where to start, by which way and rule, where they are not the sampler's own.
        """
        return self.diffusion.sample_loop_progressive(
            rule or self.make_rule(),
            model,
            (len(seeds), *shape),
            noise=noise,
            clip_denoised=self.clip_denoised,
            denoised_fn=self.denoised_fn,
            model_kwargs=dict(model_kwargs),
            device=dist_util.dev(),
            noise_fn=SeededNoise(seeds),
            path=self.path if path is None else path,
        )

    def describe(self) -> str:
        """One line on the steps."""
        return (
            f"{self.name}, {self.steps} steps, {self.evaluations} evaluations of the network for each image "
            f"(timestep grid: {self.grid})"
        )

    def table(self) -> str:
        """The steps, one to a line, with their noise levels."""
        d = self.diffusion
        return table(d.timestep_map, d.alphas_cumprod, [d.network_timestep(t) for t in d.timestep_map], self.path)


def build_sampler(options: argparse.Namespace, diffusion: SpacedDiffusion) -> Sampler:
    """The sampler that the options ask for; `diffusion` is of the steps of --timestep_respacing.

    Raises UserError for options that contradict each other, and for steps that there are not.
    """
    name = options.sampler
    if name == "auto":
        name = "ddim" if options.use_ddim else "ancestral"
    grid = options.timestep_respacing or "uniform"
    path: Sequence[int] = straight_path(diffusion.num_timesteps)
    base = diffusion.base_alphas_cumprod
    if not options.timestep_respacing and (options.steps or options.timestep_grid != "auto" or name not in PUBLISHED):
        grid = options.timestep_grid if options.timestep_grid != "auto" else GRIDS.get(name, OTHER_GRID)
        listed = grid[:1].isdigit()
        count = options.steps or (0 if listed else len(base) if name in PUBLISHED else min(STEPS, len(base)))
        levels, path = churned(
            timestep_grid(grid, count, base), base, options.churn, options.churn_min, options.churn_max or math.inf
        )
        diffusion = diffusion.respaced(levels)
    elif options.timestep_respacing and (options.steps or options.timestep_grid != "auto"):
        other = f"--steps {options.steps}" if options.steps else f"--timestep_grid {options.timestep_grid}"
        raise UserError(f"--timestep_respacing {options.timestep_respacing} contradicts {other}: give one of them")
    elif options.churn:
        raise UserError(f"--churn {options.churn} needs --steps, rather than --timestep_respacing")
    threshold = dynamic_threshold(options.dynamic_threshold) if options.dynamic_threshold else None
    return Sampler(name, grid, diffusion, _maker(name, options), path, options.clip_denoised, threshold)


def _maker(name: str, options: argparse.Namespace) -> Callable[[], Rule]:
    if name == "ddim":
        return lambda: DDIM(options.ddim_eta)
    if name in ("euler", "heun"):
        kind = Heun if name == "heun" else Euler
        return lambda: kind(options.churn_noise)
    return RULES[name]


def prepare_model(options: argparse.Namespace, model: th.nn.Module) -> th.nn.Module:
    """The model on the device, in the precision and layout of the options, compiled where asked."""
    model.to(dist_util.dev())
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
    interval = _interval(options, diffusion)
    scale, rescale = options.guidance_scale, options.guidance_rescale
    if options.guide_path:
        weaker, takes_classes = _load_guide(options)
        model = Autoguidance(model, weaker, scale, takes_classes, interval=interval, rescale=rescale)
    elif scale != 1:
        _check_null_class(options, metadata)
        model = ClassifierFreeGuidance(model, scale, interval, rescale)
    classes = classes_of(options, metadata)
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
    sigmas = np.array(comma_list(options.guidance_interval, float))
    low, high = timestep_of_sigma(diffusion.base_alphas_cumprod, sigmas)
    return diffusion.network_timestep(low), diffusion.network_timestep(high)


def _check_null_class(options: argparse.Namespace, metadata: Mapping[str, Any]) -> None:
    if not options.class_cond:
        raise UserError(
            f"--guidance_scale {options.guidance_scale}: {options.model_path} was trained without classes. Train with "
            "--class_cond True --label_drop 0.1, or guide by a weaker checkpoint with --guide_path"
        )
    if not metadata.get("config", {}).get("label_drop"):
        raise UserError(
            f"--guidance_scale {options.guidance_scale}: {options.model_path} never saw an image without its class. "
            "Train with --label_drop 0.1 (a tenth as long will do from --init_checkpoint "
            f"{options.model_path}), or guide by an unconditional checkpoint with --guide_path"
        )


# What two networks must have in common for one to guide the other, and what a classifier must share with both.
_NOISE = ("diffusion_steps", "noise_schedule", "schedule_shift", "zero_terminal_snr", "rescale_timesteps")
_SHARED = ("image_size", "large_size", "small_size", "channels", "predict_xstart", "predict_v", *_NOISE)


def _load_guide(options: argparse.Namespace) -> tuple[th.nn.Module, bool]:
    """(the prepared guide, whether it takes classes)."""
    theirs = copy.copy(options)
    # What describes the model describes its guide too, where the guide's file does not say.
    theirs.model_path = options.guide_path
    theirs.given = options.given & {"preset"}
    guide, _, _ = load_model(theirs)
    for name in (name for name in _SHARED if hasattr(options, name)):
        if getattr(options, name) != getattr(theirs, name):
            raise UserError(
                f"--guide_path {options.guide_path} has {name} {getattr(theirs, name)}, but {options.model_path} has "
                f"{getattr(options, name)}: they must agree"
            )
    if theirs.class_cond and not options.class_cond:
        raise UserError(f"--guide_path {options.guide_path} needs classes, which {options.model_path} has not")
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
    if classes is not None and classes != theirs:
        raise UserError(
            f"--classifier_path {path} has the {theirs.num} classes {_names(theirs)}, but {options.model_path} has the "
            f"{classes.num} classes {_names(classes)}: they must agree"
        )
    logger.log(f"guided by the classifier {path}, scale {options.classifier_scale}")
    return prepare_model(options, classifier), theirs


def _names(classes: Classes) -> str:
    return ", ".join((classes.names or ["without names"])[:10])
