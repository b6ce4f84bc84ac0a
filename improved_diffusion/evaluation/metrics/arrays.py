"""Arrays on the device that computes with them, in float64: a CPU, or an accelerator that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th

Device = th.device | str


def on_device(array: np.ndarray, device: Device) -> th.Tensor:
    """A copy of the array, of its own type, as a tensor on the device."""
    return th.from_numpy(np.array(array, order="C")).to(device)


def is_cpu(device: Device) -> bool:
    """Whether the device is the CPU."""
    return th.device(device).type == "cpu"


def sum_of_rows(x: th.Tensor) -> th.Tensor:
    """The sum of each row of x [N, D]: [N]. Overwrites x.

    Halves are added to halves, so that a row's sum has the same bits on every device and whatever the other rows.
    """
    width = x.shape[1]
    while width > 1:
        kept = (width + 1) // 2
        x[:, : width - kept] += x[:, kept:width]
        width = kept
    return x[:, 0].clone()


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in the with statement keep all 24 bits of float32, whatever the process has allowed."""
    allowed = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        th.set_float32_matmul_precision(allowed)
