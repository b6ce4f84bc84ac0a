"""Options of reading images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Config, extra
from .messages import UserError
from .values import plain_text

RESIZE_MODES = ("crop", "random_crop", "pad", "stretch")
MAX_IMAGE_PIXELS = 300_000_000  # admits scans and phone photographs of 200 megapixels; 1.2 GB when decoded


def colour_name(value: Any) -> str:
    """The name of a colour, or #rrggbb."""
    from PIL import ImageColor  # not needed before options are read

    text = plain_text(value)
    try:
        if len(ImageColor.getrgb(text)) == 3:  # a fourth number is an alpha
            return text
    except ValueError:
        pass
    raise ValueError("expected a colour such as white or #ff8000")


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Config):
    """Reading images."""

    resize_mode: str = extra(
        "crop",
        "how an image gets the model's size: crop (cut off edges), random_crop (a random part, new each epoch), "
        "pad (on the background) or stretch (change the aspect ratio)",
        choices=RESIZE_MODES,
    )
    background: str = extra(
        "white",
        "colour behind transparent pixels and around padded images: a name, or #rrggbb",
        parse=colour_name,
    )
    max_image_pixels: int = extra(
        MAX_IMAGE_PIXELS, "larger images count as unreadable; decoding takes about 4 bytes per pixel", low=1
    )
    published_decoding: bool = extra(
        False,
        "decode as the published code does: ignore the EXIF orientation, drop alpha channels, resize palette images by "
        "nearest neighbour; RGB only",
    )

    def validate(self) -> None:
        names = ("resize_mode", "background")
        changed = [name for name in names if getattr(self, name) != getattr(ReadingConfig, name)]
        if self.published_decoding and changed:
            raise UserError(
                f"--published_decoding True contradicts --{changed[0]} {getattr(self, changed[0])}: the published code "
                "has no such option"
            )
