"""The options of judging samples."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .base import Config, UserError, extra, height_width


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Config):
    """What images are judged by."""

    features: str = extra(
        "", "exported program (.pt2) or TorchScript (.pt), a file or URL, uint8 [N, 3, H, W] -> [N, D]; or inception"
    )
    logits: str = extra(
        "",
        "a program like --features, to logits of classes [N, C]: for the inception score, where --features has none",
    )
    feature_size: str = extra(
        "auto",
        "side to which images are resized for the features, antialiased; native: as they are, so that a program that "
        "resizes does; auto: what the program needs, 299 for inception",
    )
    feature_batch: int = extra(100, "images at once through the features on each rank")
    resize: str = extra(
        "", "resize and centre-crop all images to this size as training does; empty: all must be of one size"
    )
    colour: bool = extra(False, "take grey images for coloured ones, with three equal channels")

    def validate(self) -> None:
        self.require(self.feature_batch >= 1, "feature_batch", "must be at least 1")
        self.require(
            self.feature_size in ("auto", "native") or re.fullmatch(r"[1-9][0-9]{0,3}", self.feature_size) is not None,
            "feature_size", "must be auto, native, or a number of pixels such as 299, at most 9999",
        )  # fmt: skip
        if self.resize:
            try:
                size = height_width(self.resize)
            except ValueError:
                raise UserError(
                    f"--resize {self.resize!r}: expected a size such as 64, or 48x64 for height x width"
                ) from None
            self.require(max(size) <= 9999, "resize", "must be at most 9999 pixels a side")


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(Config):
    """What is judged, against what."""

    samples: str = extra("", "samples to judge: an npz, a folder or a zip; or give --model_path to draw them first")
    reference: str = extra("", "real images (a folder, a zip or an npz), or an npz of their statistics (mu and sigma)")
    train_dir: str = extra("", "training images, to look for copies of them; empty: the images of --reference")
    held_out: str = extra(
        "",
        "real images that were not trained on: their scores, and distances to the training images, are what is normal",
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Config):
    """What to describe once."""

    images: str = extra("", "real images: a folder, a zip or an npz")
    name: str = extra("", "what to call them; empty: the name of the folder or file")
    out: str = extra("", "npz to write")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """What to vary."""

    ema: str = extra(
        "", "averages to sample from, beside --model_path and of its step, such as 0.999,0.9999; none: --model_path"
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """What to compare."""

    reports: str = extra("", "report.json files, or the folders that hold them, separated by commas or blanks")
    out_dir: str = extra("", "folder for compare.md and compare.png; empty: print only")
