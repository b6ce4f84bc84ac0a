"""Networks without numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode


@contextmanager
def outline() -> Iterator[None]:
    """A network built within has shapes and no numbers: its tensors are on the device "meta" and take no memory."""
    with th.device("meta"), _NoInit():
        yield


class _NoInit(TorchFunctionMode):
    """torch.nn.init leaves tensors as they are: on "meta" it would import torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
