"""What the editing commands share.

A command is used in two steps: `prepare` makes the model ready for it, and an object made of that model and arrays
draws edited images by their numbers. `read` makes the object from --images instead, and `write` fills a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import UserError, height_width
from ..config.settings import Editing
from ..data.given import GivenImages, read_images
from ..logs import logger
from ..models.build import build_diffusion
from ..sampling.guided import guide, prepare_model
from ..sampling.labels import Classes, Labels, image_labels, label_kwargs
from ..sampling.noise import SeededNoise
from ..sampling.request import describe_request, samples_name
from ..sampling.sampler import Sampler, build_sampler
from ..sampling.solvers import BothWays
from ..sampling.writer import last_images, write_samples
from ..utils import files
from ..utils.images import from_uint8

S = TypeVar("S", bound=Editing)
E = TypeVar("E", bound="Edit")

INVERTIBLE = ("ddim", "euler", "heun")  # a step depends on nothing but where it starts, so it can be taken backwards
NOISY = ("ancestral", "dpmpp_2m_sde")  # these draw noise at each step
# The grid with the smallest round-trip error, by far: an error of the predicted noise counts sigma / alpha times in
# x_0, and unlike the published strides this grid stops while some of the image is left.
ENCODING_GRID, ENCODING_STEPS = "karras", 200
EDITING_STEPS = 100  # of ancestral sampling and DDIM


# Options


def default_steps(settings: S, steps: int, grid: str = "auto") -> S:
    """The settings with this many steps on this grid, where they name none; no more than the model has."""
    options, respacing = settings.sampler, settings.diffusion.timestep_respacing
    if respacing:
        return settings
    grid = grid if options.timestep_grid == "auto" else options.timestep_grid
    listed = grid[:1].isdigit()  # timesteps one by one
    count = options.steps or (0 if listed else min(steps, settings.diffusion.diffusion_steps))
    return settings.replace(timestep_grid=grid, steps=count)


def inversion_settings(settings: S, given: Iterable[str]) -> S:
    """The settings for going from images to their noise and back: 200 steps of DDIM unless the user says otherwise.

    Raises UserError for a sampler that has no way back, and for guidance, noise and thresholds.
    """
    settings = settings.replace(sampler=_deterministic(settings))
    settings = default_steps(settings, ENCODING_STEPS, ENCODING_GRID)
    if "clip_denoised" not in given:
        settings = settings.replace(clip_denoised=False)  # clipping cannot be undone
    if settings.sampler.sampler not in INVERTIBLE:
        raise UserError(
            f"--sampler {settings.sampler.sampler} cannot go from an image to its noise: choose one of "
            + ", ".join(INVERTIBLE)
        )
    off = dict(guidance_scale=1, classifier_path="", ddim_eta=0, churn=0, dynamic_threshold=0)
    refuse_options(settings, "cannot be undone when going from an image to its noise: leave it out", **off)
    return settings


def decoding_settings(settings: S, given: Iterable[str]) -> S:
    """The settings for going from noise to images by the steps of `inversion_settings`, with any sampler."""
    settings = default_steps(settings.replace(sampler=_deterministic(settings)), ENCODING_STEPS, ENCODING_GRID)
    return settings if "clip_denoised" in given else settings.replace(clip_denoised=False)


def _deterministic(settings: Editing) -> str:
    """The name of the sampler: DDIM rather than ancestral sampling, unless another is given."""
    return "ddim" if settings.sampler.sampler == "auto" else settings.sampler.sampler


def renoising_settings(settings: S, command: str) -> S:
    """The settings of a command whose path adds noise: 100 steps of ancestral sampling or DDIM unless given."""
    if settings.sampler.sampler in ("auto", "ancestral", "ddim"):
        settings = default_steps(settings, EDITING_STEPS)
    refuse_options(settings, f"adds noise during sampling, and so does {command}: leave it out", churn=0)
    return settings


def refuse_options(settings: Editing, why: str, **off: Any) -> None:
    """Raise UserError for each option that has another value than in `off`."""
    values = settings.values()
    for name, value in off.items():
        if values[name] != value:
            raise UserError(f"--{name} {values[name]} {why}")


# The model


@dataclass(frozen=True)
class EditingModel:
    """A model prepared for one editing command.

    :param loaded: its settings include the command's defaults.
    :param sampler: with the command's path over the noise levels.
    :param model: on the device, with guidance.
    :param classes: what its labels mean; None for an unconditional model.
    """

    loaded: LoadedModel[Any]
    sampler: Sampler
    model: th.nn.Module
    classes: Classes | None

    @classmethod
    def build(
        cls, loaded: LoadedModel[Any], settings: Editing, path: Callable[[Any, Sampler], Sequence[int]]
    ) -> EditingModel:
        """The model with a command's settings.

        :param path: (settings, sampler) -> the levels to visit. Collective.
        Raises UserError for options that contradict each other or the model.
        """
        changed = settings.diffusion != loaded.settings.diffusion
        diffusion = build_diffusion(settings.diffusion) if changed else loaded.diffusion
        loaded = replace(loaded, settings=settings, diffusion=diffusion)
        sampler = build_sampler(settings, diffusion)
        sampler = replace(sampler, path=path(settings, sampler))
        model, classes = guide(loaded, prepare_model(settings.sampler, loaded.model), sampler.diffusion)
        return cls(loaded, sampler, model, classes)

    @property
    def settings(self) -> Any:
        """The command's settings."""
        return self.loaded.settings

    @property
    def seed(self) -> int:
        """The seed that all noise and random classes follow from, together with the images' numbers."""
        return self.settings.run.seed

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.settings.model.channels, *height_width(self.settings.model.size))

    def labels(self, found: Sequence[int] | None, source: str) -> Labels | None:
        """The class of each image: of --classes, else `found` with the images; None for an unconditional model.

        :param source: where the images come from, for messages. Raises UserError where the model needs classes and
            there are none.
        """
        wanted = self.settings.edit.classes
        return image_labels(self.classes, wanted, self.seed, self.loaded.path, found, source)

    def trajectory(
        self, numbers: Sequence[int], model_kwargs: Mapping[str, th.Tensor], **start: Any
    ) -> Iterator[dict[str, th.Tensor]]:
        """`sample` and `pred_xstart` [N, C, H, W] after each step.

        :param numbers: of the images, which with the seed decide all noise that is drawn.
        :param model_kwargs: `y` of a model with classes.
        :param start: `noise`, `path` and `rule`, see Sampler.trajectory.
        """
        noise = SeededNoise(self.seed, numbers)
        return self.sampler.trajectory(self.model, self.shape, noise, model_kwargs, **start)

    def to_device(self, images: np.ndarray) -> th.Tensor:
        """uint8 [N, H, W, C] as the network takes them: float32 [N, C, H, W] in [-1, 1]."""
        return from_uint8(images).to(distributed.dev())

    def find_noise(self, images: np.ndarray, model_kwargs: Mapping[str, th.Tensor]) -> th.Tensor:
        """The noise [N, C, H, W] that leads to the images, uint8 [N, H, W, C] (DDIM sec. 5.4)."""
        # The clean image enters at the least noisy level that the network knows.
        up, rule = range(self.sampler.diffusion.num_timesteps), BothWays(self.sampler.make_rule())
        numbers = range(len(images))  # no noise is drawn
        for out in self.trajectory(numbers, model_kwargs, noise=self.to_device(images), path=up, rule=rule):
            x = out["sample"]
        return x

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """The images, where they are uint8 [N, H, W, C] of the model's size. Raises UserError otherwise."""
        channels, height, width = self.shape
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
            raise UserError(
                f"the images are {images.dtype} {list(images.shape)}, but {self.loaded.path} takes uint8 "
                f"[N, {height}, {width}, {channels}] (height, width, channels): convert and resize them"
            )
        return images


