"""The options of editing images with a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from .base import MOST_SAMPLES, Config, extra
from .messages import UserError
from .values import comma_list, number_list, path_of, paths_of


@dataclass(frozen=True, kw_only=True)
class EditConfig(Config):
    """Editing options."""

    model_path: str = extra("", "checkpoint of an image model, preferably an ema_*.pt", parse=path_of)
    batch_size: int = extra(16, "images per batch on each rank", low=1)
    classes: str = extra(
        "", "classes of the images, by name or index, comma-separated, repeated in turn; empty: the images' own"
    )

    def validate(self) -> None:
        self.require(not self.classes or bool(comma_list(self.classes, str)), "classes", "names no class")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Config):
    """Input images."""

    images: str = extra(
        "",
        "a folder, a zip, an npz (arr_0, optional arr_1), or one or more images, separated by commas",
        parse=paths_of,
    )


@dataclass(frozen=True, kw_only=True)
class CopiesConfig(Config):
    """Number of images."""

    num_samples: int = extra(
        0, "images to make, from the given ones in turn; 0: one from each", low=0, high=MOST_SAMPLES
    )


@dataclass(frozen=True, kw_only=True)
class LatentsConfig(Config):
    """Input latents."""

    latents: str = extra("", "the latents.npz that encode wrote", parse=path_of)


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(Config):
    """Interpolation options."""

    seeds: str = extra(
        "",
        "numbers of two samples, such as 3,7: interpolate between samples 3 and 7 of --seed, as the sample command "
        "numbers them",
    )
    frames: int = extra(9, "images to make, both ends included", low=2, high=10_000)

    def validate(self) -> None:
        try:
            numbers = number_list(self.seeds)
        except ValueError:
            raise UserError(f"--seeds {self.seeds!r}: expected the numbers of two samples, such as 3,7") from None
        self.require(len(numbers) in (0, 2), "seeds", "must be the numbers of two samples, such as 3,7")


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(Config):
    """Inpainting options."""

    mask: str = extra(
        "",
        "an image, white where to paint and black where to keep the image, or on a transparent layer any paint where "
        "there is no white; or a folder, a zip or an npz with one for each image, by name or in order",
        parse=path_of,
    )
    jump_length: int = extra(10, "steps that RePaint goes back at a time", low=1)
    resamplings: int = extra(10, "how often RePaint takes each step; 1 is the fastest", low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class VariationsConfig(Config):
    """Variation options."""

    strength: float = extra(
        0.6, "share of the noise levels to go back before denoising: near 0 the same image, 1 a new one"
    )

    def validate(self) -> None:
        self.require(0 < self.strength <= 1, "strength", "must be more than 0 and at most 1")
