"""What may be asked of the engine, checked before it waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..config import (
    KINDS,
    DiffusionConfig,
    GuidanceConfig,
    InpaintConfig,
    SampleConfig,
    SamplerConfig,
    SpeedConfig,
    UserError,
    VariationsConfig,
    number_list,
    shown,
    unknown_name,
)
from ..config.editing import InterpolateConfig
from ..config.run import RunConfig
from ..config.sampling import BaseSamplesConfig
from ..sampling.labels import parse_classes
from .catalogue import ModelInfo

_SAMPLER = {f.name for f in fields(SamplerConfig)} - {"print_steps"} - {f.name for f in fields(SpeedConfig)}
_GUIDANCE = {"guidance_scale", "guidance_interval", "guidance_rescale"}
_DRAWING = _SAMPLER | _GUIDANCE | {"timestep_respacing"}

# The options that each kind of request takes: none names a file or a folder.
OPTIONS: Mapping[str, frozenset[str]] = {
    "sample": frozenset(_DRAWING | {"seeds"}),
    "upscale": frozenset(_DRAWING | {"any_size"}),
    "inpaint": frozenset(_DRAWING | {"jump_length", "resamplings"}),
    "variations": frozenset(_DRAWING | {"strength"}),
    "interpolate": frozenset(_DRAWING | {"seeds"}),
    "transform": frozenset(_DRAWING | {"image_classes"}),  # the classes that the images have, for encoding
}
_CONFIGS = (
    SamplerConfig, GuidanceConfig, DiffusionConfig, SampleConfig, BaseSamplesConfig, InpaintConfig, VariationsConfig,
)  # fmt: skip
MAX_SIDE = 16_384  # of given images, in pixels


@dataclass(frozen=True, eq=False)
class Request:
    """What a user asks for.

    :param kind: sample, upscale, inpaint, variations, interpolate, or transform: encode, then decode to `classes`.
    :param model: its name in the catalogue, never a path.
    :param average: of a run, such as "0.9999", or "raw"; "" the first.
    :param n: images; interpolate: frames; 0: one from each of the given images.
    :param classes: names or labels, taken in turn.
    :param options: of the Python API's method, by name; see OPTIONS.
    :param images: uint8 [N, H, W, C]; interpolate: two, or None with the option seeds=[a, b].
    :param mask: bool [H, W] or [N, H, W] for inpaint, true where to paint.
    """

    kind: str
    model: str
    average: str = ""
    n: int = 1
    seed: int = 0
    classes: tuple[str | int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    images: np.ndarray | None = None
    mask: np.ndarray | None = None

    def numbers(self) -> Sequence[int]:
        """The numbers of its images."""
        if self.kind == "sample":
            return self._seeds() or range(self.n)
        return range(self.n or (0 if self.images is None else len(self.images)))

    def ends(self) -> Sequence[Any]:
        """The two numbers, or the two images, that interpolate goes between."""
        return self._seeds() or list(self.images if self.images is not None else ())

    def _seeds(self) -> list[int]:
        seeds = self.options.get("seeds", "")
        return number_list(seeds if isinstance(seeds, str) else ",".join(map(str, seeds)))

    def check(self, info: ModelInfo, max_images: int) -> None:
        """Raise UserError for a request that cannot work."""
        if self.kind not in OPTIONS:
            raise unknown_name("kind of request", str(self.kind), OPTIONS)
        if (self.kind == "upscale") != (info.kind == "super_res"):
            wanted = "super_res" if self.kind == "upscale" else "image"
            raise UserError(f"{self.kind} needs {KINDS[wanted][0]}, but {info.name} is {KINDS[info.kind][0]}")
        self._check_options()
        RunConfig(seed=self.seed)
        if not isinstance(self.n, int) or not 0 <= self.n <= max_images:
            raise UserError(f"n {shown(self.n)}: expected 1 to {max_images:,}")
        self._check_classes(info)
        self._check_images()
        count = len(self.numbers())
        if not 1 <= count <= max_images:
            raise UserError(f"{count:,} images are asked for: expected 1 to {max_images:,}")
        if self.kind == "interpolate":
            InterpolateConfig(frames=self.n)

    def _check_options(self) -> None:
        known = OPTIONS[self.kind]
        for name in self.options:
            if name not in known:
                raise unknown_name(f"option of {self.kind}", str(name), known)
        for config in _CONFIGS:
            names = {f.name for f in fields(config)} & self.options.keys() - {"seeds"}
            config(**{name: self.options[name] for name in names})
        if self.kind == "interpolate":
            InterpolateConfig(seeds=self.options.get("seeds", ""))
        elif "seeds" in self.options:
            SampleConfig(seeds=self.options["seeds"])

    def _check_classes(self, info: ModelInfo) -> None:
        for name, given in (("classes", self.classes), ("image_classes", self.options.get("image_classes", ()))):
            if not isinstance(given, (list, tuple)) or not all(isinstance(each, (str, int)) for each in given):
                raise UserError(f"{name} {shown(given)}: expected a list of names or labels")
            if given and not info.class_cond:
                raise UserError(f"{name}: {info.name} was trained without classes")
            if given:
                text = ",".join(map(str, given))
                SampleConfig(classes=text)
                parse_classes(text, info.class_names, info.num_classes)

    def _check_images(self) -> None:
        needs = self.kind != "sample" and not (self.kind == "interpolate" and self.options.get("seeds"))
        if not needs:
            if self.images is not None:
                raise UserError(f"{self.kind}: images are given, and it takes none" + self._hint())
        elif self.images is None:
            raise UserError(f"{self.kind} needs images")
        else:
            _check_array(self.images)
            if self.kind == "interpolate" and len(self.images) != 2:
                raise UserError(f"interpolate goes between two images, and {len(self.images)} are given")
        if (self.kind == "inpaint") != (self.mask is not None):
            raise UserError("inpaint needs a mask" if self.mask is None else f"{self.kind} takes no mask")
        if self.mask is not None and (self.mask.dtype != bool or self.mask.ndim not in (2, 3) or not self.mask.size):
            raise UserError(f"the mask is {self.mask.dtype} {list(self.mask.shape)}, expected bool [H, W] or [N, H, W]")

    def _hint(self) -> str:
        return " beside seeds" if self.kind == "interpolate" else ""


def _check_array(images: np.ndarray) -> None:
    sound = images.dtype == np.uint8 and images.ndim == 4 and images.size and images.shape[-1] <= 4
    if not sound or max(images.shape[1:3]) > MAX_SIDE:
        raise UserError(
            f"the images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, C] of 1 to 4 channels and "
            f"sides up to {MAX_SIDE:,}"
        )
