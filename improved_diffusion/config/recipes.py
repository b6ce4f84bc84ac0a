"""Recipes for one's own images: a size of image and of network that suits the hardware, and a run that ends.

`--preset NAME` takes one as it is, `--preset auto` chooses it and adapts it to the images. benchmarks/recipes.py
measures them, and docs/training.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import AUTO_PRECISION

AUTO = "auto"
SMALL_SET = 5000  # images; with fewer, `auto` mirrors them and adds dropout
MAX_EPOCHS = 500  # of an `auto` run, unless that is fewer than FEWEST_STEPS
FEWEST_STEPS = 2000


@dataclass(frozen=True)
class Recipe:
    """The options of a run on one's own images. Batch sizes are totals over all ranks.

    :param side: the least median side of images, in pixels, that `auto` chooses it for.
    :param cores: of a CPU without an accelerator that `auto` chooses it for; 0: none.
    :param gib: of an accelerator's memory that `auto` chooses it for.
    """

    options: dict[str, Any]
    side: int
    cores: int
    gib: float

    @property
    def hardware(self) -> str:
        """What `auto` chooses it for, in words."""
        parts = [f"a CPU with {self.cores} cores"] if self.cores > 1 else ["any CPU"] if self.cores else []
        return " or ".join([*parts, f"a GPU with {self.gib:g} GiB" if self.gib else "any GPU"])


# The cosine schedule and learned variances of the paper, and what short runs need: an average that forgets the initial
# weights at once, gradients clipped, checkpoints and previews often.
_COMMON = dict(
    learn_sigma=True, diffusion_steps=1000, noise_schedule="cosine", lr_warmup_steps=100, grad_clip=1.0,
    ema_warmup=True, keep_last=3, precision=AUTO_PRECISION,
)  # fmt: skip
_CPU = dict(
    _COMMON, num_channels=32, num_res_blocks=1, lr=5e-4, ema_rate="0.999",
    max_steps=20_000, log_interval=50, save_interval=1000,
)  # fmt: skip
_GPU = dict(
    _COMMON, num_res_blocks=2, lr=1e-4, ema_rate="0.9999",
    log_interval=100, save_interval=5000, sample_interval=2500,
)  # fmt: skip

RECIPES = {
    "small-32": Recipe(
        dict(_CPU, image_size=32, channel_mult="1,2,4", attention_resolutions="8", total_batch_size=16,
             sample_interval=250),
        side=0, cores=1, gib=0,
    ),
    "small-64": Recipe(
        dict(_CPU, image_size=64, channel_mult="1,2,3,4", attention_resolutions="8", total_batch_size=16,
             sample_interval=500),
        side=48, cores=8, gib=0,
    ),
    "medium-64": Recipe(
        dict(_GPU, image_size=64, num_channels=96, channel_mult="1,2,3,4", attention_resolutions="16,8",
             total_batch_size=64, max_steps=100_000),
        side=48, cores=0, gib=10,
    ),
    "medium-128": Recipe(
        dict(_GPU, image_size=128, num_channels=96, channel_mult="1,1,2,3,4", attention_resolutions="16,8",
             schedule_shift=2.0, total_batch_size=32, max_steps=200_000),
        side=96, cores=0, gib=20,
    ),
    "large-256": Recipe(
        dict(_GPU, image_size=256, num_channels=128, channel_mult="1,1,2,2,4,4", attention_resolutions="16,8",
             schedule_shift=4.0, total_batch_size=16, max_steps=400_000),
        side=192, cores=0, gib=40,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What `auto` knows of the images: how many, the median of their shorter sides, whether all seen are grey."""

    count: int
    side: int
    grey: bool


@dataclass(frozen=True)
class Hardware:
    """What `auto` knows of a rank's hardware: CPU cores, and the memory of its accelerator in GiB, 0 where none."""

    cores: int
    gib: float

    def __str__(self) -> str:
        return f"a GPU with {self.gib:.0f} GiB" if self.gib else f"{self.cores} CPU cores, no GPU"


def choose(survey: Survey, hardware: Hardware, size: int = 0) -> str:
    """The name of the largest recipe for the images and the hardware.

    :param size: of the images to train on, in pixels, where the user gave one; it takes the place of their own side.
    """
    side = size or survey.side

    def suits(recipe: Recipe) -> bool:
        enough = hardware.gib >= recipe.gib if hardware.gib else 0 < recipe.cores <= hardware.cores
        return enough and side >= recipe.side

    return [name for name, recipe in RECIPES.items() if suits(recipe)][-1]


def adapt(options: Mapping[str, Any], survey: Survey, ranks: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options for these images, without those that the user gave.

    Fewer images than a batch make a smaller batch; few images make a shorter run, mirrored, with dropout.
    """
    adapted = dict(options)
    batch = min(options["total_batch_size"] // ranks, survey.count // ranks) or 1
    adapted["total_batch_size"] = batch * ranks
    total = given.get("total_batch_size") or given.get("batch_size", batch) * ranks
    steps = max(FEWEST_STEPS, MAX_EPOCHS * survey.count // total)
    adapted["max_steps"] = min(options["max_steps"], steps)
    if survey.count < SMALL_SET:
        adapted |= {"random_flip": True, "dropout": 0.1}
    if survey.grey:
        adapted["channels"] = 1
    last = given.get("max_steps") or adapted["max_steps"]
    for name in ("sample_interval", "save_interval"):
        adapted[name] = min(adapted[name], last)
    if {"batch_size", "total_batch_size"} & given.keys():
        del adapted["total_batch_size"]
    if given.get("image_size", options["image_size"]) != options["image_size"]:
        adapted |= {"channel_mult": "", "attention_resolutions": "16,8"}  # the defaults follow the size
        adapted.pop("schedule_shift", None)
    return {name: value for name, value in adapted.items() if name not in given}
