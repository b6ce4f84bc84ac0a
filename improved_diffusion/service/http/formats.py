"""Images as replies: JSON with base64, a zip of PNGs, one PNG, or an npz."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from typing import NamedTuple

import numpy as np

from ...sampling.images import Images
from ...utils.images import encode_png
from .replies import Refused

FORMATS = {"json": "application/json", "zip": "application/zip", "png": "image/png", "npz": "application/x-npz"}


class Encoded(NamedTuple):
    """A reply's body."""

    body: bytes
    media_type: str
    file_name: str = ""  # that browsers save it under; "" for none


def choose(wanted: str | None, accept: str, count: int) -> str:
    """The format that a client asks for: by name, else by its Accept header, else json.

    Raises Refused for a header that allows none, and for several images as one PNG.
    """
    chosen = wanted or _accepted(accept)
    if chosen is None:
        raise Refused(406, f"Accept allows none of {', '.join(FORMATS.values())}", "Accept")
    if chosen == "png" and count != 1:
        raise Refused(422, f"format png is for one image, not {count}: ask for zip, npz or json", "format")
    return chosen


def _accepted(accept: str) -> str | None:
    """The first format of an Accept header, whose types are taken in their order; json where any will do."""
    types = [part.partition(";")[0].strip().lower() for part in accept.split(",") if part.strip()]
    for each in types:
        if each in ("*/*", "application/*"):
            return "json"
        if each == "image/*":
            return "png"
        for name, media_type in FORMATS.items():
            if each == media_type:
                return name
    return None if types else "json"


def encode(images: Images, name: str) -> Encoded:
    """The images in one of FORMATS. May take a while: for a thread."""
    if name == "png":
        return Encoded(encode_png(images.array[0]), FORMATS[name], images.file_names()[0])
    if name == "zip":
        return Encoded(_zip(images), FORMATS[name], "samples.zip")
    if name == "npz":
        return Encoded(_npz(images), FORMATS[name], f"samples_{'x'.join(map(str, images.array.shape))}.npz")
    return Encoded(json.dumps({"images": as_json(images)}).encode(), FORMATS[name])


def as_json(images: Images) -> list[dict[str, object]]:
    """For each image its file name, number, class and the PNG in base64."""
    rows: list[dict[str, object]] = []
    for i, (name, array) in enumerate(zip(images.file_names(), images.array)):
        row: dict[str, object] = {"name": name}
        if images.numbers is not None:
            row["number"] = int(images.numbers[i])
        if images.labels is not None:
            label = int(images.labels[i])
            row["label"] = label
            row["class"] = images.class_names[label] if images.class_names else str(label)
        rows.append({**row, "png": base64.b64encode(encode_png(array)).decode()})
    return rows


def _zip(images: Images) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: PNGs are compressed
        for name, array in zip(images.file_names(), images.array):
            archive.writestr(name, encode_png(array))
    return buffer.getvalue()


def _npz(images: Images) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images.array, *([] if images.labels is None else [images.labels]))
    return buffer.getvalue()
