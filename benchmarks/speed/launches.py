"""The operations that a training step starts, without views and allocations: on a GPU each is a kernel or a few.

They are counted on the CPU, on two images. In the way of a GPU the norms, attention and dropout are stand-ins: one
operation forward and one backward each, whose numbers mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch as th
from torch import nn

from benchmarks import published
from improved_diffusion import distributed, embeddings, fused_norm, unet
from improved_diffusion import nn as layers
from improved_diffusion.training.precision import clear_gradients

from .context import Context
from .kernels import Operations
from .training import our_loop
from .workloads import CIFAR10, QUICK, Workload

WITHOUT_KERNEL = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "resize_", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_local_scalar_dense",
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
AS_ON_A_GPU = "bf16 channels_last, as on a GPU"


def run(context: Context) -> None:
    """Report the published way and ours: on a CPU, and in the way of a GPU, whose network CUDA graphs can record."""
    context.report.begin("launches", "operations of a training step, without views and allocations")
    workload = QUICK[0] if context.quick else Workload("cifar10-2", CIFAR10, 2)
    whole, network = as_on_a_gpu(workload)
    counts = {
        "published fp32": published_way(workload), "fp32": on_a_cpu(workload), AS_ON_A_GPU: whole,
        f"{AS_ON_A_GPU}, the network": network, f"{AS_ON_A_GPU}, beside it": whole - network,
    }  # fmt: skip
    context.report.add(*({"workload": workload.name, "way": way, "operations": n} for way, n in counts.items()))


def count(call: Callable[[], Any]) -> int:
    """The operations of the third call: the first ones also make what is kept."""
    for _ in range(2):
        call()
    with Operations(WITHOUT_KERNEL) as operations:
        call()
    return operations.count


def published_way(workload: Workload) -> int:
    """Of the published step."""
    with _cpu():
        training = published.Training(workload.published(), workload.published_loss())
        images, kwargs = workload.images()
        return count(lambda: training.step(images, kwargs))


def on_a_cpu(workload: Workload) -> int:
    """Of ours, as it runs on CPUs."""
    with _cpu():
        return count(_step(our_loop(workload, {})))


def as_on_a_gpu(workload: Workload, **options: Any) -> tuple[int, int]:
    """Of ours in 16 bits, as it runs on NVIDIA GPUs: (all, those of the network, forward and backward)."""
    with _cpu(), kernels_of_a_gpu():
        loop = our_loop(workload, dict(precision="bf16", memory_format="channels_last", **options))
        return count(_step(loop)), count(_network(loop))


def _step(loop: Any) -> Callable[[], None]:
    def step() -> None:
        loop.run_step(*next(loop.data))
        loop.step += 1

    return step


def _network(loop: Any) -> Callable[[], None]:
    images, kwargs = next(loop.data)
    x, timesteps = th.zeros(images.shape), th.zeros(len(images))
    grad = th.zeros_like(loop.ddp_model(x, timesteps, **kwargs))

    def call() -> None:
        clear_gradients(loop.model_params)
        loop.ddp_model(x, timesteps, **kwargs).backward(grad)

    return call


def _cpu() -> Any:
    """In the with statement everything is on the CPU."""
    return mock.patch.object(distributed, "dev", lambda: th.device("cpu"))


# Stand-ins


def _stand_in(forward: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """An operation, and one for its gradients, which are zeros."""

    class StandIn(th.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: th.Tensor | None) -> th.Tensor:
            ctx.save_for_backward(*given)
            return forward(*given)

        @staticmethod
        def backward(ctx: Any, grad: th.Tensor) -> Any:  # type: ignore[override]
            gradients = [None if t is None else th.empty_like(t) for t in ctx.saved_tensors]
            th._foreach_zero_([each for each in gradients if each is not None])
            return tuple(gradients)

    return StandIn.apply


_norm = _stand_in(lambda x, *others: x.clone())
_dropout = _stand_in(lambda x: x.clone())
_attention = _stand_in(lambda q, k, v: v.transpose(1, 2).clone(memory_format=th.contiguous_format).transpose(1, 2))


class _GPUDropout(nn.Dropout):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return _dropout(x) if self.p and self.training else x


def _fused_norm(x: th.Tensor, norm: Any, silu: bool = False, modulation: th.Tensor | None = None) -> th.Tensor:
    return _norm(x, norm.weight, norm.bias, modulation)


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """In the with statement networks on the CPU take the paths of NVIDIA GPUs."""
    with contextlib.ExitStack() as replaced:
        for module, name, value in (
            (fused_norm, "obstacle", lambda device: ""), (embeddings, "pays", lambda device: True),
            (layers, "fused_norm", _fused_norm), (unet, "fused_norm", _fused_norm), (unet, "attend", _attention),
            (nn.Dropout, "forward", _GPUDropout.forward),
        ):  # fmt: skip
            replaced.enter_context(mock.patch.object(module, name, value))
        yield
