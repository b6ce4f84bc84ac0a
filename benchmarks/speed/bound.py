"""Bits/dim: the bound of a batch over a respaced process, by timesteps in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

from improved_diffusion import distributed
from improved_diffusion.evaluation.likelihood import timesteps_per_pass
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.sampling.noise import SeededNoise

from .context import Context
from .network import our_model, published_model
from .ways import Way
from .workloads import CIFAR10, Workload

STEPS = 32  # timesteps of the bound
PER_PASS = (1, 8, 32)


def run(context: Context) -> None:
    """Report, for one image and for several, how many timesteps go into a pass."""
    steps = 4 if context.quick else STEPS
    context.report.begin("bound", f"the bound in bits/dim from {steps} timesteps", timesteps=steps)
    sizes = (2,) if context.quick else (1, 8)
    source = "tiny" if context.quick else CIFAR10 if context.on_gpu else "demo"
    for number, size in enumerate(sizes):
        workload = Workload(f"{source}-{size}", source, size)
        automatic = timesteps_per_pass((size, *workload.shape), steps, distributed.dev().type)
        counts = sorted({each for each in (*PER_PASS, automatic) if each <= steps})
        ways = [
            Way(
                f"{count} a pass",
                _call(workload, steps, count),
                columns={"note": "automatic" if count == automatic else ""},
            )
            for count in counts
        ]
        ways.append(Way("published, 1 a pass", _call(workload, steps, 1, ours=False)))
        clock = context.clock.part(1 / (len(sizes) - number))
        context.compare(context.ways(ways), clock, size, workload=workload.name)


def _note(automatic: bool) -> dict[str, Any]:
    return {"note": "automatic"} if automatic else {}


def _call(workload: Workload, steps: int, per_pass: int, ours: bool = True) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        settings = workload.settings(timestep_respacing=str(steps))
        diffusion = build_diffusion(settings.diffusion)
        model = our_model(workload, {}) if ours else published_model(workload, fp16=False)
        images, classes = workload.images()
        batch = images.to(distributed.dev())
        kwargs = {name: value.to(distributed.dev()) for name, value in classes.items()}

        def bound() -> th.Tensor:
            noise = SeededNoise(0, range(len(batch)))
            with th.no_grad():
                terms = diffusion.calc_bpd_loop(
                    model, batch, model_kwargs=kwargs, noise_fn=noise, timesteps_per_pass=per_pass
                )
            return terms["total_bpd"]

        return bound

    return make
