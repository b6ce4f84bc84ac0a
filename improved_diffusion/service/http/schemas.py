"""What requests may say. Sampling options are those of `config/`: types, bounds, choices and help come from there.

Only the options listed here can be given: none is a path, and none makes the service write or compile anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ...config.base import MOST_SAMPLES
from ...config.settings import ImageSampling, Inpainting, Interpolation, Settings, SuperResSampling, Variations

LONGEST_TEXT = 1000
MOST_CLASSES = 1000
SAMPLER = (
    "sampler", "steps", "timestep_respacing", "timestep_grid", "clip_denoised", "ddim_eta", "churn", "churn_min",
    "churn_max", "churn_noise", "dynamic_threshold", "guidance_scale", "guidance_interval", "guidance_rescale",
    "precision",
)  # fmt: skip
READING = ("resize_mode", "background")
Copies = Annotated[
    int, Field(ge=0, le=MOST_SAMPLES, description="images to make, from those given in turn; 0: one from each")
]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
ClassName = Text | Annotated[int, Field(ge=0, le=10**6)]


class Body(BaseModel):
    """What all requests for images have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(max_length=LONGEST_TEXT, description="name of a model, from /v1/models")]
    average: Annotated[Text, Field(description="weights of a run, such as 0.9999 or raw; empty: the first")] = ""
    classes: Annotated[
        list[ClassName] | None, Field(max_length=MOST_CLASSES, description="names or labels, repeated in turn")
    ] = None
    seed: Annotated[int, Field(ge=0, le=2**62 - 1, description="the same seed gives the same images")] = 0
    format: Annotated[
        Literal["json", "zip", "png", "npz"] | None, Field(description="of the reply; else by the Accept header")
    ] = None
    stream: Annotated[bool, Field(description="answer with server-sent events: progress, then the result")] = False
    previews: Annotated[bool, Field(description="with stream: send the images as they come out of the noise")] = True

    def images_asked(self) -> int:
        """The number of images that the request names; 0: one from each of those given."""
        return getattr(self, "n", 0) or getattr(self, "frames", 0)


def _field(f: Any) -> tuple[Any, Any]:
    """The pydantic field of an option; None where it is not given."""
    facts = f.metadata
    kind: Any = Literal[facts["choices"]] if facts["choices"] else type(f.default)
    bounds: dict[str, Any] = {"max_length": LONGEST_TEXT} if kind is str else {}
    if kind in (int, float):
        bounds = {name: facts[key] for name, key in (("ge", "low"), ("le", "high")) if facts[key] is not None}
    default = f.default if f.default != "" else "empty"
    text = f"{facts['help']} (default: {default})"
    return Annotated[kind, Field(**bounds)] | None, Field(default=None, description=text)


def _body(name: str, kind: type[Settings], options: tuple[str, ...], **own: Any) -> type[Body]:
    known = kind.options()
    fields: dict[str, Any] = {option: _field(known[option]) for option in options}
    return create_model(name, __base__=Body, __doc__=f"Options of {name}.", **own, **fields)


_n = (Annotated[int, Field(ge=1, le=MOST_SAMPLES, description="images to make")], 1)
_copies = (Copies, 0)
Sample = _body("Sample", ImageSampling, (*SAMPLER, "seeds"), n=_n)
Upscale = _body("Upscale", SuperResSampling, (*SAMPLER, *READING, "any_size"))
Inpaint = _body("Inpaint", Inpainting, (*SAMPLER, *READING, "jump_length", "resamplings"), n=_copies)
Vary = _body("Variations", Variations, (*SAMPLER, *READING, "strength"), n=_copies)
Interpolate = _body(
    "Interpolate",
    Interpolation,
    (*SAMPLER, *READING),
    frames=(Annotated[int, Field(ge=2, le=MOST_SAMPLES, description="images to make, both ends included")], 9),
    seeds=(
        Annotated[list[Annotated[int, Field(ge=0, le=10**18)]], Field(min_length=2, max_length=2)] | None,
        Field(default=None, description="numbers of two samples of the seed, instead of two images"),
    ),
)
Transform = _body(
    "Transform",
    Variations,
    (*SAMPLER, *READING),
    n=_copies,
    image_classes=(
        list[ClassName] | None,
        Field(default=None, max_length=MOST_CLASSES, description="the classes that the images have"),
    ),
)
EDITS: Mapping[str, type[Body]] = {
    "inpaint": Inpaint, "variations": Vary, "interpolate": Interpolate, "transform": Transform, "upscale": Upscale,
}  # fmt: skip


def options_of(body: Body) -> dict[str, Any]:
    """The sampling options that a request gives, by name."""
    common = {*Body.model_fields, *READING, "n", "frames"}
    return {name: value for name, value in body if name not in common and value is not None}
