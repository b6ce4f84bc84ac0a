"""Many samples to disk: shared among ranks, resumable."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..config import UserError, one_line
from ..data.low_res import pairs
from ..logs import logger
from ..logs.progress import Progress
from ..utils import files, images
from .batches import Halving
from .labels import Labels
from .names import ByNumber, FileNames

REQUEST_FILE = "samples.json"
PNG_DIR = "samples"
SHOWN = 100  # images in the grid
SHOWN_STEPS = 8  # images whose steps are shown
HELD_FRAMES = 10
SHOWN_CHARACTERS = 100  # of a value in a message
WRITERS = 4  # threads on each rank


def last_images(steps: Iterable[Mapping[str, th.Tensor]]) -> np.ndarray:
    """The last samples of a progressive sampling loop, uint8 [N, H, W, C]. Raises UserError for non-finite pixels."""
    for out in steps:
        sample = out["sample"]
    if not sample.isfinite().all():
        raise UserError(
            "the samples have pixels that are not finite numbers: the checkpoint is damaged, or training diverged, or "
            "its activations overflow in --precision fp16"
        )
    return images.to_uint8(sample)


def write_steps(
    trajectory: Callable[[list[int]], Iterator[Mapping[str, Any]]],
    out_dir: str,
    numbers: Sequence[int],
    steps: int,
    count: int,
) -> None:
    """Write steps.png and steps.gif: `count` of the predictions of x_0 while the first samples are made. Collective.

    :param trajectory: sample numbers -> a progressive sampling loop with `steps` predictions; the samples are drawn
        again, shared among the ranks.
    :param numbers: of the samples, at most one batch.
    """
    if not count:
        return
    chosen = sorted({round((steps - 1) * (k + 1) / count) for k in range(count)} if count < steps else range(steps))
    shown = list(numbers)[:SHOWN_STEPS]
    mine = shown[distributed.get_rank() :: distributed.get_world_size()]
    parts = distributed.all_gather_object(_steps_of(trajectory, mine, chosen) if mine else None)
    # Rank r has drawn samples r, r + ranks, r + 2 ranks, ...
    rows = [parts[i % len(parts)][i // len(parts)] for i in range(len(shown))]
    distributed.from_rank0(_save_steps, out_dir, np.stack(rows))


def _steps_of(trajectory: Any, numbers: list[int], chosen: Sequence[int]) -> np.ndarray:
    """uint8 [N, K, H, W, C]: the chosen predictions of x_0, counted from 0 without the steps that only add noise."""
    predictions = (out["pred_xstart"] for out in trajectory(numbers) if out["pred_xstart"] is not None)
    wanted = set(chosen)
    return np.stack([images.to_uint8(x0) for k, x0 in enumerate(predictions) if k in wanted], axis=1)


def _save_steps(out_dir: str, rows: np.ndarray) -> None:
    strip, gif = files.join(out_dir, "steps.png"), files.join(out_dir, "steps.gif")
    images.save_strip(strip, rows)
    frames = [images.grid(rows[:, k], min_side=images.SHOWN_SIDE) for k in range(rows.shape[1])]
    images.save_gif(gif, np.stack([*frames, *[frames[-1]] * HELD_FRAMES]))  # time to see the result
    logger.log(f"wrote {strip} and {gif}: {rows.shape[1]} steps to the first {len(rows)} samples")


def write_samples(
    draw: Callable[[list[int]], np.ndarray],
    *,
    out_dir: str,
    numbers: Sequence[int],
    batch_size: int,
    labels: Labels | None,
    request: Mapping[str, Any],
    beside: Callable[[int], np.ndarray | None] | None = None,
    names: FileNames | None = None,
) -> str:
    """Make the samples with these numbers: PNGs as they come, then the npz and a grid. Collective.

    Returns the npz's path.

    Samples that an interrupted run with the same request left behind are kept, but for damaged ones. No more than two
    batches of images, or those of the grid, are held in memory.
    :param draw: sample numbers -> uint8 [N, H, W, C]; each rank calls it with its share, or with parts of it where an
        accelerator's memory is too small.
    :param request: what the samples depend on; a folder that holds samples of another request raises UserError.
    :param beside: an image [h, w, C] to show beside sample i in the grid.
    :param names: of the PNGs; by number and class unless given.
    """
    names = names or ByNumber(labels)
    missing = distributed.from_rank0(_prepare, out_dir, numbers, dict(request), names)
    _check_shared(out_dir)
    png_dir = files.join(out_dir, PNG_DIR)
    done = len(numbers) - len(missing)
    if done:
        logger.log(f"{done} of {len(numbers)} samples are in {png_dir} already")
    bar = Progress("sampling", len(numbers), "image", initial=done)
    try:
        with closing(bar):
            _draw_missing(Halving(draw), missing, batch_size, PngWriter(png_dir, names), bar)
        return distributed.from_rank0(_finish, out_dir, numbers, labels, beside, names)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_saved(bar, png_dir)) from None


def _saved(bar: Progress, png_dir: str) -> str:
    return f"{bar.done} of {bar.total} samples are in {png_dir}; rerun the same command to continue"


def _draw_missing(
    draw: Callable[[list[int]], np.ndarray],
    missing: list[int],
    batch_size: int,
    writer: PngWriter,
    bar: Progress,
) -> None:
    """Draw the missing samples, a batch on each rank at a time, and write each while the next is drawn. Collective.

    An error of any rank is the same UserError on all.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    chunks = [missing[i : i + batch_size * world_size] for i in range(0, len(missing), batch_size * world_size)]
    with writer:
        try:
            for chunk in [*chunks, []]:  # after the last one, its files are waited for
                mine = chunk[rank * batch_size : (rank + 1) * batch_size]
                drawn, problem = _drawn(draw, mine)
                written, unwritten = writer.finish()
                outcomes = distributed.all_gather_object((written, unwritten or problem))
                bar.update(sum(written for written, _ in outcomes))
                for _, found in outcomes:
                    if found is not None:
                        raise UserError(f"{found}. {_saved(bar, writer.png_dir)}")
                writer.start(mine, drawn)
        except KeyboardInterrupt:
            bar.update(writer.finish()[0])
            raise


