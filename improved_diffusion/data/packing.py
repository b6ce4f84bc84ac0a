"""Writes the packed cache: all ranks together, each with worker processes, in parts that count once they are on disk.

A run that is killed leaves the parts that it has finished, and the next one goes on from them. A second run that starts
meanwhile waits, and uses the same cache.
"""

from __future__ import annotations

import copy
import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from ..utils import files
from .dataset import MAX_CHECKED, ImageDataset, check_images, max_unreadable, quiet
from .packed import ABOUT, PACKING, CacheError, Place, advice, free_bytes, storage_error
from .workers import BatchReader, workers_for_cores

PART = 256  # images
T = TypeVar("T")
_NO_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def pack(dataset: ImageDataset, place: Place) -> None:
    """Write the cache, unless another run does it meanwhile. Collective.

    Raises CacheError where it cannot be written, and UserError for more unreadable images than may be skipped; then
    nothing of it is left.
    """
    if len(dataset) > MAX_CHECKED:  # before the work of reading all of them
        distributed.from_rank0(check_images, dataset)
    with ExitStack() as until_packed:
        distributed.from_rank0(_claim, until_packed, place)
        try:
            todo = distributed.from_rank0(_prepare, place)
            if todo is None:
                return
            parts = on_all_ranks(_Parts, dataset, place)
            on_all_ranks(_write_parts, parts, todo)
            distributed.from_rank0(_finish, dataset, place)
        except UserError:
            with suppress(UserError):
                distributed.from_rank0(place.clear)
            raise


def on_all_ranks(function: Callable[..., T], *args: Any) -> T:
    """Call function(*args) on each rank; if one raises UserError, all ranks do. Collective."""
    result, problem = None, None
    try:
        result = function(*args)
    except UserError as error:
        problem = error
    for other in distributed.all_gather_object(problem):
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def _claim(until_packed: ExitStack, place: Place) -> None:
    """Hold the cache's folder, which is made, for this run alone."""

    def say() -> None:
        logger.log(f"another run is packing the same images into {place.folder}: waiting for it")

    try:
        os.makedirs(place.folder, exist_ok=True)
    except OSError as error:
        raise storage_error(place, error) from None
    try:
        until_packed.enter_context(files.lock(place.folder, on_wait=say))
    except UserError as error:
        raise CacheError(error) from None


