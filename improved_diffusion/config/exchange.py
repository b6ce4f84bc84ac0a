"""Options for exchanging models with other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .base import Config, extra
from .messages import UserError, unknown_name
from .values import path_of, paths_of

# Those of huggingface.co/docs/hub/repositories-licenses.
LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "openrail++", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "isc",
    "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl",
    "openmdw-1.0", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "grok2-community", "gemma", "unknown", "other",
)  # fmt: skip
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
    license_name: str = extra("", "name of a licence that the Hub has no name for, with --license other")
    license_link: str = extra("", "URL of its text, with --license other")
    report: str = extra(
        "",
        "evaluations of this model, separated by commas: folders that evaluate or nll wrote, or their report.json and "
        "nll.json; empty: those in the checkpoint's folder and in report/ and nll/ below it",
        parse=paths_of,
    )
    samples: str = extra("", "image to show instead of samples that are drawn, such as samples.png", parse=path_of)
    num_samples: int = extra(16, "samples to draw for the card; 0: none", low=0, high=400)
    steps: int = extra(20, "steps of dpmpp_2m_sde to draw them in", low=1)

    def validate(self) -> None:
        if self.license and self.license not in LICENSES:
            hint = "names are at https://huggingface.co/docs/hub/repositories-licenses; others: --license other "
            raise unknown_name("--license", self.license, LICENSES, hint + "--license_name NAME")
        for name, allowed, must in (
            ("license_name", r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,99}", "must be a name of letters, digits and .+_-"),
            ("license_link", r"https?://[A-Za-z0-9./_~%?=&#:+@-]{1,500}", "must be a URL that begins with https://"),
        ):
            value = getattr(self, name)
            self.require(not value or re.fullmatch(allowed, value) is not None, name, must)
            self.require(not value or self.license == "other", name, "needs --license other")


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
