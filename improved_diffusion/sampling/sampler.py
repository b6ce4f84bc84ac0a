"""From options to a sampler: a solver and the noise levels that it visits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..config import SamplerConfig, UserError, height_width
from ..models.determinism import refusals_explained
from ..respace import SpacedDiffusion
from ..utils.text import counted
from .guidance import dynamic_threshold
from .noise import SeededNoise
from .solvers import DDIM, RULES, Euler, Heun, Rule, sample_loop_progressive
from .timestep_grids import churned, is_list, side_of, straight_path, table, timestep_grid

STEPS, RENOISE_STEPS = 20, 4  # of the solvers made for few steps, and for fewer
PUBLISHED = ("ancestral", "ddim")  # whose default is all steps
# The default grid of each solver: as published, and for the others the one with the smallest errors in
# benchmarks/sampler_quality.py; in few steps, those of benchmarks/few_steps.py.
GRIDS = {"ancestral": "uniform", "ddim": "ddim", "euler": "karras", "heun": "karras", "renoise": "coarse"}
OTHER_GRID, FEW_STEPS_GRID = "logsnr", "coarse"
FEW_STEPS = 6


@dataclass(frozen=True)
class Sampler:
    """A solver and its steps.

    :param grid: the name of its timestep grid.
    :param make_rule: gives a fresh rule for each batch.
    :param path: the timesteps of `diffusion` to visit; -1 is the image.
    :param clip_denoised, denoised_fn, cond_fn: see `sample_loop_progressive`.
    :param settings: the other options that its samples depend on.
    """

    name: str
    grid: str
    diffusion: SpacedDiffusion
    make_rule: Callable[[], Rule]
    path: Sequence[int]
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None
    cond_fn: Callable[..., th.Tensor] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps remove noise."""
        return sum(there < here for here, there in zip(self.path, self.path[1:]))

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for each sample."""
        return self.make_rule().evaluations(self.steps)

    def trajectory(
        self, model: th.nn.Module, shape: Sequence[int], draw: SeededNoise, model_kwargs: Mapping[str, Any],
        noise: th.Tensor | None = None, path: Sequence[int] | None = None, rule: Rule | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """`sample` and `pred_xstart` [N, C, H, W] after each step.

        :param shape: (C, H, W) of an image.
        :param draw: each sample's noise.
        :param noise, path, rule: where to start, which levels to visit and by which rule, if not the sampler's own.
        """
        with refusals_explained():
            yield from sample_loop_progressive(
                rule or self.make_rule(),
                self.diffusion,
                model,
                (len(draw), *shape),
                noise=noise,
                clip_denoised=self.clip_denoised,
                denoised_fn=self.denoised_fn,
                cond_fn=self.cond_fn,
                model_kwargs=dict(model_kwargs),
                device=distributed.dev(),
                noise_fn=draw,
                path=self.path if path is None else path,
            )

    def describe(self) -> str:
        """One line on the steps."""
        return (
            f"{self.name}, {counted(self.steps, 'step')}, {counted(self.evaluations, 'evaluation')} of the network for "
            f"each image (timestep grid: {self.grid})"
        )

    def request(self) -> dict[str, Any]:
        """What its samples depend on. The same steps give the same answer, whichever options named them."""
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


def build_sampler(settings: Any, diffusion: SpacedDiffusion) -> Sampler:
    """The sampler that the settings ask for.

    :param settings: with groups `sampler`, `model` and `diffusion`.
    :param diffusion: on the steps of --timestep_respacing.

    Raises UserError for options that contradict each other, and for more steps than the model has noise levels.
    """
    options, respacing = settings.sampler, settings.diffusion.timestep_respacing
    name = options.sampler
    if name == "auto":
        name = "ddim" if options.use_ddim else "ancestral"
    grid = respacing or "uniform"
    path: Sequence[int] = straight_path(diffusion.num_timesteps)
    if not respacing and (options.steps or options.timestep_grid != "auto" or name not in PUBLISHED):
        base = diffusion.base_alphas_cumprod
        grid, levels = _levels(name, settings, base)
        levels, path = churned(levels, base, options.churn, options.churn_min, options.churn_max or math.inf)
        diffusion = diffusion.respaced(levels)
    elif respacing and (options.steps or options.timestep_grid != "auto"):
        other = f"--steps {options.steps}" if options.steps else f"--timestep_grid {options.timestep_grid}"
        raise UserError(
            f"--timestep_respacing {respacing}, given or from the checkpoint, contradicts {other}: give one of them, "
            f'or --timestep_respacing "" to take {other}'
        )
    elif options.churn:
        raise UserError(f"--churn {options.churn} needs --steps, rather than --timestep_respacing")
    threshold = dynamic_threshold(options.dynamic_threshold) if options.dynamic_threshold else None
    depends_on = {"clip_denoised": options.clip_denoised, "dynamic_threshold": options.dynamic_threshold}
    depends_on |= {"ddim_eta": options.ddim_eta} if name == "ddim" else {}
    depends_on |= {"churn_noise": options.churn_noise} if options.churn else {}
    depends_on |= {
        option: getattr(options, option) for option in ("compile", "memory_format", "norm_precision", "tf32")
    }
    depends_on["precision"] = "fp16" if options.use_fp16 else options.precision
    return Sampler(
        name, grid, diffusion, _maker(name, options), path, options.clip_denoised, threshold, settings=depends_on
    )


def default_grid(name: str, count: int) -> str:
    """The timestep grid of a solver in so many steps."""
    if name not in PUBLISHED and count <= FEW_STEPS:
        return FEW_STEPS_GRID
    return GRIDS.get(name, OTHER_GRID)


def _levels(name: str, settings: Any, base: np.ndarray) -> tuple[str, np.ndarray]:
    """(the grid's name, its timesteps) for a solver; base [T] is alpha_bar of the trained process."""
    side = side_of(*height_width(settings.model.size))
    options = settings.sampler
    grid = options.timestep_grid
    few = RENOISE_STEPS if name == "renoise" else STEPS
    count = options.steps or (0 if is_list(grid) else len(base) if name in PUBLISHED else min(few, len(base)))
    if grid != "auto":
        return grid, timestep_grid(grid, count, base, side)
    grid = default_grid(name, count)
    # A model trained on pure noise must start from it (Lin et al. 2024, sec. 3.3).
    if base[-1] > 0 or grid in ("uniform", "coarse"):  # which do
        return grid, timestep_grid(grid, count, base, side)
    if name == "ddim" or count == 1:
        return "trailing", timestep_grid("trailing", count, base)
    return f"{grid}, and pure noise", np.append(timestep_grid(grid, count - 1, base, side), len(base) - 1.0)


def _maker(name: str, options: SamplerConfig) -> Callable[[], Rule]:
    if name == "ddim":
        return lambda: DDIM(options.ddim_eta)
    if name in ("euler", "heun"):
        kind = Heun if name == "heun" else Euler
        return lambda: kind(options.churn_noise)
    return RULES[name]
