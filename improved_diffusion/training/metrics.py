"""What the steps report: collected on the device and read when the log is written, so that no step waits for it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

from .. import distributed


class LossMeter:
    """Means of what a step reports, collected on the device and read when the log is written."""

    def __init__(self) -> None:
        self.sums: dict[str, th.Tensor] = {}  # name -> float64 [2]: sum and count

    def add(self, name: str, values: th.Tensor, counted: th.Tensor | None = None) -> None:
        """Add values of any shape; where `counted` (of the same shape) is 0 they are left out."""
        counted = th.ones_like(values) if counted is None else counted
        pair = th.stack([th.where(counted > 0, values, 0.0).double().sum(), counted.double().sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_losses(self, num_timesteps: int, ts: th.Tensor, losses: dict[str, th.Tensor]) -> None:
        """Add [N] losses, as a whole and by the quarter of the timesteps that each belongs to (name_q0..name_q3)."""
        quartile = (4 * ts) // num_timesteps
        for name, values in losses.items():
            finite = th.isfinite(values).double()  # the others are of skipped steps
            self.add(name, values, counted=finite)
            both = th.zeros(4, 2, dtype=th.float64, device=values.device)
            both.index_add_(0, quartile, th.stack([th.where(finite > 0, values.double(), 0.0), finite], dim=1))
            for q in range(4):
                key = f"{name}_q{q}"
                self.sums[key] = self.sums[key] + both[q] if key in self.sums else both[q]

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last call, {} where nothing was added. Collective."""
        if not self.sums:
            return {}
        table = distributed.sum_over_ranks(th.stack(list(self.sums.values()))).cpu()
        means = {name: float(row[0] / row[1]) for name, row in zip(self.sums, table) if row[1]}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, th.Tensor]:
        """This rank's sums since the last read."""
        return {name: pair.cpu().clone() for name, pair in self.sums.items()}

    def load_state_dict(self, state: dict[str, th.Tensor], device: th.device | str = "cpu") -> None:
        """Restore what `state_dict` gave."""
        self.sums = {name: pair.to(device) for name, pair in state.items()}


class BadSteps:
    """Counts the steps without a finite gradient: how many in a row, and where that row began."""

    def __init__(self, device: th.device | str):
        # [in the present row, its first step, in the longest row since the last read, its first step]
        self.counts = th.zeros(4, dtype=th.int64, device=device)

    def note(self, bad: th.Tensor, step: int) -> None:
        """Count a step; `bad` is 1 where it was skipped, else 0."""
        length, first, longest, its_first = self.counts
        length = (length + 1) * bad.long()
        first = th.where(length == 1, step, first)
        longer = length > longest
        self.counts = th.stack(
            [length, first, th.where(longer, length, longest), th.where(longer, first, its_first)],
        )

    def read(self) -> tuple[int, int]:
        """(steps in the longest row that reached into the time since the last call, its first step)."""
        _, _, longest, its_first = self.counts.tolist()
        self.counts[2] = 0
        return longest, its_first

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint keeps."""
        return {"counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.counts.copy_(state["counts"])


class StepClock:
    """How fast the steps are on this rank, by the host's clock.

    :param batch_size: images a step over all ranks.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.steps = 0
        self.waited = 0.0  # seconds
        self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's batch."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        self.steps += 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no step, such as drawing previews: its time does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Since the last call: images/s over all ranks, the share of the time spent waiting for data; and the most
        memory, in GiB, that this rank has used: of the GPU's, or without one, of the machine's."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        speed = {
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "peak_gib": peak_memory() / 2**30,
        }
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()
        return speed


def peak_memory() -> float:
    """The most memory that this process has used, in bytes: of its GPU's, or without one, of the machine's."""
    if distributed.dev().type == "cuda":
        return th.cuda.max_memory_allocated(distributed.dev())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # kilobytes, but for macOS
