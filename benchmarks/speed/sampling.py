"""Images: so many at once, by the published sampler and by those with fewer steps.

On a CPU the demo's network; `--workloads cifar10-64` measures the CIFAR-10 network there, of whose 250 published
steps 10 are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch as th

from benchmarks import published
from improved_diffusion import distributed
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.sampling.sampler import build_sampler

from .context import Context
from .network import diffusers_model, our_model, published_model
from .ways import Way
from .workloads import CIFAR10, Workload

PUBLISHED_STEPS = 250


def run(context: Context) -> None:
    """Report the samplers."""
    cifar10 = Workload("cifar10-64", CIFAR10, 64)
    slow = not context.on_gpu and cifar10.name in context.only_workloads
    workload = cifar10 if context.on_gpu or slow else Workload("demo-16", "demo", 16)
    steps = {"all": PUBLISHED_STEPS, "few": 15}
    if context.quick:
        workload, steps = Workload("tiny", "tiny", 2), {"all": 6, "few": 3}
    context.report.begin("sampling", f"{workload.batch_size} images in one batch", images=workload.batch_size)
    few = dict(sampler="dpmpp_2m", steps=steps["few"])
    ways = {
        f"dpmpp_2m {steps['few']} steps": few,
        f"dpmpp_2m {steps['few']} steps bf16": {**few, "precision": "bf16"},
        f"ancestral {steps['all']} steps": dict(sampler="ancestral", steps=steps["all"]),
    }
    if context.on_gpu:
        fast = {**few, "precision": "bf16", "memory_format": "channels_last"}
        ways[f"dpmpp_2m {steps['few']} steps bf16 channels_last cuda_graphs"] = {**fast, "cuda_graphs": True}
    made = 10 if slow else steps["all"]
    published_way = _published_way(workload, steps["all"], made, fp16=context.on_gpu)
    found = [
        replace(published_way, memory=not slow),
        *(Way(name, _ours(workload, options), warm_up=1, memory=not slow) for name, options in ways.items()),
        Way(f"diffusers DPM-Solver++ {steps['few']} steps", _diffusers(workload, steps["few"]), 1, memory=not slow),
    ]
    least = 1 if slow else 2
    context.compare(context.ways(found), context.clock, workload.batch_size, least=least, workload=workload.name)


def _published_way(workload: Workload, steps: int, made: int, fp16: bool) -> Way:
    """:param made: the steps that a call makes of all of them."""

    def make() -> Callable[[], Any]:
        network = published_model(workload, fp16)
        loss, shape = workload.published_loss(), (workload.batch_size, *workload.shape)
        _, kwargs = workload.evaluation(workload.batch_size)
        return lambda: published.sample(network, loss, shape, made, distributed.dev(), **kwargs)

    name = f"published {'fp16' if fp16 else 'fp32'} {steps} steps"
    return Way(name, make, warm_up=1, share=made / steps)


def _ours(workload: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        settings = workload.settings()
        ours = {**settings.model.__dict__, **settings.diffusion.__dict__, **options}
        sampling = ImageSampling.of({name: value for name, value in ours.items() if name in ImageSampling.options()})
        sampler = build_sampler(sampling, build_diffusion(sampling.diffusion))
        model = our_model(workload, options)
        _, kwargs = workload.evaluation(workload.batch_size)

        def draw() -> th.Tensor:
            noise = SeededNoise(0, range(workload.batch_size))
            for out in sampler.trajectory(model, workload.shape, noise, kwargs):
                sample = out["sample"]
            return sample

        return draw

    return make


def _diffusers(workload: Workload, steps: int) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        from diffusers import DPMSolverMultistepScheduler

        device, network = distributed.dev(), diffusers_model(workload)
        trained = workload.settings().diffusion.diffusion_steps
        scheduler = DPMSolverMultistepScheduler(num_train_timesteps=trained, beta_schedule="squaredcos_cap_v2")
        _, kwargs = workload.evaluation(workload.batch_size)

        def draw() -> th.Tensor:
            scheduler.set_timesteps(steps, device=device)
            x = th.randn(workload.batch_size, *workload.shape, device=device, dtype=network.dtype)
            with th.no_grad():
                for t in scheduler.timesteps:
                    output = network(x, t.long(), class_labels=kwargs.get("y")).sample
                    x = scheduler.step(output, t, x).prev_sample
            return x

        return draw

    return make
