"""The options of the published factories and their defaults, derived from the option groups."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .model import DiffusionConfig, ModelConfig, SuperResModelConfig


def _published(*groups: type) -> dict[str, Any]:
    return {f.name: f.default for group in groups for f in fields(group) if f.metadata["published"]}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The published options of create_model_and_diffusion and their defaults."""
    return _published(ModelConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The published options of sr_create_model_and_diffusion and their defaults."""
    return _published(SuperResModelConfig, DiffusionConfig)