def _drawn(draw: Callable[[list[int]], np.ndarray], numbers: list[int]) -> tuple[np.ndarray | tuple[()], str | None]:
    """(the samples, what went wrong, if something did)."""
    try:
        return (draw(numbers) if numbers else ()), None
    except UserError as error:
        return (), str(error)


class PngWriter:
    """Encodes and writes PNGs in threads. The with statement ends when all are written.

    :param names: of the files.
    """

    def __init__(self, png_dir: str, names: FileNames):
        self.png_dir, self.names = png_dir, names
        self._futures: list[Future[None]] = []

    def __enter__(self) -> PngWriter:
        self._pool = ThreadPoolExecutor(WRITERS)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def start(self, numbers: Sequence[int], arrays: Iterable[np.ndarray]) -> None:
        """Write the samples with these numbers, uint8 [H, W, C] each."""
        self._futures += [self._pool.submit(self._write, i, array) for i, array in zip(numbers, arrays)]

    def _write(self, number: int, array: np.ndarray) -> None:
        path = files.join(self.png_dir, self.names(number))
        files.write_bytes(path, images.encode_png(array), durable=False)

    def finish(self) -> tuple[int, str | None]:
        """Wait for what was started. Returns how many were written, and what went wrong, if something did.

        Raises the first error that is not a user's.
        """
        wait(self._futures)
        errors = [error for future in self._futures if (error := future.exception()) is not None]
        written, self._futures = len(self._futures) - len(errors), []
        for error in errors:
            if not isinstance(error, UserError):
                raise error
        return written, str(errors[0]) if errors else None


def _check_shared(out_dir: str) -> None:
    """Raise UserError unless all ranks see the folder that rank 0 has prepared. Collective.

    Each rank writes its own images there. Hosts that share no folder could send theirs to rank 0 instead, but that
    would be a second way to do the same, and rank 0 would then encode all images.
    """
    rows = distributed.all_gather_object((socket.gethostname(), files.exists(files.join(out_dir, REQUEST_FILE))))
    for rank, (host, sees) in enumerate(rows):
        if not sees:
            raise UserError(f"rank {rank} on {host} does not see {out_dir}: give an --out_dir that all hosts share")


