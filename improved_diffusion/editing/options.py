"""The settings of the editing commands: what each fills in, and what it cannot work with. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from ..config import UserError
from ..config.settings import Editing
from ..sampling.timestep_grids import is_list

S = TypeVar("S", bound=Editing)

INVERTIBLE = ("ddim", "euler", "heun")  # a step depends on nothing but where it starts, so it can be taken backwards
# The grid with the smallest round-trip error, by far: an error of the predicted noise counts sigma / alpha times in
# x_0, and unlike the published strides this grid stops while some of the image is left.
ENCODING_GRID, ENCODING_STEPS = "karras", 200
EDITING_STEPS = 100  # of ancestral sampling and DDIM


def default_steps(settings: S, steps: int, grid: str = "auto") -> S:
    """The settings with this many steps on this grid, where they name none; no more than the model has."""
    options, respacing = settings.sampler, settings.diffusion.timestep_respacing
    if respacing:
        return settings
    grid = grid if options.timestep_grid == "auto" else options.timestep_grid
    count = options.steps or (0 if is_list(grid) else min(steps, settings.diffusion.diffusion_steps))
    return settings.replace(timestep_grid=grid, steps=count)


def inversion_settings(settings: S, given: Iterable[str]) -> S:
    """The settings for going from images to their noise and back: 200 steps of DDIM unless the user says otherwise.

    Raises UserError for a sampler that has no way back, and for guidance, noise and thresholds.
    """
    settings = settings.replace(sampler=_deterministic(settings))
    settings = default_steps(settings, ENCODING_STEPS, ENCODING_GRID)
    if "clip_denoised" not in given:
        settings = settings.replace(clip_denoised=False)  # clipping cannot be undone
    if settings.sampler.sampler not in INVERTIBLE:
        raise UserError(
            f"--sampler {settings.sampler.sampler} cannot go from an image to its noise: choose one of "
            + ", ".join(INVERTIBLE)
        )
    off = dict(guidance_scale=1, classifier_path="", ddim_eta=0, churn=0, dynamic_threshold=0)
    refuse_options(settings, "cannot be undone when going from an image to its noise: leave it out", **off)
    return settings


def decoding_settings(settings: S, given: Iterable[str]) -> S:
    """The settings for going from noise to images by the steps of `inversion_settings`, with any sampler."""
    settings = default_steps(settings.replace(sampler=_deterministic(settings)), ENCODING_STEPS, ENCODING_GRID)
    return settings if "clip_denoised" in given else settings.replace(clip_denoised=False)


def _deterministic(settings: Editing) -> str:
    """The name of the sampler: DDIM rather than ancestral sampling, unless another is given."""
    return "ddim" if settings.sampler.sampler == "auto" else settings.sampler.sampler


def renoising_settings(settings: S, command: str) -> S:
    """The settings of a command whose path adds noise: 100 steps of ancestral sampling or DDIM unless given."""
    if settings.sampler.sampler in ("auto", "ancestral", "ddim"):
        settings = default_steps(settings, EDITING_STEPS)
    refuse_options(settings, f"adds noise during sampling, and so does {command}: leave it out", churn=0)
    return settings


def refuse_options(settings: Editing, why: str, **off: Any) -> None:
    """Raise UserError for each option that has another value than in `off`."""
    values = settings.values()
    for name, value in off.items():
        if values[name] != value:
            raise UserError(f"--{name} {values[name]} {why}")
