"""The formats that a model can be written in: each is a module of this room with a function `write`.

    write(loaded: LoadedModel, options: ExportConfig) -> list[str]

writes the model to `options.out` and returns what the format cannot hold, one line each. It raises UserError, before
anything is written, for a model that the format cannot express.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ..checkpoints import sets
from ..checkpoints.loading import LoadedModel
from ..config.exchange import ExportConfig
from ..logs import logger

_MODULES = {
    "pt": "weights",
    "safetensors": "weights",
    "diffusers": "diffusers_pipeline",
    "onnx": "onnx",
    "exported-program": "exported_program",
}


def export(loaded: LoadedModel, options: ExportConfig) -> None:
    """Write a model in another program's format, and log what is not in it.

    Raises UserError where the file to write is the model's own, or one of a run's checkpoints.
    """
    sets.require_free(options.out, loaded.path)
    write: Callable[[LoadedModel, ExportConfig], list[str]]
    write = import_module(f".{_MODULES[options.to]}", __package__).write
    lost = write(loaded, options)
    logger.log(f"{options.out}: {loaded.path} as {options.to}")
    for line in lost:
        logger.warn(f"not in {options.out}: {line}")