def check_request(out_dir: str, request: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds samples of another request, or of an unknown one."""
    png_dir, path = files.join(out_dir, PNG_DIR), files.join(out_dir, REQUEST_FILE)
    if files.exists(path):
        before = files.read_record(path, f"remove it and {png_dir}, or choose another --out_dir")
        request = json.loads(json.dumps(dict(request)))
        # In this order, the first difference is the most important one: the command, the model, the sampler.
        for name in [*request, *(before.keys() - request.keys())]:
            if before.get(name) != request.get(name):
                raise UserError(
                    f"{out_dir} holds samples {_difference(name, before.get(name), request.get(name))}: choose another "
                    f"--out_dir, or remove {path} and {png_dir}"
                )
    elif files.is_dir(png_dir) and any(name.endswith(".png") for name in files.list_dir(png_dir)):
        raise UserError(f"{png_dir} holds images of unknown origin: choose another --out_dir")


_OTHERS = {
    "seed_scheme": "made by another scheme of seeds, so their images differ",
    "timesteps": "with steps at other timesteps",
    "timesteps_sha256": "with steps at other timesteps",
    "model_sha256": "of another model file at the same place",
    "model_step": "of another checkpoint at the same place",
    "guide_sha256": "guided by another model",
    "classifier_sha256": "guided by another classifier",
    "images_sha256": "made from other images",
    "names_sha256": "made from images of other names",
    "masks_sha256": "made with other masks",
    "latents_sha256": "made from other latents",
}


def _difference(name: str, before: Any, now: Any) -> str:
    """In words, how samples of another request differ from those of this one."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name == "command":
        old, new = (f"edit {one_line(value)[:SHOWN_CHARACTERS]}" if value else "sample" for value in (before, now))
        return f"made by {old}, but this command is {new}"
    old = f"of --{name} {one_line(before)[:SHOWN_CHARACTERS]}" if before not in (None, "") else f"without --{name}"
    new = f"--{name} {one_line(now)[:SHOWN_CHARACTERS]}" if now not in (None, "") else f"no --{name}"
    return f"{old}, but this command has {new}"


def claim(out_dir: str, request: Mapping[str, Any]) -> None:
    """Claim a folder for the samples of a request, described in it, until this process ends.

    Raises UserError where another process holds it, and where it holds samples of another request. For rank 0.
    """
    png_dir = files.join(out_dir, PNG_DIR)
    files.make_dirs(png_dir)
    files.lock(out_dir, ".samples.lock")  # a name of its own: a training run may write into the same folder
    files.remove_leftovers(png_dir)
    files.remove_leftovers(out_dir, "samples")
    check_request(out_dir, request)
    files.write_bytes(files.join(out_dir, REQUEST_FILE), json.dumps(dict(request), indent=1).encode())


def _prepare(out_dir: str, numbers: Sequence[int], request: Mapping[str, Any], names: FileNames) -> list[int]:
    """The numbers of the samples still to be made. Claims the folder."""
    claim(out_dir, request)
    png_dir = files.join(out_dir, PNG_DIR)
    wanted = set(numbers)
    found = names.found(files.list_dir(png_dir))
    existing = {i: files.join(png_dir, name) for i, name in found.items() if i in wanted}
    # PNGs are not forced to the disk one by one, so a power cut may have damaged some. Reading them all takes a small
    # part of the time that `_finish` needs to decode them.
    damaged = {i for i, png in existing.items() if not images.is_whole_png(files.read_bytes(png))}
    if damaged:
        logger.log(f"drawing {len(damaged)} damaged samples again, such as {one_line(existing[min(damaged)])}")
    return [i for i in numbers if i not in existing or i in damaged]


def _read_samples(png_dir: str, names: Iterable[str]) -> Iterator[np.ndarray]:
    """uint8 [H, W, C] of each PNG. Raises UserError for a damaged one and for one of another size than the first."""
    first, shape = "", None
    for name in names:
        path = files.join(png_dir, name)
        try:
            array = images.decode_png(files.read_bytes(path))
        except ValueError:
            raise UserError(f"{path} is damaged: remove it and run the same command again") from None
        if shape is None:
            first, shape = path, array.shape
        elif array.shape != shape:
            raise UserError(
                f"{path} holds an image of {array.shape}, {first} one of {shape} (height, width, channels): remove the "
                "one that is not a sample of this model and run the same command again"
            )
        yield array


def _finish(
    out_dir: str,
    numbers: Sequence[int],
    labels: Labels | None,
    beside: Callable[[int], np.ndarray | None] | None,
    file_names: FileNames,
) -> str:
    png_dir = files.join(out_dir, PNG_DIR)
    existing = file_names.found(files.list_dir(png_dir))
    names = [existing.get(i) or file_names(i) for i in numbers]
    for i, name in zip(numbers, names):
        if i not in existing and not files.exists(files.join(png_dir, name)):
            raise UserError(
                f"{files.join(png_dir, name)}, written by another rank, is not on rank 0's host "
                f"{socket.gethostname()}: give an --out_dir that all hosts share"
            )
    shown = np.stack(list(_read_samples(png_dir, names[:SHOWN])))
    shape = (len(numbers), *shown.shape[1:])
    label_array = [np.array([labels.index(i) for i in numbers], np.int64)] if labels else []
    path = files.join(out_dir, f"samples_{'x'.join(map(str, shape))}.npz")
    images.save_npz(path, images.Rows(shape, _read_samples(png_dir, names)), *label_array)
    captions = [labels.caption(i) for i in list(numbers)[:SHOWN]] if labels else None
    columns = 10 if len(shown) >= SHOWN // 2 else None
    found = [beside(i) for i in list(numbers)[: SHOWN // 2]] if beside is not None else []
    inputs = [image for image in found if image is not None]
    if inputs:
        shown = pairs(np.stack(inputs), shown[: SHOWN // 2])
        captions = captions and [text for caption in captions[: SHOWN // 2] for text in ("", caption)]
        columns = 10 if len(shown) >= SHOWN // 2 else 2 * math.ceil(math.sqrt(len(shown) / 4))  # no pair is parted
    images.save_grid(files.join(out_dir, "samples.png"), shown, columns, captions)
    logger.log(f"wrote {path}, {files.join(out_dir, 'samples.png')} and {len(numbers)} PNGs in {png_dir}")
    return path
