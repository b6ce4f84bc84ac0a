"""The options of sampling and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra, option


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """What to draw, and how."""

    model_path: str = option("", "checkpoint to sample from, preferably an ema_*.pt")
    num_samples: int = option(10000, "images to make; super-resolution makes one of each base image unless told")
    batch_size: int = option(16, "images at once on each rank")
    use_ddim: bool = option(False, "deterministic DDIM steps rather than ancestral sampling")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1] at every step")
    ddim_eta: float = extra(0.0, "DDIM's eta: 0 deterministic, 1 as noisy as ancestral sampling")
    classes: str = extra("", "classes to draw, by name or index, comma-separated, in turn; empty: random ones")

    def validate(self) -> None:
        self.require(self.num_samples >= 1, "num_samples", "must be at least 1")
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")
        self.require(self.ddim_eta >= 0, "ddim_eta", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class BaseSamplesConfig(Config):
    """The images that super-resolution starts from."""

    base_samples: str = option(
        "", "low-resolution images: an npz (arr_0, optional arr_1), a folder, a zip or one image"
    )


@dataclass(frozen=True, kw_only=True)
class NLLConfig(Config):
    """Evaluating the variational bound."""

    model_path: str = option("", "checkpoint to evaluate, preferably an ema_*.pt")
    num_samples: int = option(1000, "images to evaluate; at most all there are")
    batch_size: int = option(1, "images at once on each rank")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")

    def validate(self) -> None:
        self.require(self.num_samples >= 1, "num_samples", "must be at least 1")
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")