def _prepare(place: Place) -> list[int] | None:
    """The numbers of the parts that are to be written, into a file that is there; None where all is done."""
    store, reason = place.find()
    if store is not None:
        return None
    if reason:
        logger.warn(f"{reason}: packing them again")
    count = -(-place.shape[0] // PART)
    done = _records(place) if _goes_on(place) else {}
    if not done:
        try:
            place.clear()
            _reserve(place)
        except OSError as error:
            raise storage_error(place, error) from None
        _write_json(place, PACKING, {"identity": place.identity, "part": PART})
    already = f" ({len(done):,} of {count:,} parts are there)" if done else ""
    where = f"{place.data_dir} into {place.folder}{already}"
    logger.log(f"packing {place.shape[0]:,} images of {where}; --cache off starts without")
    return [part for part in range(count) if part not in done]


def _goes_on(place: Place) -> bool:
    """Whether a run has left parts of this very cache."""
    if not os.path.exists(place.file(PACKING)):
        return False
    with suppress(UserError, OSError, ValueError):
        place.offset()
        return files.read_json(place.file(PACKING)) == {"identity": place.identity, "part": PART}
    return False


def _reserve(place: Place) -> None:
    """Make the file of pixels at its full length. Raises OSError where the disk has no space for it."""
    if place.bytes > free_bytes(place.folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with open(place.pixels, "xb") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": place.shape}
        np.lib.format.write_array_header_1_0(f, header)
        length = f.tell() + place.bytes
        f.truncate(length)
        if hasattr(os, "posix_fallocate"):  # else a full disk is noticed when it is full
            try:
                os.posix_fallocate(f.fileno(), 0, length)
            except OSError as error:
                if error.errno not in _NO_RESERVE:
                    raise


def _write_json(place: Place, name: str, content: dict[str, Any]) -> None:
    try:
        files.write_bytes(place.file(name), json.dumps(content).encode(), advice=advice(place))
    except UserError as error:
        raise CacheError(error) from None


# Parts


def _images_of(part: int, count: int) -> range:
    return range(part * PART, min((part + 1) * PART, count))


class _Parts(Dataset):
    """Parts of the file: to get one is to read its images and to write them."""

    def __init__(self, dataset: ImageDataset, place: Place):
        self.dataset, self.place = copy.copy(dataset), place
        self.dataset.store = None
        try:
            self.offset = place.offset()
        except (OSError, ValueError) as error:
            who = f"rank {distributed.get_rank()}"
            raise CacheError(
                f"{who} cannot open {place.pixels} ({error}): --cache must be a folder that all hosts share"
            ) from None

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """What became of each part, see `_write`. An error is returned, as by a stream of batches."""
        try:
            return [self._write(part) for part in numbers]
        except OSError as error:
            return [storage_error(self.place, error)]

    def _write(self, part: int) -> dict[str, Any]:
        """Write a part; when this returns, it is on disk."""
        row = self.place.bytes // self.place.shape[0]
        done: Counter[str] = Counter()
        missing: dict[int, str] = {}
        indices = _images_of(part, len(self.dataset))
        with open(self.place.pixels, "r+b") as f, quiet():
            f.seek(self.offset + indices.start * row)
            for i in indices:
                try:
                    array, what = self.dataset.prepare(i)
                except UserError as error:
                    missing[i] = str(error)
                    f.seek(row, os.SEEK_CUR)
                else:
                    f.write(array.tobytes())
                    done.update(what)
            f.flush()
            os.fsync(f.fileno())
        return {"part": part, "missing": missing, "done": dict(done)}


def _write_parts(parts: _Parts, todo: Sequence[int]) -> None:
    """Write this rank's share of the parts."""
    rank, world_size, total = distributed.get_rank(), distributed.get_world_size(), len(parts.dataset)
    mine = todo[rank::world_size]
    left = sum(len(_images_of(part, total)) for part in todo)
    reader = BatchReader(parts, partial(_numbers, mine), _first, workers_for_cores(), 2**10)
    with closing(reader), closing(Progress("packing images", total, "image", total - left)) as bar:
        for part in mine:
            with distributed.working("the next images to be packed"):
                record = next(reader)
            if isinstance(record, UserError):
                raise record
            _note(parts.place, rank, record)
            # The other ranks keep pace with this one.
            bar.update(min(world_size * len(_images_of(part, total)), total - bar.done))


def _note(place: Place, rank: int, record: dict[str, Any]) -> None:
    """Note that a part is finished."""
    try:
        with open(place.file(f"parts-{rank}.jsonl"), "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as error:
        raise storage_error(place, error) from None


def _numbers(parts: Sequence[int], step: int) -> list[int]:
    """The part of a step; none after the last."""
    return list(parts[step : step + 1])


def _first(records: Sequence[Any]) -> Any:
    return records[0] if records else None


def _records(place: Place) -> dict[int, dict[str, Any]]:
    """What is known of the finished parts, by their numbers."""
    found: dict[int, dict[str, Any]] = {}
    for name in sorted(os.listdir(place.folder)):
        if name.startswith("parts-"):
            with open(place.file(name)) as f:
                for line in f:
                    with suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be cut off
                        record = json.loads(line)
                        found[record["part"]] = record
    return found


def _finish(dataset: ImageDataset, place: Place) -> None:
    """Declare the file complete. Raises UserError where more images are missing than may be skipped."""
    records = _records(place).values()
    missing = {int(i): why for record in records for i, why in record["missing"].items()}
    if len(missing) > max_unreadable(len(dataset)):
        first = "; ".join(list(missing.values())[:3])
        raise UserError(f"{len(missing)} of {len(dataset)} images cannot be used: {first}: repair or remove them")
    done: Counter[str] = Counter()
    for record in records:
        done.update(record["done"])
    about = {"identity": place.identity, "missing": sorted(missing), "done": dict(done.most_common())}
    _write_json(place, ABOUT, about)
    for name in os.listdir(place.folder):
        if name == PACKING or name.startswith("parts-"):
            files.remove(place.file(name))
