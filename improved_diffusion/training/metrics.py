"""Values that the steps report, collected on the device and read when the log is written: no step waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch as th

from .. import distributed


class LossMeter:
    """Means of the values that the steps report; those that are not finite are left out.

    The values of up to AT_ONCE steps wait on the device, and are then added in the order in which they came, so that it
    makes no difference when that is.
    """

    AT_ONCE = 64

    def __init__(self) -> None:
        self._columns: dict[str, int] = {}  # name -> column of the table
        self._table: th.Tensor | None = None  # [2, names]: sums and counts, of the device's sum_dtype
        # (K names, number of timesteps or 0) -> values [K, N] and timesteps [N] of each step
        self._waiting: dict[tuple[tuple[str, ...], int], list[tuple[th.Tensor, th.Tensor | None]]] = {}

    def add(self, name: str, values: th.Tensor) -> None:
        """Add values of any shape."""
        self._wait((name,), 0, values.detach(), None)

    def add_losses(
        self, num_timesteps: int, ts: th.Tensor, losses: Mapping[str, th.Tensor], weights: th.Tensor | None = None
    ) -> None:
        """Add [N] losses, times `weights` [N]: all of them under their name, and each in its quarter of the timesteps
        (name_q0..name_q3)."""
        values = th.stack([value.detach() for value in losses.values()])
        self._wait(tuple(losses), num_timesteps, values if weights is None else values * weights, ts)

    @property
    def sums(self) -> dict[str, th.Tensor]:
        """For each name [2]: sum and count."""
        self._settle()
        return {} if self._table is None else dict(zip(self._columns, self._table.unbind(1)))

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last call, {} where nothing was added. Collective."""
        self._settle()
        return {} if self._table is None else self._means(distributed.sum_over_ranks(self._table))

    def read_own(self) -> dict[str, float]:
        """`read` of this rank's values alone; not collective."""
        self._settle()
        return {} if self._table is None else self._means(self._table)

    def _wait(self, names: tuple[str, ...], num_timesteps: int, values: th.Tensor, ts: th.Tensor | None) -> None:
        steps = self._waiting.setdefault((names, num_timesteps), [])
        steps.append((values, ts))
        if len(steps) >= self.AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        """Add what waits."""
        waiting, self._waiting = self._waiting, {}
        for (names, num_timesteps), steps in waiting.items():
            values = th.cat([value.reshape(len(names), -1) for value, _ in steps], dim=1)
            self._add(self._columns_of(names, values.device)[:, None].expand_as(values), values)
            if num_timesteps:
                quarter = (4 * th.cat([ts for _, ts in steps if ts is not None]) // num_timesteps).long()
                parts = self._columns_of([f"{name}_q{q}" for name in names for q in range(4)], values.device)
                self._add(parts.reshape(-1, 4)[:, quarter], values)

    def _columns_of(self, names: Sequence[str], device: th.device) -> th.Tensor:
        """The columns of names, of which there may be new ones."""
        columns = [self._columns.setdefault(name, len(self._columns)) for name in names]
        had = 0 if self._table is None else self._table.shape[1]
        if had < len(self._columns):
            new = th.zeros(2, len(self._columns) - had, dtype=distributed.sum_dtype(device), device=device)
            self._table = new if self._table is None else th.cat([self._table, new], dim=1)
        return distributed.to_device(th.tensor(columns), device)

    def _add(self, columns: th.Tensor, values: th.Tensor) -> None:
        """Add values to the columns, both [K, N]."""
        assert self._table is not None
        finite = values.isfinite()
        for row, terms in zip(self._table, (th.where(finite, values, 0.0), finite)):
            row.index_add_(0, columns.reshape(-1), terms.to(self._table.dtype).reshape(-1))

    def _means(self, table: th.Tensor) -> dict[str, float]:
        means = {name: total / count for name, total, count in zip(self._columns, *table.cpu().tolist()) if count}
        self._columns, self._table = {}, None
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
        self._columns, self._table, self._waiting = {name: i for i, name in enumerate(state)}, None, {}
        if state:
            dtype = distributed.sum_dtype(th.device(device))
            self._table = th.stack(list(state.values()), dim=1).to(dtype).to(device)


class BadSteps:
    """Counts steps without a finite gradient: how many in a row, and at which step the row began.

    What the steps note goes to the host AT_ONCE steps at a time, and is counted there once it is needed, or the next
    ones follow.
    """

    AT_ONCE = 64

    def __init__(self) -> None:
        self._length = self._first = 0  # of the present row
        self._longest = self._its_first = 0  # of the longest row since the last read
        self._noted: list[tuple[int, th.Tensor]] = []
        self._sent: list[tuple[tuple[int, ...], distributed.HostCopy]] = []

    def note(self, bad: th.Tensor, step: int) -> None:
        """Count a step; `bad` (no dimensions) is 1 where it was skipped, else 0."""
        self._noted.append((step, bad))
        if len(self._noted) >= self.AT_ONCE:
            self._send()
            self._count(keep=1)

    def _send(self) -> None:
        if self._noted:
            steps, flags = zip(*self._noted)
            self._sent.append((steps, distributed.HostCopy(th.stack(flags))))
            self._noted = []

    def _count(self, keep: int) -> None:
        """Count what was sent, except the last `keep` lots."""
        while len(self._sent) > keep:
            steps, flags = self._sent.pop(0)
            for step, bad in zip(steps, flags.get().tolist()):
                self._length = self._length + 1 if bad else 0
                if self._length == 1:
                    self._first = step
                if self._length > self._longest:
                    self._longest, self._its_first = self._length, self._first

    def _counted(self) -> tuple[int, int, int, int]:
        self._send()
        self._count(keep=0)
        return self._length, self._first, self._longest, self._its_first

    def row(self) -> tuple[int, int]:
        """(length of the row that the last step belongs to, its first step). Waits for the device."""
        return self._counted()[:2]

    def read(self) -> tuple[int, int]:
        """(length of the longest row that was going on at any time since the last call, its first step)."""
        _, _, longest, its_first = self._counted()
        self._longest = 0
        return longest, its_first

    def end(self) -> int:
        """The step after the last one that is counted as skipped."""
        length, first, longest, its_first = self._counted()
        return max(first + length, its_first + longest)

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint keeps."""
        return {"counts": th.tensor(self._counted())}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave; anything else raises ValueError."""
        counts = state["counts"]
        if counts.shape != (4,) or (counts < 0).any():
            raise ValueError("expected 4 counts")
        self._length, self._first, self._longest, self._its_first = counts.long().tolist()
        self._noted, self._sent = [], []


class StepClock:
    """Speed of the steps on this rank, by the host's clock.

    Of devices whose peak is known, also the share of it that the network's arithmetic makes use of (`mfu`).

    :param batch_size: images in a step, over all ranks.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.image_per_peak = 0.0  # seconds of this rank's device at its peak for an image of all ranks; 0: not known
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
        if self.image_per_peak:
            speed["mfu"] = speed["images_per_second"] * self.image_per_peak
        self.restart()
        return speed
