"""The training step: forward, backward, optimizer, averages, and the rows of the log. Reading images is left out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from benchmarks import published
from improved_diffusion import distributed
from improved_diffusion.training.kinds import task_of
from improved_diffusion.training.run import build_loop

from .apart import apart
from .context import Context
from .ways import Clock, Way
from .workloads import Workload, parameters

# The options of `improved-diffusion train` that are compared, by name, the most interesting ones first.
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": dict(precision="bf16"),
    "bf16 channels_last": dict(precision="bf16", memory_format="channels_last"),
    "fp16 channels_last": dict(precision="fp16", memory_format="channels_last"),
    "bf16 channels_last norm_precision=mixed": dict(
        precision="bf16", memory_format="channels_last", norm_precision="mixed"
    ),
    "tf32": dict(tf32="all"),
    "bf16 cuda_graphs": dict(precision="bf16", cuda_graphs=True),
    "bf16 channels_last cuda_graphs": dict(precision="bf16", memory_format="channels_last", cuda_graphs=True),
    "bf16 channels_last cudnn_benchmark": dict(
        precision="bf16", memory_format="channels_last", cudnn_benchmark=True
    ),
    "fp16": dict(precision="fp16"),
    "fp32": dict(),  # torch's own way on a GPU: convolutions in TF32, matrix products in fp32
    "fp32 channels_last": dict(memory_format="channels_last"),
    "fp32 tf32=none": dict(tf32="none"),
}  # fmt: skip
GPU_COMPILED: dict[str, dict[str, Any]] = {
    "bf16 channels_last compile": dict(precision="bf16", memory_format="channels_last", compile="blocks"),
    "bf16 channels_last compile cuda_graphs": dict(
        precision="bf16", memory_format="channels_last", compile="blocks", cuda_graphs=True
    ),
    "bf16 channels_last compile=model": dict(precision="bf16", memory_format="channels_last", compile="model"),
    "fp16 channels_last compile": dict(precision="fp16", memory_format="channels_last", compile="blocks"),
    "bf16 compile": dict(precision="bf16", compile="blocks"),
    "tf32 channels_last compile": dict(tf32="all", memory_format="channels_last", compile="blocks"),
}  # fmt: skip
CPU_OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": dict(),
    "bf16": dict(precision="bf16"),
    "fp32 channels_last": dict(memory_format="channels_last"),
    "bf16 channels_last": dict(precision="bf16", memory_format="channels_last"),
}  # fmt: skip
CPU_COMPILED: dict[str, dict[str, Any]] = {
    "fp32 compile": dict(compile="blocks"),
    "bf16 compile": dict(precision="bf16", compile="blocks"),
}  # fmt: skip
QUICK_OPTIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": dict(precision="bf16")}
NEEDS = {"off": 4.0, "blocks": 40.0, "model": 90.0}  # seconds to prepare and measure, most of them to compile
LOG_INTERVAL = 10


def run(context: Context) -> None:
    """Report each network's ways, the baseline with each of the parts that the device's memory holds at once."""
    context.report.begin("training", "a training step, against the published way and diffusers' loop")
    chosen = context.workloads()
    for number, workload in enumerate(chosen):
        clock = context.clock.part(1 / (len(chosen) - number))
        baseline, *others = context.ways(_ways(workload, context))
        size = workload.together - 1
        parts = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
        for left, part in zip(range(len(parts), 0, -1), parts):
            needs = [sum(way.needs for way in [baseline, *each]) for each in parts[-left:]]
            seconds = min(clock.left, max(needs[0], clock.left * needs[0] / sum(needs)))
            context.compare([baseline, *part], Clock(seconds), workload.batch_size, workload=workload.name)
            gc.collect()
            distributed.empty_cache(distributed.dev())


def _ways(workload: Workload, context: Context) -> list[Way]:
    """The published way, diffusers' and ours, the latter with those that compile last."""
    gpu = context.on_gpu
    options = QUICK_OPTIONS if context.quick else GPU_OPTIONS if gpu else CPU_OPTIONS
    compiled = {} if context.quick else GPU_COMPILED if gpu else CPU_COMPILED
    ours = our_ways(workload, options)
    others = [published_way(workload, fp16=False)] if gpu else []
    ways = [
        published_way(workload, fp16=gpu), *ours[:2], diffusers_way(workload, bf16=gpu), *ours[2:], *others,
        *our_ways(workload, compiled),
    ]  # fmt: skip
    return ways if gpu or context.quick else [apart(way, workload) for way in ways]


def way_named(workload: Workload, name: str) -> Way:
    """One of the ways on a CPU."""
    ways = [published_way(workload, fp16=False), diffusers_way(workload, bf16=False)]
    return next(way for way in [*ways, *our_ways(workload, CPU_OPTIONS | CPU_COMPILED)] if way.name == name)


