"""PSNR and SSIM of super-resolution samples against the true images."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from PIL import Image

from .. import distributed
from ..config import UserError, one_line
from ..config.settings import SuperResSampling
from ..data.given import GivenImages, read_images
from ..logs import logger
from ..utils import files, images
from .metrics.paired import WINDOW, agreement, fits_window, load_torchmetrics

RESULT_FILE = "psnr_ssim.json"


def read_reference(settings: SuperResSampling, base: GivenImages) -> np.ndarray | None:
    """The true images of --reference, uint8 [N, H, W, C], one for each base image; None without it, and on ranks but 0.

    Raises UserError where the samples could not be compared with them. Collective.
    """
    found: list[np.ndarray] = []  # stays on rank 0, which alone compares
    if settings.base.reference:
        distributed.from_rank0(lambda: found.append(_read_matching(settings, base)))
    return found[0] if found else None


def _read_matching(settings: SuperResSampling, base: GivenImages) -> np.ndarray:
    try:
        load_torchmetrics()
    except ImportError as error:
        raise UserError(str(error)) from None
    reference, size = settings.base.reference, settings.model.large_size
    truth = read_images(
        "--reference",
        reference,
        "--large_size",
        size,
        settings.model.channels,
        None,
        settings.reading,
        exact_npz=True,
        enlarge=False,
    )
    if len(truth.arrays) != len(base.arrays):
        raise UserError(
            f"--reference {reference} has {len(truth.arrays)} images, but --base_samples "
            f"{settings.base.base_samples} has {len(base.arrays)}: give the true image of each, in the same order"
        )
    if truth.names != base.names:
        first, other = one_line(truth.names[0]), one_line(base.names[0])
        logger.log(f"--reference is matched in order: {first} is the truth of {other}, and so on")
    if not fits_window(truth.arrays.shape[1:3]):
        window = f"{WINDOW}x{WINDOW}"
        logger.warn(f"--large_size {size} is less than SSIM's window of {window}: PSNR only")
    return truth.arrays


def write_comparison(reference: str, out_dir: str, samples: str, base: np.ndarray, truth: np.ndarray) -> None:
    """psnr_ssim.json: the samples of an npz compared with the true images. For rank 0.

    :param reference: the path of the true images.
    """
    result = compare(images.load_npz(samples), base, truth)
    for line in describe(result):
        logger.log(line)
    path = files.join(out_dir, RESULT_FILE)
    content = {"reference": files.full_path(reference), **result}
    files.write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode())
    logger.log(f"wrote {path}")


# The comparison


def bicubic(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, h, w, C] enlarged to (height, width) by Pillow's bicubic filter, each channel by itself."""

    def enlarge(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC))

    channels = range(images.shape[-1])
    return np.stack([np.stack([enlarge(image[..., c]) for c in channels], axis=-1) for image in images])


def compare(samples: np.ndarray, base: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """PSNR and SSIM of samples, and of the base images enlarged by bicubic interpolation, as in psnr_ssim.json.

    Several samples of one image are averaged first, so that means and standard errors are over images; the error is
    None for a single image.
    :param samples: uint8 [N, H, W, C]; sample i was made from base image i mod M.
    :param base: uint8 [M, h, w, C]; :param truth: uint8 [M, H, W, C].
    """
    count = min(len(samples), len(truth))
    of_model, of_bicubic = agreement(samples, truth), agreement(bicubic(base[:count], truth.shape[1:3]), truth[:count])
    result: dict[str, Any] = {"n": count, "samples": len(samples)}
    plain: dict[str, Any] = {"identical": of_bicubic.identical}
    gain: dict[str, Any] = {}
    for name in ("psnr", "ssim"):
        ours, theirs = getattr(of_model, name), getattr(of_bicubic, name)
        if ours is None:
            result[name] = plain[name] = gain[name] = None
            continue
        by_image = np.bincount(np.arange(len(ours)) % len(truth), ours) / np.bincount(np.arange(len(ours)) % len(truth))
        result[name] = {**_mean(by_image), "values": ours.tolist()}
        plain[name] = {**_mean(theirs), "values": theirs.tolist()}
        gain[name] = _mean(by_image - theirs)
    return {**result, "identical": of_model.identical, "bicubic": plain, "gain": gain}


def _mean(values: np.ndarray) -> dict[str, float | None]:
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def describe(result: dict[str, Any]) -> list[str]:
    """The result of `compare` as text, a line for each measure."""
    n, lines = result["n"], []
    of_what = "a single image" if n == 1 else f"standard errors over {n} images"
    for name, digits, unit in (("psnr", 2, " dB"), ("ssim", 4, "")):
        if result[name] is None:
            lines.append(f"{name.upper()}: none, the images are smaller than its window of {WINDOW}x{WINDOW} pixels")
            continue
        ours, theirs, gain = (_shown(part[name], digits) for part in (result, result["bicubic"], result["gain"]))
        sign = "" if gain.startswith("-") else "+"
        lines.append(f"{name.upper()}: {ours}{unit}, bicubic {theirs}{unit}, gain {sign}{gain}{unit} ({of_what})")
    for what, part in (("samples", result), ("bicubic enlargements", result["bicubic"])):
        if part["identical"]:
            lines.append(f"{part['identical']} {what} equal the reference; each counts as if one byte were wrong by 1")
    return lines


def _shown(part: dict[str, Any], digits: int) -> str:
    error = part["standard_error"]
    return f"{part['mean']:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")
