"""What TrainLoop costs beyond the arithmetic: its logging, health checks, trackers, signals and saving.

Blocks of a bare loop (forward, backward, AdamW, one moving average, nothing else) take turns with blocks of TrainLoop
with everything on: a row of the log every 10 steps in log.txt, progress.csv, progress.jsonl and TensorBoard, and in
every second block a checkpoint. Reading images is left out. On CPUs the network is a tiny one, whose step takes less
than 20 ms, so that there is something to see.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from improved_diffusion import distributed
from improved_diffusion.data.pixels import to_model_range
from improved_diffusion.logs import logger
from improved_diffusion.logs.trackers import make_trackers
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.training.ema import Followed, ParameterEMA
from improved_diffusion.training.kinds import task_of
from improved_diffusion.training.run import build_loop

from .context import Context
from .machine import synchronize
from .training import Repeated
from .ways import Clock
from .workloads import Workload

RATE = 0.9999
SAVE_INTERVAL = 1000  # steps over which the cost of a save is spread; image_train.py saves every 10,000
SMALL = Workload("tiny-2", "tiny", 2)
BARE, LOOP, SAVING = "bare loop", "TrainLoop", "TrainLoop, with a save"


def run(context: Context) -> None:
    """Report a step of each."""
    context.report.begin("overhead", "a step of TrainLoop beside its arithmetic alone")
    workload = context.workloads()[-1] if context.on_gpu else SMALL
    block, blocks = (3, 2) if context.quick else (20, 32)
    with _logged(workload):
        data = Interleaved(workload, block, context.clock)
        settings = workload.settings(
            max_steps=block * (blocks + 1) + 1, log_interval=10, save_interval=2 * block, keep_last=1,
            ema_rate=str(RATE), lr_schedule="constant",
        )  # fmt: skip
        loop, _ = build_loop(task_of(settings), data, data)  # type: ignore[arg-type]
        loop.run_loop()
    step = {name: statistics.median(values) / block for name, values in data.seconds.items()}
    ratio = {name: statistics.median(values) for name, values in data.ratios.items()}
    save = max(0.0, step[SAVING] - step[LOOP]) * block
    rows = [
        {"workload": workload.name, "way": name, "seconds": value, "ratio": 1 / ratio[name],
         "rounds": len(data.seconds[name]), "per_second": workload.batch_size / value}
        for name, value in step.items()
    ]  # fmt: skip
    context.report.add(*rows)
    overhead, saving = ratio[LOOP] - 1, save / SAVE_INTERVAL / step[BARE]
    context.report.note(overhead=overhead, overhead_of_saves=saving, seconds_of_a_save=save)
    print(f"overhead of a step: {overhead:.1%}; of saves every {SAVE_INTERVAL} steps: {saving:.1%} more")


@contextmanager
def _logged(workload: Workload) -> Iterator[None]:
    """A folder with every kind of log but the terminal's."""
    formats = ["log", "csv", "jsonl"]
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(dir=folder, format_strs=formats):
        for tracker in make_trackers(["tensorboard"], folder, {"workload": workload.name}):
            logger.add_output(tracker)
        yield


class BareLoop:
    """The arithmetic of a training step and nothing else."""

    def __init__(self, workload: Workload):
        settings = workload.settings()
        th.manual_seed(0)
        model, self.diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
        self.model = model.to(distributed.dev())
        self.params = list(self.model.parameters())
        self.opt = th.optim.AdamW(self.params, lr=1e-4, fused=True)
        self.average, self.followed = ParameterEMA(RATE, self.params), Followed()
        self.applied = th.ones((), device=distributed.dev())

    def step(self, images: th.Tensor, kwargs: dict[str, th.Tensor], number: int) -> None:
        """One step on the batch."""
        for p in self.params:
            p.grad = None
        batch = to_model_range(images, distributed.dev())
        kwargs = {name: value.to(distributed.dev(), non_blocking=True) for name, value in kwargs.items()}
        t = th.randint(self.diffusion.num_timesteps, (len(batch),), device=batch.device)
        self.diffusion.training_losses(self.model, batch, t, kwargs)["loss"].mean().backward()
        self.opt.step()
        self.average.update(self.followed(self.params), self.applied, number)


class Interleaved(Repeated):
    """The data of a TrainLoop; between its blocks of steps, blocks of the bare loop run. Both are timed."""

    def __init__(self, workload: Workload, block: int, clock: Clock):
        super().__init__(workload)
        self.bare, self.block, self.clock = BareLoop(workload), block, clock
        self.taken = 0
        self.seconds: dict[str, list[float]] = {BARE: [], LOOP: [], SAVING: []}
        self.ratios: dict[str, list[float]] = {BARE: [1.0], LOOP: [], SAVING: []}  # to the bare blocks beside each
        self.since = 0.0

    def __next__(self) -> Any:
        if self.taken % self.block == 0:
            now = _time()
            number = self.taken // self.block - 1  # of the block that has just ended; the first ones warm up
            taken, bare = now - self.since, self.seconds[BARE]
            start = _time()
            for i in range(self.block):
                self.bare.step(*self.batch, i)
            self.since = _time()
            if number >= 0:
                bare.append(self.since - start)
            if number > 0:
                way = SAVING if number % 2 == 0 else LOOP
                self.seconds[way].append(taken)
                self.ratios[way].append(taken / statistics.mean(bare[-2:]))
        self.taken += 1
        return super().__next__()


def _time() -> float:
    synchronize()
    return time.perf_counter()
