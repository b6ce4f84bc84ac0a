"""Networks whose output for an image is the same, bit for bit, whatever else is in the batch: on CPUs.

torch chooses a kernel by the size of the batch and the number of threads, and kernels add in different orders. So the
same image would differ in its last bits, and now and then in a pixel, when more images are drawn beside it.
"""

from __future__ import annotations

from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

ROWS = 16  # that a matrix product takes at a time
_DTYPES = (th.float32, th.bfloat16)


class Steady(nn.Module):
    """A network that computes each layer with one kernel. It changes nothing elsewhere than on a CPU with oneDNN.

    For one image of a small network this takes up to twice the time, for sixteen or more none: see `_OneKernel`.

    A single image in channels-last layout may still differ: torch cannot tell its layout from the other one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        """What the network has: code that extends the published classes asks it for its own attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        if th.is_grad_enabled():
            return self._run(x, *args, **kwargs)
        with th.inference_mode():  # a few percent of a small network's time
            out = self._run(x, *args, **kwargs)
        return out.clone()  # which may be changed in place, and used where there are gradients

    def _run(self, x: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        if x.device.type != "cpu" or not th.backends.mkldnn.is_available():
            return self.model(x, *args, **kwargs)
        with _OneKernel():
            return self.model(x, *args, **kwargs)


class _OneKernel(TorchFunctionMode):
    """Replaces what torch would choose a kernel for: convolutions are oneDNN's, products are of ROWS rows.

    What that costs a single image is that oneDNN orders a layer's weights anew at each call, and that every function of
    torch is looked up here. Weights that are kept in oneDNN's order would be faster, but round in another way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        steady = _STEADY.get(func)
        if steady is not None and args and args[0].dtype in _DTYPES:
            return steady(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    if x.ndim != 2:
        return F.linear(x, weight, bias)
    count, missing = len(x), -len(x) % ROWS
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    parts = [F.linear(part, weight, bias) for part in padded.split(ROWS)]
    return (parts[0] if len(parts) == 1 else th.cat(parts))[:count]


def _conv1d(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> th.Tensor:  # fmt: skip
    if x.ndim != 3 or isinstance(padding, str):
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    two = (_pair(1, stride), _pair(0, padding), _pair(1, dilation))
    return _conv2d(x.contiguous().unsqueeze(2), weight.unsqueeze(2), bias, *two, groups).squeeze(2)


def _conv2d(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> th.Tensor:  # fmt: skip
    if x.ndim != 4 or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if not x.is_contiguous():
        first = x[:1]  # of one image, the strides between images say nothing, and torch may take another layout
        is_last = first.is_contiguous(memory_format=th.channels_last) and not first.is_contiguous()
        x = x.contiguous(memory_format=th.channels_last if is_last else th.contiguous_format)
    sizes = [[n, n] if isinstance(n, int) else list(n) for n in (padding, stride, dilation)]
    return th.ops.aten.mkldnn_convolution(x, weight, bias, *sizes, groups)


def _pair(first: int, given: Any) -> list[int]:
    return [first, *([given] if isinstance(given, int) else given)]


_STEADY = {F.linear: _linear, F.conv1d: _conv1d, F.conv2d: _conv2d}