def straight(settings: Any, sampler: Sampler) -> Sequence[int]:
    """The path of plain sampling."""
    return sampler.path


def inversion_path(settings: Any, sampler: Sampler) -> Sequence[int]:
    """The path of plain sampling. Raises UserError where it has a single step, which has no way back."""
    if sampler.diffusion.num_timesteps < 2:
        raise UserError(f"--steps {sampler.steps}: going from an image to its noise needs at least two steps")
    return sampler.path


# The commands


class Edit:
    """An editing command on given arrays.

    :param model: from `prepare` of the same class.
    :param labels: the class of each image to make; None for an unconditional model.
    """

    command: ClassVar[str]

    def __init__(self, model: EditingModel, labels: Labels | None):
        self.model, self.labels = model, labels

    @classmethod
    def prepare(cls, loaded: LoadedModel[Any]) -> EditingModel:
        """The model with the command's defaults, sampler and path.

        Raises UserError for options that the command cannot work with. Collective.
        """
        raise NotImplementedError

    @classmethod
    def read(cls: type[E], model: EditingModel) -> E:
        """The command on what the settings name, such as --images. Collective."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many images to make."""
        raise NotImplementedError

    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        """The edited images with these numbers, uint8 [N, H, W, C]. Each follows from the seed and its number."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the images depend on besides the checkpoint and its sampler."""
        raise NotImplementedError

    def shown_beside(self, number: int) -> np.ndarray | None:
        """An image to show beside the edited one in the grid, uint8 [H, W, C]; None where there is none."""
        return None

    @property
    def name(self) -> str:
        """The default name of the output folder."""
        sampler = self.model.sampler
        return f"{self.command}_{samples_name(self.model.loaded, sampler.name, sampler.steps)}"

    def request(self) -> dict[str, Any]:
        """All that the images depend on. Collective."""
        described = describe_request(self.model.loaded, self.model.sampler)
        return {"command": self.command, **self.describe(), **described}

    def write(self, out_dir: str) -> str:
        """Make the images that are not in the folder yet; returns the npz's path. Collective."""
        return self.write_images(self.draw, out_dir, self.request())

    def write_images(self, draw: Callable[[list[int]], np.ndarray], out_dir: str, request: Mapping[str, Any]) -> str:
        """Write what `draw` gives for the numbers 0..count-1, as npz, PNGs and a grid. Collective."""
        logger.log(self.model.sampler.describe())
        return write_samples(
            draw,
            out_dir=out_dir,
            numbers=range(self.count),
            batch_size=self.model.settings.edit.batch_size,
            labels=self.labels,
            request=request,
            beside=self.shown_beside,
        )

    def images_from(self, numbers: Sequence[int], **start: Any) -> np.ndarray:
        """Where the trajectories of images with these numbers end: uint8 [N, H, W, C]."""
        return last_images(self.model.trajectory(numbers, label_kwargs(self.labels, numbers), **start))


