"""Options for exchanging models with other programs."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra
from .messages import UserError
from .values import path_of

EXPORT_FORMATS = ("pt", "safetensors", "onnx", "exported-program")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export."""

    model_path: str = extra("", "checkpoint to export, or a run's folder", parse=path_of)
    to: str = extra("pt", "format to write", choices=EXPORT_FORMATS)
    out: str = extra("", "file or folder to write; a file that is there is replaced", parse=path_of)
    dynamic_batch: bool = extra(True, "onnx and exported-program: the graph takes any number of images")
    export_batch: int = extra(1, "number of images that the graph takes with --dynamic_batch False", low=1)

    def validate(self) -> None:
        if self.dynamic_batch and self.export_batch != 1:
            raise UserError(f"--export_batch {self.export_batch} needs --dynamic_batch False")
