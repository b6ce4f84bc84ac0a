"""`--preset auto`: a recipe chosen from the images and the hardware."""

from __future__ import annotations

import os
from typing import Any

import torch as th

from .. import distributed
from ..config import UserError, height_width
from ..config.recipes import RECIPES, Hardware, adapt, choose
from ..config.settings import ImageTraining, Training
from ..data.survey import survey
from ..logs import logger


def take_recipe(settings: Training, given: frozenset[str], source: Any) -> Training:
    """The settings with the options of the recipe that suits, but for those that the user gave. Logged in full.

    :param source: the training images.
    Collective: rank 0 looks at the images.
    """
    if not isinstance(settings, ImageTraining):
        raise UserError("--preset auto chooses recipes for image models: use improved-diffusion train")
    images = distributed.from_rank0(survey, source, settings.data.data_dir)
    hardware = describe_hardware(distributed.dev())
    values = settings.values()
    size = min(height_width(settings.model.size)) if "image_size" in given else 0
    name = choose(images, hardware, size)
    known = {option: values[option] for option in given}
    options = adapt(RECIPES[name].options, images, distributed.get_world_size(), known)
    grey = ", grey" if images.grey else ""
    shown = ", ".join(f"{option}={value}" for option, value in sorted(options.items()))
    logger.log(
        f"preset auto: {name} because {images.count:,} images, median side {images.side:,}{grey}, {hardware}; "
        f"options: {shown}"
    )
    return settings.replace(**options)


def describe_hardware(device: th.device) -> Hardware:
    """This process's CPU cores, and the memory of its accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = distributed.memory_info(device)
    return Hardware(cores, memory[1] / 2**30 if memory else 0.0)
