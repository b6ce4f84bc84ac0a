"""Options for exchanging models with other programs."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra
from .values import path_of

EXPORT_FORMATS = ("pt", "safetensors", "diffusers")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export."""

    model_path: str = extra("", "checkpoint to export, or a run's folder", parse=path_of)
    to: str = extra("pt", "format to write", choices=EXPORT_FORMATS)
    out: str = extra("", "file or folder to write; a file that is there is replaced", parse=path_of)
    drop_variance: bool = extra(
        False, "diffusers: leave a learned variance out, which DDIM does not use and DDIMPipeline does not take"
    )

    def validate(self) -> None:
        self.require(not self.drop_variance or self.to == "diffusers", "drop_variance", "is for --to diffusers")
