"""An evaluation of the network, as sampling makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

from improved_diffusion import distributed
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.sampling.guided import prepare_model

from .context import Context
from .training import NEEDS, arithmetic_of
from .ways import Way
from .workloads import Workload, filled

# Options of `improved-diffusion sample`, by name.
OPTIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": dict(precision="bf16")}
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "bf16 channels_last": dict(precision="bf16", memory_format="channels_last"),
    "fp16 channels_last": dict(precision="fp16", memory_format="channels_last"),
    "bf16 cuda_graphs": dict(precision="bf16", cuda_graphs=True),
    "bf16 channels_last compile": dict(precision="bf16", memory_format="channels_last", compile="blocks"),
}  # fmt: skip


def run(context: Context) -> None:
    """Report each network's ways."""
    context.report.begin("network", "an evaluation of the network without gradients")
    chosen = context.workloads()
    for number, workload in enumerate(chosen):
        ways = [published_way(workload, context.on_gpu), *our_ways(workload, context), diffusers_way(workload)]
        clock = context.clock.part(1 / (len(chosen) - number))
        context.compare(context.ways(ways), clock, workload.batch_size, workload=workload.name)


def our_model(workload: Workload, options: dict[str, Any]) -> th.nn.Module:
    """Our network, ready to sample with these options."""
    settings = workload.settings()
    values = {**settings.model.__dict__, **settings.diffusion.__dict__, **options}
    sampling = ImageSampling.of({name: value for name, value in values.items() if name in ImageSampling.options()})
    th.manual_seed(0)
    model, _ = build_model_and_diffusion(sampling.model, sampling.diffusion)
    return prepare_model(sampling.sampler, filled(model).eval())


def our_ways(workload: Workload, context: Context) -> list[Way]:
    """With each set of options."""

    def make(options: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
        return lambda: _call(workload, our_model(workload, options))

    return [
        Way(name, make(options), 3, NEEDS[options.get("compile", "off")], columns=_columns(workload, options))
        for name, options in (GPU_OPTIONS if context.on_gpu else OPTIONS).items()
    ]  # fmt: skip


def published_way(workload: Workload, fp16: bool) -> Way:
    """The published network."""
    precision = "fp16" if fp16 else "fp32"
    columns = _columns(workload, {"precision": precision})
    return Way(f"published {precision}", lambda: _call(workload, published_model(workload, fp16)), 3, columns=columns)


def published_model(workload: Workload, fp16: bool) -> th.nn.Module:
    """The published network on the device."""
    network = workload.published().to(distributed.dev()).eval()
    if fp16:
        network.convert_to_fp16()
    return network


def diffusers_way(workload: Workload) -> Way:
    """diffusers' network."""
    precision = "bf16" if distributed.dev().type == "cuda" else "fp32"

    def make() -> Callable[[], Any]:
        network = diffusers_model(workload)
        (x, _), kwargs = workload.evaluation(workload.batch_size)
        x = x.to(network.dtype)
        t = th.full((len(x),), workload.settings().diffusion.diffusion_steps // 2, device=x.device)

        def call() -> Any:
            with th.no_grad():
                return network(x, t, class_labels=kwargs.get("y")).sample

        return call

    return Way(f"diffusers {precision}", make, 3, columns=_columns(workload, {"precision": precision}))


def diffusers_model(workload: Workload) -> Any:
    """diffusers' network on the device, in bfloat16 on a GPU."""
    network = workload.diffusers().to(distributed.dev()).eval()
    return network.to(th.bfloat16) if distributed.dev().type == "cuda" else network


def _call(workload: Workload, network: th.nn.Module) -> Callable[[], Any]:
    args, kwargs = workload.evaluation(workload.batch_size)

    def call() -> Any:
        with th.no_grad():
            return network(*args, **kwargs)

    return call


def _columns(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    return {"arithmetic": arithmetic_of(options), "flops": workload.forward_flops * workload.batch_size}