class ImageEdit(Edit):
    """A command that makes image i from given image i modulo their number.

    :param images: uint8 [N, H, W, C] of the model's size.
    :param labels: their classes; None where they have none.
    Raises UserError for images of another size, and where the model needs classes and there are none.
    """

    def __init__(self, model: EditingModel, images: np.ndarray, labels: Sequence[int] | None = None):
        self.images = model.check_images(images)
        super().__init__(model, model.labels(labels, source_name(model.settings)))

    @classmethod
    def read(cls: type[E], model: EditingModel) -> E:
        given = read_given(model)
        return cls(model, given.arrays, given.labels)  # type: ignore[call-arg, arg-type]

    @property
    def count(self) -> int:
        return self.model.settings.copies.num_samples or len(self.images)

    def originals(self, numbers: Sequence[int]) -> np.ndarray:
        """The images that those with these numbers are made from, uint8 [N, H, W, C]."""
        return self.images[[i % len(self.images) for i in numbers]]

    def shown_beside(self, number: int) -> np.ndarray:
        return self.originals([number])[0]

    def describe(self) -> dict[str, Any]:
        return {"images": full_paths(self.model.settings.images.images), "images_sha256": sha256(self.images)}


# Given images


def read_given(model: EditingModel) -> GivenImages:
    """The images of --images, resized for the model. Collective.

    Raises UserError where --out_dir is inside of --images: the same command would read its own output next time.
    """
    settings = model.settings
    path, out_dir = settings.images.images, settings.run.out_dir
    folder = os.path.realpath(path)
    if out_dir and os.path.isdir(folder) and os.path.commonpath([folder, os.path.realpath(out_dir)]) == folder:
        raise UserError(f"--out_dir {out_dir} is inside of --images {path}: choose a folder outside of it")
    names = model.classes.names if model.classes else None
    return read_images("--images", path, "--image_size", settings.model.size, settings.model.channels, names)


def source_name(settings: Any) -> str:
    """What messages call the images."""
    path = settings.images.images
    return f"--images {path}" if path else "the given images"


def full_paths(paths: str) -> str:
    """Comma-separated paths from the root on."""
    return ",".join(files.full_path(path) for path in paths.split(",")) if paths else ""


def sha256(array: np.ndarray) -> str:
    """The SHA-256 sum of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
