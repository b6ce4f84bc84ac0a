"""Super-resolution's samples beside the true images, where those are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..utils import files, images
from .metrics import paired

RESULT_FILE = "psnr_ssim.json"


def read_reference(options: Any, base: Any, read: Callable[[], Any]) -> np.ndarray | None:
    """The true images of --reference, uint8 [N, H, W, C], one for each base image; None without it, and beside rank 0.

    :param base: the GivenImages of --base_samples.
    :param read: gives those of --reference, at --large_size.
    Raises UserError where the samples could not be compared with them. Collective.
    """
    found: list[np.ndarray] = []  # stays on rank 0, which alone compares
    if options.reference:
        distributed.from_rank0(lambda: found.append(_read_matching(options, base, read)))
    return found[0] if found else None


def _read_matching(options: Any, base: Any, read: Callable[[], Any]) -> np.ndarray:
    paired.load_torchmetrics()
    truth = read()
    if len(truth.arrays) != len(base.arrays):
        raise UserError(
            f"--reference {options.reference} has {len(truth.arrays)} images, but --base_samples "
            f"{options.base_samples} has {len(base.arrays)}: give the true image of each, in the same order"
        )
    if truth.names != base.names:
        logger.log(f"--reference is matched in order: {truth.names[0]} is the truth of {base.names[0]}, and so on")
    if not paired.fits_window(truth.arrays.shape[1:3]):
        size = f"{paired.WINDOW}x{paired.WINDOW}"
        logger.warn(f"--large_size {options.large_size} is less than SSIM's window of {size}: PSNR only")
    return truth.arrays


def write_comparison(options: Any, out_dir: str, samples: str, base: np.ndarray, truth: np.ndarray) -> None:
    """psnr_ssim.json: the samples of an npz compared with the true images. For rank 0."""
    result = paired.compare(images.load_npz(samples)["arr_0"], base, truth)
    for line in paired.describe(result):
        logger.log(line)
    path = files.join(out_dir, RESULT_FILE)
    paired.write(path, {"reference": files.full_path(options.reference), **result})
    logger.log(f"wrote {path}")
