"""Images in requests: forms with files, read by the project's own reader within a number of pixels."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import ValidationError
from starlette.requests import Request

from ...config import ReadingConfig
from ...data.given import as_pixels
from ...editing.masks import as_masks
from ...utils.images import as_shown, load
from .replies import Refused
from .schemas import READING, Body

if TYPE_CHECKING:
    from ..catalogue import ModelInfo

MOST_FILES = 257  # images and a mask
LONGEST_OPTIONS = 65_536  # bytes
PARTS = ("images", "mask", "options")


class Form(NamedTuple):
    """The parts of a request with images."""

    images: list[bytes]
    mask: bytes | None
    options: str  # JSON


async def read_form(request: Request) -> Form:
    """The parts of a form. Raises Refused, or starlette's HTTPException, for anything else."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, "send multipart/form-data: files named images, and options as JSON", "Content-Type")
    images: list[bytes] = []
    mask = options = None
    async with request.form(max_files=MOST_FILES, max_fields=len(PARTS), max_part_size=LONGEST_OPTIONS) as form:
        for name, value in form.multi_items():
            if name not in PARTS:
                raise Refused(422, f"a form has the parts {', '.join(PARTS)}, and no other", name[:80])
            if name != "images" and len(form.getlist(name)) > 1:
                raise Refused(422, f"{name} is given twice", name)
            if isinstance(value, str) != (name == "options"):
                raise Refused(422, "images and mask are files, options is a field with JSON", name)
            if isinstance(value, str):
                options = value
            elif name == "mask":
                mask = await value.read()
            else:
                images.append(await value.read())
    if options is None:
        raise Refused(422, "the form has no field options: JSON with the model's name", "options")
    return Form(images, mask, options)


def parse(kind: type[Body], text: str) -> Any:
    """The options of a form."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False, include_context=False)) from None


def invalid(problems: Any) -> Refused:
    """The reply to a body that does not fit: its first problem, never the value."""
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    status = 400 if first["type"] == "json_invalid" else 422
    text = "there is no such field: /docs lists all" if first["type"] == "extra_forbidden" else first["msg"]
    return Refused(status, text, where[:200] or None)


def decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """An image as viewers show it. Raises Refused for what is no image, or too large a one."""
    try:
        return as_shown(load(io.BytesIO(data), max_pixels)).image
    except Exception as error:  # Pillow raises many kinds for damaged files
        text = str(error).replace("--max_image_pixels", "the limit of")
        raise Refused(422, f"{name} cannot be read as an image: {text or type(error).__name__}", name) from None


def read_images(form: Form, info: ModelInfo, body: Body, max_pixels: int) -> np.ndarray | None:
    """The images of a form, uint8 [N, H, W, C], of the size that the model takes; None where there are none.

    For a thread: takes a while for large images.
    """
    if not form.images:
        return None
    left, pictures = max_pixels, []
    for i, data in enumerate(form.images):
        pictures.append(decode(data, f"images[{i}]", left))
        left -= pictures[-1].width * pictures[-1].height
    size = info.small_size or info.size
    wanted = None if getattr(body, "any_size", None) else f"{size[0]}x{size[1]}"
    return as_pixels(pictures, "images", wanted, info.channels, None, _reading(info, body)).arrays


def read_mask(form: Form, info: ModelInfo, body: Body, max_pixels: int) -> np.ndarray | None:
    """The mask of a form, bool [1, H, W], true where to paint; None where there is none."""
    if form.mask is None:
        return None
    return as_masks(decode(form.mask, "mask", max_pixels), info.size, [], _reading(info, body))


def _reading(info: ModelInfo, body: Body) -> ReadingConfig:
    """How the images become the model's: as the request says, else as in training."""
    return ReadingConfig(**{name: getattr(body, name) or getattr(info, name) for name in READING})
