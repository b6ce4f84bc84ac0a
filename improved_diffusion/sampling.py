"""From options to what draws: the rule and its steps, and the model as it is evaluated, in its precision and guided."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from . import dist_util, logger
from .config import UserError, comma_list, height_width
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
from .schedules import sigma_at, timestep_of_sigma
from .script_util import load_classifier, load_model
from .timestep_grids import churned, largest_sigma, straight_path, table, timestep_grid

STEPS = 20  # of the rules that were made for few
PUBLISHED = ("ancestral", "ddim")  # whose default is all steps
# Where each rule's steps lie unless told: as published, and for the others where benchmarks/sampler_quality.py finds
# the smallest errors.
GRIDS = {"ancestral": "uniform", "ddim": "ddim", "euler": "karras", "heun": "karras"}
OTHER_GRID = "logsnr"


@dataclass(frozen=True)
class Sampler:
    """A rule on the steps that it takes.

    :param grid: what its timesteps are called.
    :param make_rule: gives a fresh rule for each batch.
    :param path: the timesteps of `diffusion` to visit; -1 is the image.
    :param settings: the other options that its samples depend on.
    """

    name: str
    grid: str
    diffusion: SpacedDiffusion
    make_rule: Callable[[], Rule]
    path: Sequence[int]
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None
    settings: Mapping[str, Any] = field(default_factory=dict)

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

    def request(self) -> dict[str, Any]:
        """What its samples depend on, however it was asked for."""
        visited = [self.diffusion.timestep_map[i] if i >= 0 else "image" for i in self.path]
        shown = visited if len(visited) <= 12 else [*visited[:5], "...", *visited[-5:]]
        return {
            "sampler": self.name,
            "steps": self.steps,
            "timesteps": ", ".join(f"{t:.6g}" if isinstance(t, (int, float)) else t for t in shown),
            "timesteps_sha256": hashlib.sha256(json.dumps(visited).encode()).hexdigest(),
            **self.settings,
        }

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
    if not options.timestep_respacing and (options.steps or options.timestep_grid != "auto" or name not in PUBLISHED):
        base = diffusion.base_alphas_cumprod
        grid, levels = _levels(name, options, base)
        levels, path = churned(levels, base, options.churn, options.churn_min, options.churn_max or math.inf)
        diffusion = diffusion.respaced(levels)
    elif options.timestep_respacing and (options.steps or options.timestep_grid != "auto"):
        other = f"--steps {options.steps}" if options.steps else f"--timestep_grid {options.timestep_grid}"
        raise UserError(f"--timestep_respacing {options.timestep_respacing} contradicts {other}: give one of them")
    elif options.churn:
        raise UserError(f"--churn {options.churn} needs --steps, rather than --timestep_respacing")
    threshold = dynamic_threshold(options.dynamic_threshold) if options.dynamic_threshold else None
    settings = {"clip_denoised": options.clip_denoised, "dynamic_threshold": options.dynamic_threshold}
    settings |= {"ddim_eta": options.ddim_eta} if name == "ddim" else {}
    settings |= {"churn_noise": options.churn_noise} if options.churn else {}
    settings |= {option: getattr(options, option) for option in ("precision", "channels_last", "compile")}
    return Sampler(name, grid, diffusion, _maker(name, options), path, options.clip_denoised, threshold, settings)


def _levels(name: str, options: argparse.Namespace, base: np.ndarray) -> tuple[str, np.ndarray]:
    """(the grid's name, its timesteps) for a rule; base [T] is alpha_bar of the trained process."""
    sigma_max = largest_sigma(*height_width(getattr(options, "large_size", None) or options.image_size))
    grid = options.timestep_grid
    listed = grid[:1].isdigit()
    count = options.steps or (0 if listed else len(base) if name in PUBLISHED else min(STEPS, len(base)))
    if grid != "auto":
        return grid, timestep_grid(grid, count, base, sigma_max)
    grid = GRIDS.get(name, OTHER_GRID)
    if base[-1] > 0 or name == "ancestral":
        return grid, timestep_grid(grid, count, base, sigma_max)
    # A model that has learned to start from pure noise is to be started there (Lin et al. 2024, sec. 3.3).
    if name == "ddim" or count == 1:
        return "trailing", timestep_grid("trailing", count, base)
    return f"{grid}, and pure noise", np.append(timestep_grid(grid, count - 1, base, sigma_max), len(base) - 1.0)


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
