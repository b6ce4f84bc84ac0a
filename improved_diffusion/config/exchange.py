"""Options for exchanging models with other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .base import Config, extra
from .messages import UserError
from .values import path_of, paths_of

EXPORT_FORMATS = ("pt", "safetensors", "diffusers", "onnx", "exported-program")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export."""

    model_path: str = extra("", "checkpoint to export, or a run's folder", parse=path_of)
    to: str = extra("pt", "format to write", choices=EXPORT_FORMATS)
    out: str = extra("", "file or folder to write; a file that is there is replaced", parse=path_of)
    drop_variance: bool = extra(
        False, "diffusers: leave a learned variance out, which DDIM does not use and DDIMPipeline does not take"
    )
    dynamic_batch: bool = extra(True, "onnx and exported-program: the graph takes any number of images")
    export_batch: int = extra(1, "number of images that the graph takes with --dynamic_batch False", low=1)

    def validate(self) -> None:
        self.require(not self.drop_variance or self.to == "diffusers", "drop_variance", "is for --to diffusers")
        is_graph = self.to in ("onnx", "exported-program")
        self.require(self.dynamic_batch or is_graph, "dynamic_batch", "is for --to onnx and exported-program")
        if self.dynamic_batch and self.export_batch != 1:
            raise UserError(f"--export_batch {self.export_batch} needs --dynamic_batch False")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Config):
    """Convert."""

    model_path: str = extra("", "checkpoint of another program: .pt, .pth, .ckpt, .bin or .safetensors", parse=path_of)
    out: str = extra(
        "", "file to write: a .safetensors by its name, else a .pt; a file that is there is replaced", parse=path_of
    )
    network: str = extra("", "which network of a file that holds several, as the log names them; empty: an average")
    trust: bool = extra(
        False,
        "read a file that holds objects of other programs: their classes are not imported, the objects are left out",
    )


@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """Model card."""

    repo: str = extra("", "repository on the Hub, user/name; made where there is none")
    license: str = extra("", "licence of the model, as the Hub names it, such as mit, apache-2.0, cc-by-4.0 or other")
    report: str = extra(
        "",
        "evaluations of this model, separated by commas: folders that evaluate or nll wrote, or their report.json and "
        "nll.json; empty: those in the checkpoint's folder and in report/ and nll/ below it",
        parse=paths_of,
    )
    samples: str = extra("", "image to show instead of samples that are drawn, such as samples.png", parse=path_of)
    num_samples: int = extra(16, "samples to draw for the card; 0: none", low=0, high=400)
    steps: int = extra(20, "steps of dpmpp_2m to draw them in", low=1)

    def validate(self) -> None:
        self.require(
            re.fullmatch(r"([a-z0-9][a-z0-9.-]{0,49})?", self.license) is not None,
            "license", "must be a name that the Hub has, such as mit, apache-2.0, cc-by-4.0, other or unknown",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PushConfig(CardConfig):
    """Push."""

    private: bool = extra(False, "make the repository private, where it is new")
    message: str = extra("Upload model", "message of the commit")


@dataclass(frozen=True, kw_only=True)
class PushCommandConfig(PushConfig):
    """Push to the Hugging Face Hub."""

    model_path: str = extra("", "checkpoint to upload, or a run's folder", parse=path_of)
    out: str = extra("", "write the model card into this folder and upload nothing", parse=path_of)
