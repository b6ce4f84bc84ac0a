"""--cache: whether a run takes its images from a packed cache, and which."""

from __future__ import annotations

import math
import os

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..utils import files
from ..utils.downloads import cache_dir
from .dataset import MAX_CHECKED, ImageDataset
from .packed import CacheError, Place, free_bytes
from .packing import on_all_ranks, pack
from .store import PixelStore

AUTO, OFF = "auto", "off"
MIN_EPOCHS = 2  # of a run for which `auto` packs its images
MAX_SHARE = 0.25  # of the free disk that `auto` takes


def use_cache(dataset: ImageDataset, option: str, data_dir: str, epochs: float = math.inf, build: bool = True) -> None:
    """Let a data set take its images from the cache that --cache says. Collective.

    Where the cache is not there yet, all ranks pack it, see `packing.pack`.
    :param option: a folder, `auto` or `off`.
    :param data_dir: what the data set was opened from.
    :param epochs: how often the run will read each image.
    :param build: False: use a cache that is there, but make none.
    Raises UserError where there can be no cache, unless the option is `auto`: then the log says so.
    """
    try:
        place = distributed.from_rank0(_place, dataset, option, data_dir, epochs)
        if place is None:
            return
        if not distributed.from_rank0(_is_there, place):
            if not build:
                return
            pack(dataset, place)
        dataset.store = on_all_ranks(_open, place)
    except CacheError as error:
        if option != AUTO:
            raise
        logger.warn(f"the images are not packed, so they are read from their files in each epoch: {error}")
        return
    packed = f"{place.pixels} ({place.bytes / 2**30:.3g} GiB)"
    logger.log(f"{data_dir}: the pixels of {len(dataset):,} images come from {packed}")


def _place(dataset: ImageDataset, option: str, data_dir: str, epochs: float) -> Place | None:
    """Where the cache is, or is to be; None for none."""
    if option == OFF or (dataset.store is not None and dataset.store.done is not None):
        return None
    if dataset.reading.resize_mode == "random_crop":
        if option == AUTO:
            return None
        raise CacheError(
            f"--cache {option} keeps the pixels of each image, but --resize_mode random_crop cuts out others in each "
            "epoch: give --cache off, or another --resize_mode"
        )
    if option == AUTO and _stays_in_memory(dataset):
        return None
    if files.is_url(option):
        raise CacheError(f"--cache {option} must be a local folder: it is mapped into memory")
    place = Place(_own_folder() if option == AUTO else os.path.abspath(option), dataset, data_dir)
    if option == AUTO and epochs < MIN_EPOCHS and not os.path.isdir(place.folder):
        return None
    try:
        place.look_at(dataset.source)
    except UserError as error:
        raise CacheError(f"--cache {option}: {error}, or give --cache {OFF}") from None
    if option == AUTO and not _is_there(place):
        if epochs < MIN_EPOCHS:
            return None
        _check_share(place)
    return place


def _own_folder() -> str:
    try:
        return str(cache_dir() / "pixels")
    except RuntimeError as error:  # a user without a home
        raise CacheError(f"--cache {AUTO}: {error}") from None


def _stays_in_memory(dataset: ImageDataset) -> bool:
    """Whether a data set is in memory once it has been checked."""
    return dataset.store is not None and len(dataset) <= MAX_CHECKED


def _check_share(place: Place) -> None:
    """Raise CacheError where the cache would take too much of the disk to make it unasked."""
    free = free_bytes(place.folder)
    if place.bytes > MAX_SHARE * free:
        raise CacheError(
            f"they would take {place.bytes / 2**30:.3g} GiB of {free / 2**30:.3g} GiB free in {place.folder}: "
            f"--cache DIR packs them elsewhere, --cache {OFF} is silent"
        )


def _is_there(place: Place) -> bool:
    return place.find()[0] is not None


def _open(place: Place) -> PixelStore:
    store, reason = place.find()
    if store is None:
        raise CacheError(
            f"{reason or f'{place.folder} is not there'}, as rank {distributed.get_rank()} sees it: --cache must be a "
            f"folder that all hosts share, or --cache {OFF}"
        )
    return store
