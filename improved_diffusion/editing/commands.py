"""Editing images with a trained model: to their noise and back, between two of them, painting parts, varying them."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..config import UserError, comma_list, height_width
from ..data.dataset import ImageDataset
from ..data.sources import open_pictures, stem
from ..logs import logger
from ..sampling.labels import Classes, Labels, image_labels, label_kwargs
from ..sampling.noise import SeededNoise, slerp
from ..sampling.solvers import BothWays, Inpaint
from ..sampling.timestep_grids import repaint_path
from ..sampling.writer import claim, last_images, write_samples
from ..utils import files, images
from .latents import WAY, read_latents, write_latents

INVERTIBLE = ("ddim", "euler", "heun")  # the rules whose step depends on nothing but where it starts
NOISY = ("ancestral", "dpmpp_2m_sde")  # the rules that draw noise on the way
# The grid with the best round trip, by far: an error of the network in the noise counts sigma / alpha times in x_0, and
# unlike the published strides this grid ends before nothing of the image is left.
ENCODING_GRID, ENCODING_STEPS = "karras", 200
EDITING_STEPS = 100  # of ancestral sampling and DDIM
GREY = 127  # of what is unknown, in the grid


# What each command does unless told, and what it cannot do


def settle(name: str, options: argparse.Namespace) -> None:
    """Check the options of the command `name`, and fill in what it does unless told. Collective.

    Raises UserError for options that it cannot do with.
    """
    if name == "interpolate" and bool(options.images) == bool(options.seeds):
        raise UserError("interpolate goes between two images or two seeds: give --images A.png,B.png or --seeds 3,7")
    inverts = name == "encode" or (name == "interpolate" and bool(options.images))
    if name == "decode" and not options.given & {"use_ddim", *WAY}:
        vars(options).update(distributed.from_rank0(read_latents, options.latents).way)
    if name in ("encode", "decode", "interpolate") and options.sampler == "auto":
        options.sampler = "ddim"
    if inverts or name == "decode":
        _default_steps(options, ENCODING_STEPS, ENCODING_GRID)
        if "clip_denoised" not in options.given:
            options.clip_denoised = False  # which has no way back
    if name in ("inpaint", "variations"):
        if options.sampler in ("auto", "ancestral", "ddim"):
            _default_steps(options, EDITING_STEPS)
        _refuse(options, f"raises the noise again on the way, and so does {name}: leave it out", churn=0)
    if inverts:
        if options.sampler not in INVERTIBLE:
            raise UserError(
                f"--sampler {options.sampler} cannot be walked from an image to its noise: take one of "
                + ", ".join(INVERTIBLE)
            )
        off = dict(guidance_scale=1, classifier_path="", ddim_eta=0, churn=0, dynamic_threshold=0)
        _refuse(options, "does not go with the way from an image to its noise: leave it out", **off)
    elif name == "interpolate":
        if options.sampler in NOISY:
            raise UserError(
                f"--sampler {options.sampler} draws noise on the way, so that one frame would not lead to the next: "
                "take another, such as ddim or dpmpp_2m"
            )
        _refuse(options, "draws noise on the way, so that one frame would not lead to the next", ddim_eta=0, churn=0)


def _default_steps(options: argparse.Namespace, steps: int, grid: str = "auto") -> None:
    if options.timestep_respacing:
        return
    if options.timestep_grid == "auto":
        options.timestep_grid = grid
    if not options.steps and not options.timestep_grid[:1].isdigit():
        options.steps = min(steps, options.diffusion_steps)


def _refuse(options: argparse.Namespace, why: str, **off: Any) -> None:
    for name, value in off.items():
        if getattr(options, name) != value:
            raise UserError(f"--{name} {getattr(options, name)} {why}")


def route(name: str, options: argparse.Namespace, sampler: Any) -> Any:
    """The Sampler with the path that the command takes over its steps."""
    if name == "inpaint":
        count = sampler.diffusion.num_timesteps
        return replace(sampler, path=repaint_path(count, options.jump_length, options.resamplings))
    inverts = name == "encode" or (name == "interpolate" and options.images)
    if inverts and sampler.diffusion.num_timesteps < 2:
        raise UserError(f"{name} needs at least two steps from an image to its noise: give more --steps")
    if name == "variations":
        return replace(sampler, path=noising_path(sampler, options.strength))
    return sampler


def noising_path(sampler: Any, strength: float) -> list[int]:
    """From the image straight to the step nearest to timestep strength * (T-1), and down again."""
    d = sampler.diffusion
    wanted = strength * (d.original_num_steps - 1)
    nearest = int(np.abs(np.array(d.timestep_map) - wanted).argmin())
    return [-1, *range(nearest, -2, -1)]


# What there is to edit


@dataclass
class Source:
    """What a command starts from; `flag` and `path` say where it came from."""

    flag: str
    path: str
    found: list[int] | None = None  # classes that came with it
    pictures: Any = None  # uint8 [N, H, W, C]
    latents: Any = None  # float32 [N, C, H, W]
    model: str = ""  # SHA-256 sum of the checkpoint that latents were found with
    masks: Any = None  # bool [1 or N, H, W], true where there is to be painted

    @property
    def count(self) -> int:
        """How many there are."""
        return next((len(a) for a in (self.pictures, self.latents) if a is not None), 0)


def read_source(name: str, options: argparse.Namespace, read: Callable[[], Any]) -> Source:
    """What the options name. Collective.

    :param read: gives the GivenImages of --images.
    """
    if name == "decode":
        latents = distributed.from_rank0(read_latents, options.latents)
        shape = latents.arrays.shape[1:]
        if shape != shape_of(options):
            raise UserError(
                f"--latents {options.latents} holds noise of {shape}, but {options.model_path} makes images of "
                f"{shape_of(options)} (channels, height, width): take the model that it was encoded with"
            )
        return Source("--latents", options.latents, latents.labels, latents=latents.arrays, model=latents.model)
    if getattr(options, "seeds", ""):
        return Source("--seeds", options.seeds)
    _keep_apart(options)
    given = read()
    source = Source("--images", options.images, given.labels, pictures=given.arrays)
    if name == "interpolate" and source.count != 2:
        raise UserError(f"--images {options.images} holds {source.count} images: interpolate goes between two")
    if name == "inpaint":
        source.masks = read_masks(options.mask, height_width(options.image_size), given.names)
    return source


def _keep_apart(options: argparse.Namespace) -> None:
    """Raise UserError where what is written would be among the images that the same command reads next time."""
    folder, out_dir = os.path.realpath(options.images), os.path.realpath(options.out_dir)
    if options.out_dir and os.path.isdir(folder) and os.path.commonpath([folder, out_dir]) == folder:
        raise UserError(f"--out_dir {options.out_dir} lies in --images {options.images}: choose one beside it")


def shape_of(options: argparse.Namespace) -> tuple[int, int, int]:
    """(C, H, W) of the model's images."""
    return (options.channels, *height_width(options.image_size))


