"""Evaluation options."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .base import Config, extra
from .messages import UserError
from .values import height_width, path_of, paths_of

# The options of a sweep that may have several values.
SWEEP_OPTIONS = (
    "ema", "sampler", "steps", "guidance_scale", "classifier_scale", "ddim_eta", "churn", "dynamic_threshold", "seed",
)  # fmt: skip


MOST_DRAWS = 10**7  # for the floor of the loss


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Config):
    """Feature network."""

    features: str = extra(
        "",
        "network that maps uint8 [N, 3, H, W] to features [N, D]: an exported program (.pt2) or TorchScript (.pt), a "
        "file or a URL; or inception",
        parse=path_of,
    )
    logits: str = extra(
        "",
        "a second program, to class logits [N, C], for the inception score; needed where --features gives no logits",
        parse=path_of,
    )
    trust_features: bool = extra(
        False,
        "allow the programs of --features and --logits, which can run any code on this machine; their checksums are "
        "remembered, so that the same files need the flag once",
    )
    feature_size: str = extra(
        "auto",
        "side in pixels to resize images to for the network (antialiased); native: no resizing; auto: what the network "
        "needs, 299 for inception",
    )
    feature_batch: int = extra(100, "images per forward pass of the network on each rank", low=1)
    resize: str = extra(
        "", "resize and centre-crop all images to this size, as training does; empty: all must have one size"
    )
    colour: bool = extra(False, "treat grey images as RGB with three equal channels")

    def validate(self) -> None:
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
class EvaluationConfig(Config):
    """Evaluation inputs."""

    samples: str = extra(
        "", "samples to evaluate: an npz, a folder or a zip; or give --model_path to draw them first", parse=path_of
    )
    reference: str = extra(
        "", "real images (a folder, a zip or an npz), or an npz of their statistics (mu and sigma)", parse=path_of
    )
    train_dir: str = extra(
        "", "training images, to find copies of them; empty: the images of --reference", parse=path_of
    )
    held_out: str = extra(
        "",
        "real images that the model was not trained on, whose scores show what to expect of real images",
        parse=path_of,
    )
    loss_floor: bool = extra(
        False,
        "also report the loss of --model_path on the images of --train_dir by noise level, beside its floor",
    )


@dataclass(frozen=True, kw_only=True)
class LossFloorConfig(Config):
    """Floor of the loss."""

    model_path: str = extra(
        "",
        "checkpoint whose loss on the images is measured too; it says size, channels, classes and schedule, which "
        "otherwise are flags",
        parse=path_of,
    )
    random_flip: bool = extra(False, "the mirror images belong to the set; as in training where --model_path says so")
    floor_draws: int = extra(2048, "noisy images to measure on: more make the error smaller", low=100, high=MOST_DRAWS)
    floor_images: int = extra(
        0,
        "images of the set to use, a random selection: the floor of fewer is a lower bound; 0: all, as far as they fit "
        "into 1 GiB as bytes",
        low=0,
    )
    floor_levels: int = extra(20, "ranges of timesteps to show", low=1, high=200)
    batch_size: int = extra(16, "noisy images in one forward pass of the model on each rank", low=1)

    def validate(self) -> None:
        fewest = 5 * self.floor_levels
        self.require(self.floor_draws >= fewest, "floor_draws", f"must be at least 5 x --floor_levels, {fewest}")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Config):
    """Reference statistics."""

    images: str = extra("", "real images: a folder, a zip or an npz", parse=path_of)
    name: str = extra("", "name of the data set, for reports; empty: the name of the folder or file")
    out: str = extra("", "npz to write", parse=path_of)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Sweep."""

    ema: str = extra(
        "",
        "EMA rates whose checkpoints to sample from, of the step of --model_path and in its folder, such as "
        "0.999,0.9999; none: --model_path itself",
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Comparison."""

    reports: str = extra(
        "", "report.json files, or the folders that hold them, separated by commas or blanks", parse=paths_of
    )
    out_dir: str = extra("", "folder for compare.md and compare.png; empty: print only", parse=path_of)
