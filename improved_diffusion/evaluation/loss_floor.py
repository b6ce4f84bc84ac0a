"""The floor of the loss on a set of images by noise level, a model's loss beside it, and what they say of the model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, height_width
from ..config.settings import LossFloor
from ..data.classes import read_classes
from ..data.dataset import ImageDataset
from ..data.sources import open_images, stem
from ..logs import logger
from ..logs.progress import Progress
from ..models.build import build_diffusion
from ..sampling.guided import to_device
from ..sampling.request import model_name
from ..schedules import sigma_at
from ..training.loss_by_noise import Draws, FiniteSet, Level, LossByNoise, Mean, measure_floor, model_errors, target_of
from ..utils import files
from ..utils.text import counted
from .likelihood import open_dataset
from .loss_floor_plot import write_floor_plot

QUARTERS = 4
SEVERAL = 5  # images that a noisy one could be of, where a model may come near the floor
JSON_FILE, PLOT_FILE = "loss_floor.json", "loss_floor.png"


def training_loss(loaded: LoadedModel[Any], train_dir: str) -> FloorEvaluation:
    """What measures a model's loss on the images that it was trained on.

    :param train_dir: those images.
    """
    names, stored = LossFloor.options().keys(), loaded.metadata.get("config", {})
    own = {f.name: loaded.settings.values()[f.name] for group in ("model", "diffusion", "reading")
           for f in fields(getattr(loaded.settings, group))}  # fmt: skip
    labels = {"labels": stored["labels"]} if "labels" in stored else {}
    own |= {"timestep_respacing": "", "data_dir": train_dir}  # all timesteps, however few sampling takes
    settings = LossFloor.of({**{name: own[name] for name in own.keys() & names}, **labels})
    return FloorEvaluation(settings, replace(loaded, settings=settings, given=frozenset()))


class FloorEvaluation:
    """What `loss-floor` measures. Reads the list of the images; `run` does the work.

    :param settings: with the options of the model, where there is one.
    :param loaded: the model whose loss is measured; None: the floor only.
    Raises UserError for images that cannot be read, or classes that they do not have.
    """

    def __init__(self, settings: LossFloor, loaded: LoadedModel[LossFloor] | None = None) -> None:
        self.settings, self.loaded = settings, loaded
        self.diffusion = build_diffusion(settings.diffusion)
        self.mirror = settings.floor.random_flip
        if loaded is not None and "random_flip" not in loaded.given:
            self.mirror = bool(loaded.metadata.get("config", {}).get("random_flip", False))
        self.dataset = _open(settings) if loaded is None else open_dataset(loaded)

    @property
    def name(self) -> str:
        """The default folder of the results."""
        of = model_name(self.loaded.path) if self.loaded else stem(os.path.abspath(self.settings.source.data_dir))
        return f"{of}_loss_floor"

    def run(self) -> FloorReport:
        """Measure. Collective."""
        options = self.settings.floor
        images = FiniteSet(
            self.dataset, np.arange(len(self.dataset)), options.floor_images or len(self.dataset), self.mirror
        )
        measured = measure_floor(Draws.of(images, self.diffusion.alphas_cumprod, options.floor_draws))
        if self.loaded is not None:
            measured = measured.with_model(self._errors(self.loaded, measured.draws))
        return FloorReport(measured, target_of(self.diffusion), options.floor_levels, self._about(images))

    def _errors(self, loaded: LoadedModel[LossFloor], draws: Draws) -> np.ndarray:
        network = to_device(loaded.model, "fp32")
        with closing(Progress("loss of the model", len(draws), "noisy image")) as bar:
            step = distributed.get_world_size()
            batch_size = self.settings.floor.batch_size
            return model_errors(
                network, self.diffusion, draws, batch_size, distributed.dev(), lambda done: bar.update(done * step)
            )

    def _about(self, images: FiniteSet) -> dict[str, Any]:
        """What the numbers depend on."""
        settings, loaded = self.settings, self.loaded
        return {
            "data_dir": files.full_path(settings.source.data_dir),
            "images": len(images),
            "of_images": images.total,
            "is_whole": images.is_whole,
            "random_flip": images.mirror,
            "classes": 0 if images.classes is None else len(np.unique(images.classes)),
            "draws": settings.floor.floor_draws,
            "target": target_of(self.diffusion),
            **{name: getattr(settings.diffusion, name) for name in ("diffusion_steps", "noise_schedule")},
            "image_size": settings.model.size,
            "channels": settings.model.channels,
            "model_path": None if loaded is None else files.full_path(loaded.path),
            "model_sha256": None if loaded is None else files.sha256(loaded.path),
            "model_step": None if loaded is None else loaded.metadata.get("step"),
        }


def _open(settings: LossFloor) -> ImageDataset:
    """The images of --data_dir, with their classes where a class-conditional floor is asked for."""
    data_dir, model, classes = settings.source.data_dir, settings.model, None
    source = open_images(data_dir)
    if model.class_cond:
        classes, _ = read_classes(source, settings.source.labels, data_dir, model.num_classes)
    return ImageDataset(model.size, source, classes, channels=model.channels, reading=settings.reading)


@dataclass(frozen=True)
class FloorReport:
    """The floor of the loss by noise level, and the loss of a model where one was measured.

    :param target: what the loss of training is of: epsilon, x_0 or v.
    :param num_levels: ranges of timesteps to show.
    """

    measured: LossByNoise
    target: str
    num_levels: int
    about: Mapping[str, Any]

    @property
    def targets(self) -> list[str]:
        """In whose units the errors are shown: what training predicts, then epsilon, then x_0."""
        return list(dict.fromkeys([self.target, "epsilon", "x_0"]))

    @property
    def has_model(self) -> bool:
        """Whether the loss of a model was measured."""
        return self.measured.model is not None

    def levels(self, count: int = 0) -> list[dict[str, Any]]:
        """The numbers of each range of timesteps: first and last, sigma there, images, and for each target a dict of
        `floor`, and with a model `loss` and `excess`, each a Mean."""
        return [self._level(level) for level in self.measured.draws.levels(count or self.num_levels)]

    def _level(self, level: Level) -> dict[str, Any]:
        ends = np.array([level.first, level.last])
        return {
            "timesteps": [level.first, level.last],
            "sigma": sigma_at(self.measured.draws.alpha_bar, ends).tolist(),
            "draws": len(level.chosen),
            "images": self.measured.images_at(level),
            **{target: self._means(level, target) for target in self.targets},
        }

    def _means(self, level: Level, target: str) -> dict[str, Mean]:
        found = {"floor": self.measured.floor_at(level, target)}
        if self.has_model:
            found |= {"loss": self.measured.model_at(level, target), "excess": self.measured.excess_at(level, target)}
        return found

    @property
    def warnings(self) -> list[str]:
        """Where the model is below the floor by more than chance, which cannot be right."""
        return self.measured.below_floor(self.target, self.num_levels) if self.has_model else []

    @property
    def memorised(self) -> list[str]:
        """Where the model knows the images one by one."""
        return self.measured.memorised(self.target, self.num_levels) if self.has_model else []

    def lines(self) -> list[str]:
        """The report as lines of text."""
        about, target = self.about, self.target
        images = f"{about['images']:,} images" + (" and their mirror images" if about["random_flip"] else "")
        classes = f", of {about['classes']} classes, each by itself" if about["classes"] else ""
        part = "" if about["is_whole"] else f" of {about['of_images']:,}: a lower bound of the floor of all"
        height, width = height_width(about["image_size"])
        size = f"{width}x{height} pixels, {counted(about['channels'], 'channel')}"
        lines = [
            f"floor of the loss on {images}{part}{classes}: {size}, {about['noise_schedule']} schedule of "
            f"{counted(about['diffusion_steps'], 'timestep')}",
            f"{about['draws']:,} noisy images; squared errors per pixel",
        ]
        columns = [f"floor {each}" for each in self.targets]
        if self.has_model:
            columns += [f"loss {target}", "above floor"]
        lines.append(f"{'timesteps':>11} {'sigma':>15} {'images':>8}" + "".join(f" {name:>21}" for name in columns))
        for level in self.levels():
            means = [level[each]["floor"] for each in self.targets]
            if self.has_model:
                means += [level[target]["loss"], level[target]["excess"]]
            first, last = level["timesteps"]
            low, high = level["sigma"]
            lines.append(
                f"{f'{first}-{last}':>11} {f'{low:.3g}-{high:.3g}':>15} {level['images']:>8.4g}"
                + "".join(f" {_text(mean):>21}" for mean in means)
            )
        quarters = " ".join(f"{level[target]['floor'].value:.4g}" for level in self.levels(QUARTERS))
        lines.append(f"floor of mse_q0 to mse_q{QUARTERS - 1} in the log of a training ({target}): {quarters}")
        return [*lines, *self.verdict]

    @property
    def verdict(self) -> list[str]:
        """What the loss of the model says of it, in sentences; [] without a model."""
        if not self.has_model or self.warnings:  # which say it
            return []
        return self.memorised or ["no sign that the model knows the images one by one: " + self._comparison()]

    def _comparison(self) -> str:
        """How far the model is above the floor where a noisy image could be of several images."""
        open_levels = [level for level in self.levels() if level["images"] >= SEVERAL]
        if not open_levels:
            return f"but no noisy image could be of {SEVERAL} or more images, where the floor is an aim"
        floor, loss = (sum(level[self.target][name].value for level in open_levels) for name in ("floor", "loss"))
        first = open_levels[0]["timesteps"][0]
        return (
            f"its loss is {loss / floor:.1f} times the floor from timestep {first} on, where a noisy image could be of "
            f"{SEVERAL} or more"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows."""
        printer.text("\n".join(self.lines()))

    def to_dict(self) -> dict[str, Any]:
        """The content of loss_floor.json."""
        return {
            **self.about,
            "levels": [_plain(level) for level in self.levels()],
            "quarters": [_plain(level) for level in self.levels(QUARTERS)],
            "memorised": self.memorised,
            "warnings": self.warnings,
        }

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Write loss_floor.json and loss_floor.png; returns their paths. Without matplotlib, warns of the latter."""
        folder = os.fspath(folder)
        files.make_dirs(folder)
        path = files.join(folder, JSON_FILE)
        files.write_bytes(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())
        plot = files.join(folder, PLOT_FILE)
        try:
            write_floor_plot(plot, self)
        except UserError as error:
            logger.warn(f"no {plot}: {error}")
            return [path]
        return [path, plot]


def _text(mean: Mean) -> str:
    return f"{mean.value:.4g}" + ("" if math.isnan(mean.error) else f" +- {mean.error:.2g}")


def _plain(value: Any) -> Any:
    """Means as dicts, and None for what JSON has no number for."""
    if isinstance(value, Mean):
        return {"value": _plain(value.value), "error": _plain(value.error)}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
