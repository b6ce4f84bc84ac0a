"""Option groups to networks and diffusions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ..config import ClassifierConfig, DiffusionConfig, NetworkConfig, ProcessConfig, SuperResModelConfig, UNetConfig
from ..logs import logger
from ..respace import SpacedDiffusion
from ..unet import EncoderUNetModel, UNetModel
from .factories import (
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    level_sides,
    nearest_sides,
    resolve_channel_mult,
    sides_without_level,
    sr_create_model,
)  # fmt: skip

_OF_THE_DATA = {"label_drop"}  # options of the network's group that the network itself does not need


def build_model(config: UNetConfig, learn_sigma: bool) -> UNetModel:
    """The network of an image model or of a super-resolution model, on the CPU.

    :param learn_sigma: twice the channels come out, the second half for the variance.
    """
    create = sr_create_model if isinstance(config, SuperResModelConfig) else create_model
    return create(learn_sigma=learn_sigma, **_options(config))


def build_diffusion(config: ProcessConfig) -> SpacedDiffusion:
    """The diffusion on the steps of --timestep_respacing; of a bare process, one that predicts the noise."""
    options = _options(config)
    return create_gaussian_diffusion(steps=options.pop("diffusion_steps"), **options)


def build_model_and_diffusion(model: UNetConfig, diffusion: DiffusionConfig) -> tuple[UNetModel, SpacedDiffusion]:
    """(network, diffusion)."""
    return build_model(model, diffusion.learn_sigma), build_diffusion(diffusion)


def build_classifier(config: ClassifierConfig) -> EncoderUNetModel:
    """The classifier of noisy images, on the CPU."""
    return create_classifier(**_options(config))


def with_levels(config: Any, given: Iterable[str] = (), new: bool = False) -> Any:
    """The network's options with what follows from the image size written out: the widths of the levels and, for a new
    network, which of them have attention.

    :param given: the options that the user gave. Sides with attention that no level has are a warning if given;
        otherwise the nearest levels take their place.
    """
    mult = resolve_channel_mult(config.size, config.channel_mult)
    config = replace(config, channel_mult=",".join(map(str, mult)))
    name = config.attention_option
    listed = getattr(config, name)
    missing = sides_without_level(config.size, len(mult), listed)
    if not new or not missing:
        return config
    if name in given:
        sides = ", ".join(map(str, level_sides(config.size, len(mult))))
        logger.warn(
            f"--{name} {listed}: no level has the side {' or '.join(map(str, missing))}, which gives no attention; the "
            f"levels of size {config.size} have the sides {sides}"
        )
        return config
    return replace(config, **{name: nearest_sides(config.size, len(mult), listed)})


def _options(config: NetworkConfig | ProcessConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OF_THE_DATA}
