"""The options of editing images with a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, UserError, comma_list, extra


@dataclass(frozen=True, kw_only=True)
class EditConfig(Config):
    """What to edit with."""

    model_path: str = extra("", "checkpoint of an image model, preferably an ema_*.pt")
    batch_size: int = extra(16, "images at once on each rank")
    classes: str = extra(
        "", "classes of the images, by name or index, comma-separated, in turn; empty: those that come with the images"
    )

    def validate(self) -> None:
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Config):
    """What to edit."""

    images: str = extra(
        "", "a folder, a zip, an npz (arr_0, optional arr_1), or one image or several, separated by commas"
    )


@dataclass(frozen=True, kw_only=True)
class CopiesConfig(Config):
    """How many to make."""

    num_samples: int = extra(0, "images to make, each from the next of those given, in turn; 0: one from each")

    def validate(self) -> None:
        self.require(self.num_samples >= 0, "num_samples", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LatentsConfig(Config):
    """What to decode."""

    latents: str = extra("", "the latents.npz that encode wrote")


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(Config):
    """What to go between."""

    seeds: str = extra(
        "", "two seeds, such as 3,7: between the images that image_sample.py starts with --seed 3 and --seed 7"
    )
    frames: int = extra(9, "images on the way, with both ends")

    def validate(self) -> None:
        self.require(self.frames >= 2, "frames", "must be at least 2, the two ends")
        try:
            seeds = comma_list(self.seeds, int)
        except ValueError:
            raise UserError(f"--seeds {self.seeds!r}: expected two seeds such as 3,7") from None
        self.require(not seeds or (len(seeds) == 2 and min(seeds) >= 0), "seeds", "must be two seeds such as 3,7")


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(Config):
    """What to paint, and how often to come back to it."""

    mask: str = extra(
        "",
        "an image, white where there is to be painted and black where the image is known; or a folder, a zip or an npz "
        "with one for each image, by name or in order",
    )
    jump_length: int = extra(10, "steps that RePaint goes back at a time")
    resamplings: int = extra(10, "how often RePaint takes each step; 1: once, the fastest")

    def validate(self) -> None:
        self.require(self.jump_length >= 1, "jump_length", "must be at least 1")
        self.require(self.resamplings >= 1, "resamplings", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class VariationsConfig(Config):
    """How far to vary."""

    strength: float = extra(
        0.6, "share of the noise levels to go back to before denoising: near 0 the same image, 1 another one"
    )

    def validate(self) -> None:
        self.require(0 < self.strength <= 1, "strength", "must be more than 0 and at most 1")
