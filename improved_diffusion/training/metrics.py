"""Values that the steps report, collected on the device and read when the log is written: no step waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch as th

from .. import distributed


class LossMeter:
    """Means of the values that the steps report; their sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, th.Tensor] = {}  # name -> [2]: sum and count, of the device's sum_dtype

    def add(self, name: str, values: th.Tensor, counted: th.Tensor | None = None) -> None:
        """Add values of any shape; those where `counted` (of the same shape) is 0 are left out."""
        counted = th.ones_like(values) if counted is None else counted
        dtype = distributed.sum_dtype(values.device)
        pair = th.stack([th.where(counted > 0, values, 0.0).to(dtype).sum(), counted.to(dtype).sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_losses(self, num_timesteps: int, ts: th.Tensor, losses: Mapping[str, th.Tensor]) -> None:
        """Add [N] losses: all of them under their name, and each in its quarter of the timesteps (name_q0..name_q3)."""
        quartile = (4 * ts) // num_timesteps
        for name, values in losses.items():
            dtype = distributed.sum_dtype(values.device)
            finite = th.isfinite(values).to(dtype)  # the others are of skipped steps
            self.add(name, values, counted=finite)
            both = th.zeros(4, 2, dtype=dtype, device=values.device)
            both.index_add_(0, quartile, th.stack([th.where(finite > 0, values.to(dtype), 0.0), finite], dim=1))
            for q in range(4):
                key = f"{name}_q{q}"
                self.sums[key] = self.sums[key] + both[q] if key in self.sums else both[q]

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last call, {} where nothing was added. Collective."""
        if not self.sums:
            return {}
        return self._means(distributed.sum_over_ranks(th.stack(list(self.sums.values()))))

    def read_own(self) -> dict[str, float]:
        """`read` of this rank's values alone; not collective."""
        return self._means(th.stack(list(self.sums.values()))) if self.sums else {}

    def _means(self, table: th.Tensor) -> dict[str, float]:
        means = {name: float(row[0] / row[1]) for name, row in zip(self.sums, table.cpu().double()) if row[1]}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, th.Tensor]:
        """This rank's sums since the last read: float64 [2], sum and count."""
        return {name: pair.cpu().double().clone() for name, pair in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, th.Tensor], device: th.device | str = "cpu") -> None:
        """Restore what `state_dict` gave; anything else raises ValueError."""
        if any(not isinstance(name, str) or pair.shape != (2,) for name, pair in state.items()):
            raise ValueError("expected a sum and a count for each name")
        if any(not pair.isfinite().all() or pair[1] < 0 for pair in state.values()):
            raise ValueError("a sum or a count is not finite, or a count is negative")
        dtype = distributed.sum_dtype(th.device(device))
        self.sums = {name: pair.to(dtype).to(device) for name, pair in state.items()}


class BadSteps:
    """Counts steps without a finite gradient: how many in a row, and at which step the row began."""

    def __init__(self, device: th.device | str):
        # [length of the present row, its first step, length of the longest row since the last read, its first step]
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
        """(length of the longest row that was going on at any time since the last call, its first step)."""
        _, _, longest, its_first = self.counts.tolist()
        self.counts[2] = 0
        return longest, its_first

    def end(self) -> int:
        """The step after the last one that is counted as skipped."""
        length, first, longest, its_first = self.counts.tolist()
        return max(first + length, its_first + longest)

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint keeps."""
        return {"counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave; anything else raises ValueError."""
        if state["counts"].shape != self.counts.shape or (state["counts"] < 0).any():
            raise ValueError(f"expected {len(self.counts)} counts")
        self.counts.copy_(state["counts"])


class StepClock:
    """Speed of the steps on this rank, by the host's clock.

    :param batch_size: images in a step, over all ranks.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Measure from here on."""
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
    def paused(self) -> Iterator[None]:
        """Around work that is not part of a step, such as previews: its time does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Since the last call: images/s over all ranks and the share of the time spent waiting for data; and the peak
        memory of this rank in GiB, of its accelerator, or without one of the process."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        speed = {
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "peak_gib": (distributed.peak_memory(distributed.dev()) or math.nan) / 2**30,
        }
        self.restart()
        return speed
