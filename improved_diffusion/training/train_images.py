"""train_images.png: training images as the network sees them."""

from __future__ import annotations

import numpy as np
import torch as th

from ..config import UserError
from ..data.stream import BatchStream
from ..logs import logger
from ..utils import files, images

FILE = "train_images.png"
SHOWN = 64
MAX_PIXELS = 2**24  # of the whole grid; larger images are fewer


def write_train_images(data: BatchStream, out_dir: str) -> None:
    """A grid of the first images of the run, unless the folder has one. What goes wrong is a warning. For rank 0.

    An image is a function of its position in the order, so reading it here changes nothing for training.
    """
    path = files.join(out_dir, FILE)
    try:
        if files.exists(path):
            return
        shown = first_images(data)
        images.save_grid(path, shown)
        logger.log(f"wrote {path}: {len(shown)} training images as the network sees them")
    except Exception as error:  # no picture is worth a run
        logger.warn(f"no {path}: {error}")


def first_images(data: BatchStream) -> np.ndarray:
    """The first images of the order, uint8 [N, H, W, C]."""
    height, width = data.stream.dataset.resolution
    count = min(SHOWN, data.num_images, max(1, MAX_PIXELS // (height * width)))
    batch = data.stream.__getitems__(range(count))
    if isinstance(batch, UserError):
        raise batch
    if batch.images.dtype == th.uint8:
        return batch.images.permute(0, 2, 3, 1).numpy()
    return images.to_uint8(batch.images + 0.5 / 127.5)  # to_uint8 truncates
