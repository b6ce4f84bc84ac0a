"""The file of latents, the noise that leads to images: shared among ranks, resumable."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from .. import distributed
from ..config import SAMPLERS, UserError
from ..logs import logger
from ..logs.progress import Progress
from ..sampling.batches import Halving
from ..sampling.labels import Labels
from ..utils import files, images

FILE = "latents.npz"
PARTS_DIR = "latents"  # while they are being made
# The options, with their types, that decoding needs to go back by the steps of encoding.
STEP_OPTIONS = {"sampler": str, "steps": int, "timestep_grid": str, "timestep_respacing": str}


class Latents(NamedTuple):
    """Noise that leads to images."""

    arrays: np.ndarray  # float32 [N, C, H, W]
    labels: list[int] | None  # the classes that it was found with
    step_options: dict[str, Any]  # the values of STEP_OPTIONS that it was found with
    model: str  # SHA-256 sum of the checkpoint's file; "" where it is not known
    names: Sequence[str] | None = None  # of the images' files, without endings


def read_latents(path: str) -> Latents:
    """The latents.npz of `encode`. Raises UserError for a missing, damaged or hostile file."""
    step_options = read_step_options(path)
    found = images.read_npz(path, ("arr_0", "arr_1", "model", "names"))
    arrays, labels, names = found.get("arr_0"), found.get("arr_1"), found.get("names")
    if arrays is None or arrays.dtype != np.float32 or arrays.ndim != 4 or not len(arrays):
        held = "no arr_0" if arrays is None else f"arr_0 of {arrays.dtype} {arrays.shape}"
        raise UserError(f"--latents {path} has {held}: expected float32 [N, C, H, W], as encode writes it")
    if labels is not None and (labels.shape != arrays.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"--latents {path} has arr_1 of {labels.dtype} {labels.shape}: expected {len(arrays)} integers")
    if names is not None and (names.shape != arrays.shape[:1] or names.dtype.kind != "U"):
        raise UserError(f"--latents {path} has names of {names.dtype} {names.shape}: expected {len(arrays)} texts")
    if not np.isfinite(arrays).all():
        raise UserError(f"--latents {path} has numbers that are not finite: encode again")
    classes = None if labels is None else [int(y) for y in labels]
    kept = None if names is None else [str(name) for name in names]
    return Latents(arrays, classes, step_options, str(found.get("model", "")), kept)


def read_step_options(path: str) -> dict[str, Any]:
    """The step options of a latents.npz. Raises UserError for a missing, damaged or foreign file."""
    if not path:
        raise UserError(f"--latents is missing: name the {FILE} that encode wrote")
    if not files.exists(path):
        raise UserError(f"--latents {path} does not exist: encode writes it")
    found = images.read_npz(path, ("way",))
    try:
        options = files.parse_json(str(found["way"]), path) if "way" in found else {}
        wrong_type = any(type(value) is not STEP_OPTIONS[name] for name, value in options.items())
        if wrong_type or options.get("sampler", "auto") not in SAMPLERS:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--latents {path} does not say by which steps it was made: encode again") from None
    return options


def write_latents(
    invert: Callable[[list[int]], np.ndarray],
    *,
    out_dir: str,
    count: int,
    shape: tuple[int, ...],
    batch_size: int,
    labels: Labels | None,
    step_options: Mapping[str, Any],
    model: str,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Make the latents 0..count-1, float32 [N, C, H, W], and latents.npz of them. Collective.

    Latents that an interrupted run left are kept; the folder must be claimed, and hold nothing of another request.
    :param invert: image numbers -> their latents; each rank calls it with its share.
    :param shape: (C, H, W) of a latent.
    :param step_options: the values of STEP_OPTIONS.
    :param model: SHA-256 sum of the checkpoint's file.
    :param names: of the images' files, without endings.
    """
    path, parts = files.join(out_dir, FILE), files.join(out_dir, PARTS_DIR)
    if not distributed.from_rank0(files.exists, path):
        missing = distributed.from_rank0(_missing, parts, count, shape)
        bar = Progress("encoding", count, "image", initial=count - len(missing))
        try:
            with closing(bar):
                _make_missing(Halving(invert), missing, batch_size, parts, bar)
        except KeyboardInterrupt:
            saved = f"{bar.done} of {count} latents are in {parts}; rerun the same command to continue"
            raise KeyboardInterrupt(saved) from None
        distributed.from_rank0(_join, path, parts, count, labels, step_options, model, names)
    return distributed.from_rank0(read_latents, path).arrays


def _make_missing(
    invert: Callable[[list[int]], np.ndarray], missing: list[int], batch_size: int, parts: str, bar: Progress
) -> None:
    """Make the missing latents, a batch on each rank at a time; rank 0 writes them. Collective."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    for start in range(0, len(missing), batch_size * world_size):
        chunk = missing[start : start + batch_size * world_size]
        mine = chunk[rank * batch_size : (rank + 1) * batch_size]
        gathered = distributed.all_gather_object(invert(mine) if mine else None)
        if rank == 0:
            for i, latent in zip(chunk, np.concatenate([part for part in gathered if part is not None])):
                buffer = io.BytesIO()
                np.save(buffer, latent, allow_pickle=False)
                files.write_bytes(_part(parts, i), buffer.getvalue(), durable=False)
        bar.update(len(chunk))


def _part(parts: str, i: int) -> str:
    return files.join(parts, f"{i:06d}.npy")


def _load(path: str) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(files.read_bytes(path)), allow_pickle=False)


def _missing(parts: str, count: int, shape: tuple[int, ...]) -> list[int]:
    """The numbers of the latents that are not there yet, or damaged."""
    files.make_dirs(parts)
    files.remove_leftovers(parts)

    def whole(i: int) -> bool:
        try:
            latent = _load(_part(parts, i))
            return latent.shape == shape and latent.dtype == np.float32 and bool(np.isfinite(latent).all())
        except Exception:  # numpy raises many kinds for damaged files
            return False

    missing = [i for i in range(count) if not whole(i)]
    if len(missing) < count:
        logger.log(f"{count - len(missing)} of {count} latents are already in {parts}")
    return missing


def _join(
    path: str,
    parts: str,
    count: int,
    labels: Labels | None,
    step_options: Mapping[str, Any],
    model: str,
    names: Sequence[str] | None,
) -> None:
    """Write latents.npz from all parts, and remove them."""
    paths = [_part(parts, i) for i in range(count)]
    arrays = {"arr_0": np.stack([_load(part) for part in paths]), "way": np.array(json.dumps(dict(step_options)))}
    arrays["model"] = np.array(model)
    if names:
        arrays["names"] = np.array(names)
    if labels:
        arrays["arr_1"] = np.array([labels.index(i) for i in range(count)], np.int64)
    with files.open_write(path) as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]
    for part in paths:
        files.remove(part)
    os.rmdir(parts)
    logger.log(f"wrote {path}: {count} latents")