def read_masks(path: str, size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """The masks of --mask for images of these names, bool [1 or N, H, W]: true where there is to be painted.

    :param size: (height, width) to resize them to, keeping black and white, and to crop them to in the centre.
    Raises UserError where they do not fit the images, and for one that is black all over.
    """
    source = open_pictures(path, "--mask")
    dataset = ImageDataset(size, source)
    by_name = {stem(source.name(i)): i for i in range(len(source))}
    if len(source) == 1:
        chosen = [0]
    elif set(names) <= by_name.keys():
        chosen = [by_name[name] for name in names]
    elif len(source) == len(names):
        chosen = list(range(len(names)))
    else:
        raise UserError(
            f"--mask {path} holds {len(source)} masks for {len(names)} images: give one for all of them, or one for "
            "each, of the same names or in the same order"
        )
    return np.stack([_mask(dataset, i) for i in chosen])


def _mask(dataset: ImageDataset, i: int) -> np.ndarray:
    from PIL import Image, ImageOps

    name = dataset.source.describe(i)
    grey = images.convert(dataset.read(i), 3, name).convert("L")
    height, width = dataset.resolution
    mask = np.asarray(ImageOps.fit(grey, (width, height), Image.Resampling.NEAREST)) > GREY
    if not mask.any():
        raise UserError(f"--mask {name} has nothing to paint: make white what is to be painted")
    return mask


# Doing it


@dataclass
class Job:
    """A command with all that it needs.

    :param model: prepared, guided; :param sampler: a Sampler with the command's path.
    :param labels: the class of each image that is made; None without classes.
    """

    name: str
    options: argparse.Namespace
    model: th.nn.Module
    sampler: Any
    source: Source
    labels: Labels | None

    @property
    def num_samples(self) -> int:
        """How many images to make."""
        if self.name == "interpolate":
            return self.options.frames
        return getattr(self.options, "num_samples", 0) or self.source.count

    def run(self, out_dir: str, request: Mapping[str, Any]) -> None:
        """Make the images and what goes with them, below out_dir. Collective.

        :param request: what the samples of the checkpoint depend on; the command adds its own.
        """
        request = {**self._describe(), **request}
        if self.source.model not in ("", request["model_sha256"]):
            logger.warn(
                f"{self.source.path} was encoded with another checkpoint than {self.options.model_path}: what comes "
                "out may be noise"
            )
        if self.name == "encode":
            distributed.from_rank0(claim, out_dir, request)
            self.source.latents = write_latents(
                lambda indices: self.invert(indices).cpu().numpy(),
                out_dir=out_dir,
                count=self.source.count,
                shape=shape_of(self.options),
                batch_size=self.options.batch_size,
                labels=self.labels,
                way={name: getattr(self.options, name) for name in WAY},
                model=request["model_sha256"],
            )
        draw = {"inpaint": _inpaint, "variations": _vary, "interpolate": _interpolate}.get(self.name, _decode)(self)
        path = write_samples(
            draw,
            out_dir=out_dir,
            num_samples=self.num_samples,
            batch_size=self.options.batch_size,
            labels=self.labels,
            request=request,
            beside=None if self.source.pictures is None or self.name == "interpolate" else self._beside,
        )
        if self.name == "encode":
            distributed.from_rank0(_say_psnr, path, self.source.pictures)
        if self.name == "interpolate":
            distributed.from_rank0(_write_film, out_dir, path)

    def walk(self, indices: Sequence[int], labels: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The sampler's walk for the images with these numbers, and the classes of those of `labels`."""
        seeds = [self.options.seed + i for i in indices]
        y = label_kwargs(self.labels, indices if labels is None else labels)
        return self.sampler.walk(self.model, shape_of(self.options), seeds, y, **kwargs)

    def pictures(self, indices: Sequence[int]) -> th.Tensor:
        """What images with these numbers are made from: float32 [N, C, H, W] in [-1, 1]."""
        return images.from_uint8(self.source.pictures[self._of(indices)]).to(distributed.dev())

    def invert(self, indices: Sequence[int], labels: Sequence[int] | None = None) -> th.Tensor:
        """The noise [N, C, H, W] that leads to the source's images with these numbers (DDIM sec. 5.4)."""
        # The clean image enters at the least noisy level that the network knows.
        up, rule = range(self.sampler.diffusion.num_timesteps), BothWays(self.sampler.make_rule())
        for out in self.walk(indices, labels, noise=self.pictures(indices), path=up, rule=rule):
            x = out["sample"]
        return x

    def _of(self, indices: Sequence[int]) -> list[int]:
        return [i % self.source.count for i in indices]

    def masks(self, indices: Sequence[int]) -> np.ndarray:
        """The masks of images with these numbers, bool [N, H, W]."""
        masks = self.source.masks
        return masks[[i % len(masks) for i in self._of(indices)]]

    def _beside(self, i: int) -> np.ndarray:
        picture = self.source.pictures[i % self.source.count]
        return (
            picture if self.source.masks is None else np.where(self.masks([i])[0][..., None], np.uint8(GREY), picture)
        )

    def _describe(self) -> dict[str, Any]:
        """What the images depend on besides the checkpoint and its sampler."""
        own = ("frames", "seeds", "strength", "jump_length", "resamplings")
        found: dict[str, Any] = {"command": self.name}
        if self.source.flag != "--seeds":
            paths = self.source.path.split(",")
            found[self.source.flag[2:]] = ",".join(p if files.is_url(p) else os.path.abspath(p) for p in paths)
        found |= {name: getattr(self.options, name) for name in own if hasattr(self.options, name)}
        for name in ("pictures", "latents", "masks"):
            array = getattr(self.source, name)
            if array is not None:
                found[f"{name}_sha256"] = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        return found


def choose_classes(name: str, options: argparse.Namespace, classes: Classes | None, source: Source) -> Labels | None:
    """The class of each image that is made: of --classes, else those that came with the images or the seeds."""
    found = source.found
    if source.flag == "--seeds" and classes is not None:
        # As image_sample.py draws that of its first sample.
        seeds = comma_list(options.seeds, int)
        found = [Labels(classes.num, seed, [], None).index(0) for seed in seeds]
    labels = image_labels(options, classes, found, source.path, source.flag)
    if labels is None or name != "interpolate":
        return labels
    if len(labels.classes) > 2:
        raise UserError(f"--classes {options.classes}: give one for all frames, or one for each end")
    ends = labels.classes[0], labels.classes[-1]
    of_frames = [ends[weight > 0.5] for weight in _weights(options.frames)]  # that of the nearer end
    return Labels(labels.num_classes, labels.seed, of_frames, labels.class_names)


def _weights(frames: int) -> list[float]:
    return [k / (frames - 1) for k in range(frames)]


Draw = Callable[[list[int]], np.ndarray]


def _decode(job: Job) -> Draw:
    def draw(indices):
        noise = th.from_numpy(job.source.latents[job._of(indices)]).to(distributed.dev())
        return last_images(job.walk(indices, noise=noise))

    return draw


def _inpaint(job: Job) -> Draw:
    def draw(indices):
        masks = job.masks(indices)
        unknown = th.from_numpy(masks[:, None].astype(np.float32)).to(distributed.dev())
        rule = Inpaint(job.sampler.make_rule(), job.pictures(indices), unknown)
        painted = last_images(job.walk(indices, rule=rule))
        # Rounding to 8 bits would move some of the known pixels by one.
        return np.where(masks[..., None], painted, job.source.pictures[job._of(indices)])

    return draw


def _vary(job: Job) -> Draw:
    return lambda indices: last_images(job.walk(indices, noise=job.pictures(indices)))


def _interpolate(job: Job) -> Draw:
    frames = job.options.frames
    if job.source.pictures is not None:
        ends = job.invert([0, 1], labels=[0, frames - 1])
    else:
        seeds = comma_list(job.options.seeds, int)
        ends = SeededNoise(seeds)(th.empty(2, *shape_of(job.options), device=distributed.dev()))

    def draw(indices):
        weights = _weights(frames)
        noise = th.cat([slerp(ends[:1], ends[1:], weights[i]) for i in indices])
        return last_images(job.walk(indices, noise=noise))

    return draw


def _write_film(out_dir: str, path: str) -> None:
    """The frames side by side, and as an animation there and back."""
    frames = images.load_npz(path)["arr_0"]
    strip, gif = files.join(out_dir, "interpolation.png"), files.join(out_dir, "interpolation.gif")
    images.save_strip(strip, frames[None])
    images.save_gif(gif, np.concatenate([frames, frames[-2:0:-1]]))
    logger.log(f"wrote {strip} and {gif}")


def psnr(images_a: np.ndarray, images_b: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of uint8 [N, H, W, C] to others, in dB: [N], inf for equal ones."""
    errors = ((images_a.astype(np.float64) - images_b) ** 2).mean(axis=(1, 2, 3))
    return np.array([10 * math.log10(255**2 / error) if error else math.inf for error in errors])


def _say_psnr(path: str, originals: np.ndarray) -> None:
    decibels = psnr(images.load_npz(path)["arr_0"], originals)
    worst = int(decibels.argmin())
    logger.log(
        f"{len(decibels)} images encoded and decoded: PSNR {decibels.mean():.1f} dB in the mean, "
        f"{decibels[worst]:.1f} dB at the lowest (image {worst})"
    )
