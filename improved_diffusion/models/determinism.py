"""The same bits in every run on a GPU, at the cost of slower kernels."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch as th

from ..config import UserError

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"  # read by torch and cuBLAS at the first matrix product of a process
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS adds in one order, by NVIDIA's documentation; the first is faster


def be_deterministic(device: th.device) -> None:
    """Make torch choose kernels that add in one order, and refuse operations that have none.

    Of the attention kernels, the flash and the memory-efficient one then have deterministic backward passes, and
    cuDNN's is not taken; where neither of the two fits, the plain one is left. Raises UserError where the environment
    contradicts.
    """
    if device.type == "cuda":
        given = os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])
        if given not in WORKSPACES:
            raise UserError(
                f"--deterministic needs {WORKSPACE_VARIABLE}={' or '.join(WORKSPACES)}, but the environment has "
                f"{given!r}: unset it"
            )
    th.use_deterministic_algorithms(True)
    th.backends.cudnn.deterministic = True
    th.backends.cudnn.benchmark = False


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """In the with statement, an operation that torch refuses under --deterministic raises UserError."""
    try:
        yield
    except RuntimeError as error:
        problem = _refusal(str(error))
        if not problem:
            raise
        raise UserError(f"--deterministic: {problem}") from error


def _refusal(message: str) -> str:
    """What an error of torch's says of an operation that is not deterministic, and the remedy; "" for other errors."""
    found = re.search(r"(.+) does not have a deterministic implementation", message)
    if found:
        return f"torch has no deterministic form of {found[1]}: leave out --deterministic"
    if "not deterministic because it uses CuBLAS" in message:
        return (
            "this process has multiplied matrices on the GPU before, without it: set "
            f"{WORKSPACE_VARIABLE}={WORKSPACES[0]} before Python starts"
        )
    return ""
