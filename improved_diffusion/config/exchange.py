"""Options for exchanging models with other programs."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra
from .messages import UserError
from .values import path_of

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