def columns(workload: Workload, arithmetic: str, **more: Any) -> dict[str, Any]:
    """Of a row: the model FLOPs are those of our network, whoever computes it and however."""
    return {
        "arithmetic": arithmetic, "flops": workload.training_flops * workload.batch_size,
        "kinds": ("convolution", "convolution_step", "matmul"), **more,
    }  # fmt: skip


# Ours


def our_ways(workload: Workload, options: dict[str, dict[str, Any]]) -> list[Way]:
    """TrainLoop's step with each set of options of `improved-diffusion train`."""
    return [
        Way(
            name, our_step(workload, given), warm_up(), NEEDS[given.get("compile", "off")],
            memory=on_gpu() or "compile" not in given,  # compiling under the profiler takes too long
            columns=columns(workload, arithmetic_of(given)),
        )
        for name, given in options.items()
    ]  # fmt: skip


def arithmetic_of(options: dict[str, Any]) -> str:
    """The number format of most of the work. torch's own fp32 convolutions on GPUs are in TF32."""
    precision = options.get("precision", "fp32")
    return "tf32" if precision == "fp32" and on_gpu() and options.get("tf32") != "none" else precision


def on_gpu() -> bool:
    """Whether a GPU computes."""
    return distributed.dev().type == "cuda"


def warm_up() -> int:
    """Steps before those that count: on a GPU more, since libraries choose their algorithms."""
    return 4 if on_gpu() else 2


def our_step(workload: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    """Makes the call: a step of the loop that `improved-diffusion train` makes of the options."""

    def make() -> Callable[[], Any]:
        loop = our_loop(workload, options)

        def step() -> None:
            loop.run_step(*next(loop.data))
            loop.step += 1
            if loop.step % LOG_INTERVAL == 0:
                loop.run_log.write(loop.steps_done, loop.lr)

        return step

    return make


def our_loop(workload: Workload, options: dict[str, Any]) -> Any:
    """A TrainLoop on the same batch again and again."""
    data = Repeated(workload)
    loop, _ = build_loop(task_of(workload.settings(max_steps=10**9, **options)), data, data)  # type: ignore[arg-type]
    return loop


class Repeated:
    """One batch again and again, in the form that a run reads."""

    def __init__(self, workload: Workload):
        self.batch = workload.pixels()
        self.class_names = [str(i) for i in range(workload.classes)] or None
        self.seen_classes = list(range(workload.classes))
        self.num_images = workload.batch_size

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        images, kwargs = self.batch
        return images, dict(kwargs)


# The others


def published_way(workload: Workload, fp16: bool) -> Way:
    """The published step."""
    name = "fp16" if fp16 else "fp32"

    def make() -> Callable[[], Any]:
        network = workload.published().to(distributed.dev())
        training = published.Training(network, workload.published_loss(), fp16=fp16)
        images, kwargs = workload.images()
        return lambda: training.step(images, kwargs)

    found = columns(workload, arithmetic_of({"precision": name}), parameters=parameters(workload.model()))
    return Way(f"published {name}", make, warm_up(), NEEDS["off"], columns=found)


def diffusers_way(workload: Workload, bf16: bool) -> Way:
    """A step of diffusers' loop of training: AdamW, its average of the weights, the mean squared error of the noise."""
    name = "bf16" if bf16 else "fp32"

    def make() -> Callable[[], Any]:
        from diffusers import DDPMScheduler, get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        device = distributed.dev()
        th.manual_seed(0)
        network = workload.diffusers().to(device).train()
        steps = workload.settings().diffusion.diffusion_steps
        scheduler = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
        opt = th.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        schedule = get_cosine_schedule_with_warmup(opt, 500, 10**6)
        average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        images, kwargs = workload.images()
        images = images.pin_memory() if distributed.pins_memory(device) else images  # as accelerate's loader does

        def step() -> float:
            batch = images.to(device, non_blocking=True)
            classes = kwargs["y"].to(device, non_blocking=True) if kwargs else None
            noise = th.randn_like(batch)
            t = th.randint(0, steps, (len(batch),), device=device)
            noisy = scheduler.add_noise(batch, noise, t)
            with th.autocast(device.type, th.bfloat16, enabled=bf16):
                loss = F.mse_loss(network(noisy, t, class_labels=classes).sample.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
            average.step(network.parameters())
            return loss.detach().item()

        return step

    found: dict[str, Any] = columns(workload, arithmetic_of({"precision": name}))
    with contextlib.suppress(ImportError):  # its row will say so
        found["parameters"] = parameters(workload.diffusers())
    return Way(f"diffusers {name}", make, warm_up(), NEEDS["off"], columns=found)
