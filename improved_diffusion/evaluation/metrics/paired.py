"""PSNR and SSIM of images against true images, image by image."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th

PEAK = 255.0  # of a byte
WINDOW = 11  # pixels: the side of SSIM's Gaussian window
PIXELS = 2**20  # compared at once


class Agreement(NamedTuple):
    """PSNR and SSIM of N images against the true ones."""

    psnr: np.ndarray  # [N], in dB
    ssim: np.ndarray | None  # [N], at most 1; None for images smaller than the window
    identical: int  # images that equal the true one in every byte


def load_torchmetrics() -> Any:
    """torchmetrics' functions for images. Raises ImportError, with the remedy, where they cannot be imported."""
    try:
        from torchmetrics.functional import image
    except (ImportError, RuntimeError) as error:
        if (getattr(error, "name", "") or "").split(".")[0] == "torchmetrics":
            raise ImportError("PSNR and SSIM need the package torchmetrics: pip install -e '.[eval]'") from None
        # It imports others where they are installed, such as torchvision, which may be made for another torch.
        raise ImportError(
            f"PSNR and SSIM need torchmetrics, which cannot be imported ({error}): fix or remove the package that "
            "fails, or pip install -e '.[eval]' into a new environment"
        ) from None
    return image


def agreement(images: np.ndarray, truth: np.ndarray) -> Agreement:
    """Compare image i with true image i mod M; both uint8, [N, H, W, C] and [M, H, W, C]. Raises ValueError for others.

    Identical images, whose PSNR is infinite, count as if one byte were wrong by one: the largest finite value.
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
    # Wang et al. 2004, eq. 13. The mean of the map is taken here: with the mirrored borders, as in new versions of
    # torchmetrics; older ones leave the borders out.
    _, values = metrics.structural_similarity_index_measure(
        *(tensor.float() for tensor in pair), data_range=PEAK, reduction="none", return_full_image=True
    )
    return psnr.numpy(), values.double().mean(dim=(1, 2, 3)).numpy()
