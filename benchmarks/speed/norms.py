"""Group norms, with what surrounds them in a residual block: scale and shift of each image, and SiLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from improved_diffusion import distributed
from improved_diffusion.fused_norm import fused_norm
from improved_diffusion.nn import normalization

from .context import Context
from .ways import Way

# (images, channels, side): levels of the CIFAR-10 and the ImageNet-64 network, and one large image.
ON_GPU = [(128, 128, 32), (128, 256, 16), (64, 128, 64), (64, 384, 16), (1, 256, 256)]
ON_CPU = [(8, 128, 32)]
QUICK = [(2, 32, 8)]
LAYOUTS = {"contiguous": th.contiguous_format, "channels last": th.channels_last}


def run(context: Context) -> None:
    """Report torch's ways, and on a GPU our kernel."""
    context.report.begin("norms", "group norm, scale and shift, SiLU: forward and backward")
    shapes = QUICK if context.quick else ON_GPU if context.on_gpu else ON_CPU
    for number, (n, channels, side) in enumerate(shapes):
        x = th.randn(n, channels, side, side, device=distributed.dev()).to(th.bfloat16)
        ways = [Way(f"torch bf16 {name}", _way(_by_torch, x, layout)) for name, layout in LAYOUTS.items()]
        if context.on_gpu:
            ways.append(Way("ours bf16 channels last", _way(_ours, x, th.channels_last)))
        clock = context.clock.part(1 / (len(shapes) - number))
        context.compare(context.ways(ways), clock, workload="x".join(map(str, x.shape)))


def _way(
    function: Callable[..., th.Tensor], x: th.Tensor, layout: th.memory_format
) -> Callable[[], Callable[[], Any]]:  # fmt: skip
    def make() -> Callable[[], Any]:
        norm = normalization(x.shape[1]).to(x.device)
        images = x.to(memory_format=layout).requires_grad_()
        modulation = th.randn(len(x), 2 * x.shape[1], device=x.device, requires_grad=True)
        grad = th.randn_like(images)

        def call() -> Any:
            out = function(images, norm, modulation)
            return th.autograd.grad(out, [images, modulation, *norm.parameters()], grad)

        return call

    return make


def _ours(x: th.Tensor, norm: nn.Module, modulation: th.Tensor) -> th.Tensor:
    return fused_norm(x, norm, silu=True, modulation=modulation)


def _by_torch(x: th.Tensor, norm: Any, modulation: th.Tensor) -> th.Tensor:
    """In float32, as the published networks compute it."""
    h = F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).type(x.dtype)
    scale, shift = modulation.type(x.dtype)[:, :, None, None].chunk(2, dim=1)
    return F.silu(th.addcmul(shift, h, 1 + scale))
