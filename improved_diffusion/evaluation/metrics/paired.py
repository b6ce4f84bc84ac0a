"""PSNR and SSIM: how near images come to the true ones, image by image, with plain enlargement as a yardstick."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th

from ...config import UserError

PEAK = 255.0  # of a byte
WINDOW = 11  # pixels: the side of SSIM's Gaussian window
PIXELS = 2**20  # that are compared at once


class Agreement(NamedTuple):
    """How near each of N images comes to the true one."""

    psnr: np.ndarray  # [N], in dB
    ssim: np.ndarray | None  # [N], at most 1; None for images smaller than the window
    identical: int  # images that equal the true one in every byte


def load_torchmetrics() -> Any:
    """torchmetrics' functions for images. Raises UserError where they cannot be imported."""
    try:
        from torchmetrics.functional import image
    except (ImportError, RuntimeError) as error:
        if (getattr(error, "name", "") or "").split(".")[0] == "torchmetrics":
            raise UserError("PSNR and SSIM need the package torchmetrics: pip install -e '.[eval]'") from None
        # It imports others where they are installed, such as torchvision, which may be made for another torch.
        raise UserError(
            f"PSNR and SSIM need torchmetrics, which cannot be imported ({error}): mend or remove the package that it "
            "fails in, or pip install -e '.[eval]' into a new environment"
        ) from None
    return image


def agreement(images: np.ndarray, truth: np.ndarray) -> Agreement:
    """Compare image i with true image i mod M; both uint8, [N, H, W, C] and [M, H, W, C]. Raises ValueError for others.

    Identical images, whose PSNR is infinite, count as if one byte were wrong by one: the most that others can have.
    """
    if images.shape[1:] != truth.shape[1:] or {images.dtype, truth.dtype} != {np.dtype(np.uint8)}:
        raise ValueError(f"{images.dtype} {images.shape} cannot be compared with {truth.dtype} {truth.shape}")
    step = max(1, PIXELS // truth[0].size)
    parts = []
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        parts.append(_compare(batch, truth[np.arange(start, start + len(batch)) % len(truth)]))
    psnr = np.concatenate([psnr for psnr, _ in parts])
    identical = np.isinf(psnr)
    psnr[identical] = 10 * math.log10(PEAK**2 * truth[0].size)
    ssim = np.concatenate([ssim for _, ssim in parts]) if fits_window(truth.shape[1:3]) else None
    return Agreement(psnr, ssim, int(identical.sum()))


def fits_window(size: tuple[int, ...]) -> bool:
    """Whether images of (height, width) are large enough for SSIM."""
    return min(size) >= WINDOW


def _compare(images: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(PSNR, SSIM) [N] each, float64; SSIM is empty for images smaller than the window."""
    metrics = load_torchmetrics()
    pair = [th.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in (images, truth)]
    x, y = (tensor.double() for tensor in pair)
    psnr = metrics.peak_signal_noise_ratio(x, y, data_range=PEAK, reduction="none", dim=(1, 2, 3))
    if not fits_window(truth.shape[1:3]):
        return psnr.numpy(), np.empty(0)
    # Wang et al. 2004, eq. 13. Of the map we take the mean ourselves: it includes the borders, mirrored, as in new
    # versions of torchmetrics; older ones leave them out.
    _, values = metrics.structural_similarity_index_measure(
        *(tensor.float() for tensor in pair), data_range=PEAK, reduction="none", return_full_image=True
    )
    return psnr.numpy(), values.double().mean(dim=(1, 2, 3)).numpy()


def bicubic(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, h, w, C] enlarged to (height, width) by Pillow's bicubic filter, each channel on its own."""
    from PIL import Image

    def enlarge(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC))

    channels = range(images.shape[-1])
    return np.stack([np.stack([enlarge(image[..., c]) for c in channels], axis=-1) for image in images])


def compare(samples: np.ndarray, base: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """How near samples, and the enlarged base images, come to the true images: what `write` writes.

    Several samples of one image are averaged first, so that means and standard errors are over images; an error is
    None for a single one.
    :param samples: uint8 [N, H, W, C], of which number i was made from base image i mod M.
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
    """A line for each measure of what `compare` found."""
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
