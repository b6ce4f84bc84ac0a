"""PSNR and SSIM of super-resolution's samples against the true images, where those are known."""

from __future__ import annotations

import json

import numpy as np

from .. import distributed
from ..config import UserError
from ..config.settings import SuperResSampling
from ..data.given import GivenImages, read_images
from ..logs import logger
from ..utils import files, images
from .metrics import paired

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
    paired.load_torchmetrics()
    reference, size = settings.base.reference, settings.model.large_size
    truth = read_images(
        "--reference", reference, "--large_size", size, settings.model.channels, None, exact_npz=True, enlarge=False
    )
    if len(truth.arrays) != len(base.arrays):
        raise UserError(
            f"--reference {reference} has {len(truth.arrays)} images, but --base_samples "
            f"{settings.base.base_samples} has {len(base.arrays)}: give the true image of each, in the same order"
        )
    if truth.names != base.names:
        logger.log(f"--reference is matched in order: {truth.names[0]} is the truth of {base.names[0]}, and so on")
    if not paired.fits_window(truth.arrays.shape[1:3]):
        window = f"{paired.WINDOW}x{paired.WINDOW}"
        logger.warn(f"--large_size {size} is less than SSIM's window of {window}: PSNR only")
    return truth.arrays


def write_comparison(reference: str, out_dir: str, samples: str, base: np.ndarray, truth: np.ndarray) -> None:
    """psnr_ssim.json: the samples of an npz compared with the true images. For rank 0.

    :param reference: the path of the true images.
    """
    result = paired.compare(images.load_npz(samples)["arr_0"], base, truth)
    for line in paired.describe(result):
        logger.log(line)
    path = files.join(out_dir, RESULT_FILE)
    content = {"reference": files.full_path(reference), **result}
    files.write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode())
    logger.log(f"wrote {path}")
