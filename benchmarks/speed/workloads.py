"""The networks and batches that are measured, in our code, the published way and diffusers'."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import published
from improved_diffusion import distributed
from improved_diffusion.checkpoints import diffusers_network
from improved_diffusion.config import height_width
from improved_diffusion.config.presets import preset_options
from improved_diffusion.config.settings import ImageTraining
from improved_diffusion.models.build import build_model, build_model_and_diffusion
from improved_diffusion.models.factories import attention_factors, resolve_channel_mult
from improved_diffusion.unet import AttentionBlock

DEMO = Path(__file__).resolve().parents[2] / "datasets" / "digits.json"
TINY = dict(
    image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="8", learn_sigma=True,
    noise_schedule="cosine", diffusion_steps=100,
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A network of a published run, or the demo's, and a batch of it."""

    name: str
    source: str  # a preset, "demo" or "tiny"
    batch_size: int
    together: int = 8  # ways that the device's memory holds at once

    def settings(self, **options: Any) -> ImageTraining:
        """The settings of its training, with other values of the given options."""
        if self.source == "demo":
            found = {**json.loads(DEMO.read_text()), "num_classes": 10, "max_steps": 1500}
        else:
            found = dict(TINY) if self.source == "tiny" else preset_options(self.source)
        own = {"batch_size": self.batch_size, "total_batch_size": 0, "precision": "fp32"}
        return ImageTraining.of({**found, **own, **options})

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        model = self.settings().model
        return (model.channels, *height_width(model.size))

    @property
    def classes(self) -> int:
        """How many classes the network takes; 0: none."""
        model = self.settings().model
        return model.num_classes if model.class_cond else 0

    def model(self) -> th.nn.Module:
        """Our network on the CPU, with random weights, the same ones each time and none of them zero."""
        settings = self.settings()
        th.manual_seed(0)
        return filled(build_model_and_diffusion(settings.model, settings.diffusion)[0])

    def published(self) -> published.UNet:
        """The published network with the weights of `model()`."""
        network = published_network(self.settings())
        network.load_state_dict(self.model().state_dict())
        return network

    def published_loss(self) -> published.HybridLoss:
        """Its loss in the published way."""
        return published.HybridLoss(self.settings().diffusion.diffusion_steps)

    def diffusers(self) -> Any:
        """diffusers' network of the same configuration, which predicts the noise alone. All its attentions have heads
        of one size, that of ours at the widest level or the largest that divides every width.

        Raises ImportError without that package.
        """
        import diffusers

        settings = self.settings(learn_sigma=False)
        widths = [block.channels for block in self.model().modules() if isinstance(block, AttentionBlock)]
        heads = min(math.gcd(*widths), max(widths) // settings.model.num_heads)
        settings = settings.replace(num_head_channels=heads)
        network = build_model(settings.model, False)
        return diffusers.UNet2DModel(**diffusers_network.config_of(settings.model, settings.diffusion, network))

    def pixels(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """(a batch [N, C, H, W] uint8, its classes): in the host's memory, pinned for a GPU, as a run reads them."""
        generator = th.Generator().manual_seed(0)
        pixels = th.randint(256, (self.batch_size, *self.shape), generator=generator, dtype=th.uint8)
        kwargs = {"y": th.randint(self.classes, (self.batch_size,), generator=generator)} if self.classes else {}
        if distributed.pins_memory(distributed.dev()):
            return pixels.pin_memory(), {name: value.pin_memory() for name, value in kwargs.items()}
        return pixels, kwargs

    def images(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """The same batch as float32 in [-1, 1], not pinned."""
        pixels, kwargs = self.pixels()
        return pixels / 127.5 - 1, kwargs

    def evaluation(self, batch_size: int) -> tuple[tuple[th.Tensor, th.Tensor], dict[str, th.Tensor]]:
        """Arguments of the network on the device: ((x, timesteps), classes)."""
        device = distributed.dev()
        kwargs = {"y": th.zeros(batch_size, dtype=th.long, device=device)} if self.classes else {}
        return (th.randn(batch_size, *self.shape, device=device), th.full((batch_size,), 500.0, device=device)), kwargs

    @functools.cached_property
    def forward_flops(self) -> int:
        """Multiplications and additions of our network's evaluation of one image."""
        return self._flops(backward=False)

    @functools.cached_property
    def training_flops(self) -> int:
        """Those of a forward and a backward pass of one image."""
        return self._flops(backward=True)

    def _flops(self, backward: bool) -> int:
        settings = self.settings()
        with th.device("meta"):
            network = build_model_and_diffusion(settings.model, settings.diffusion)[0]
            x, t = th.empty(1, *self.shape), th.zeros(1)
            kwargs = {"y": th.zeros(1, dtype=th.long)} if self.classes else {}
            with FlopCounterMode(display=False) as counter:
                output = network(x, t, **kwargs)
                if backward:
                    output.sum().backward()
        return counter.get_total_flops()


def published_network(settings: ImageTraining) -> published.UNet:
    """The published network of the same shape as ours, which it must have: scale-shift norms, convolutions that
    resample."""
    model = settings.model
    assert model.use_scale_shift_norm and not model.resblock_updown
    mult = resolve_channel_mult(model.size, model.channel_mult)
    factors = attention_factors(model.size, model.attention_resolutions)
    return published.UNet(
        model.channels, (2 if settings.diffusion.learn_sigma else 1) * model.channels,
        [int(each * model.num_channels) for each in mult], model.num_res_blocks,
        [2**level in factors for level in range(len(mult))], model.num_heads, model.dropout,
        model.num_classes if model.class_cond else 0,
    )  # fmt: skip


def filled(network: th.nn.Module) -> th.nn.Module:
    """The network; parameters that begin as zeros are small random numbers."""
    for p in network.parameters():
        if not p.detach().any():
            th.nn.init.normal_(p, std=0.02)
    return network


def parameters(network: th.nn.Module) -> int:
    """How many parameters it has."""
    return sum(p.numel() for p in network.parameters())


CIFAR10, IMAGENET64 = "cifar10-hybrid", "imagenet64-hybrid"
ON_GPU = (Workload("cifar10-128", CIFAR10, 128), Workload("imagenet64-128", IMAGENET64, 128, together=4),
          Workload("cifar10-16", CIFAR10, 16))  # fmt: skip
ON_CPU = (Workload("cifar10-8", CIFAR10, 8), Workload("demo-32", "demo", 32))
QUICK = (Workload("tiny-4", "tiny", 4),)


def workload_named(name: str) -> Workload:
    """One of them."""
    return next(each for each in (*ON_GPU, *ON_CPU, *QUICK) if each.name == name)


def workloads(quick: bool) -> Iterator[Workload]:
    """Those for the device at hand."""
    yield from QUICK if quick else ON_GPU if distributed.dev().type == "cuda" else ON_CPU
