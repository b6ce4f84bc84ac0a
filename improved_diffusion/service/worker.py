"""A process that holds models in memory and draws. It knows the Python API only; the engine decides what it draws."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

import torch as th

from .. import api, distributed
from ..config import UserError
from ..config.service import EngineConfig
from ..distributed.devices import device_name, find_accelerator
from ..logs import logger
from ..sampling.images import Images, SamplingStep
from ..utils.stop_signals import SIGNALS, catch
from .requests import Request

PROGRESS_SECONDS = 0.1  # between two messages on progress
PREVIEW_SECONDS = 0.25

# The engine sends a Work, the number of a work to stop, or None for the end; the worker answers with those below.


@dataclass(frozen=True)
class Piece:
    """Images of one request: those with these numbers."""

    request: Request
    numbers: tuple[int, ...]
    previews: bool = False


@dataclass(frozen=True)
class Work:
    """What is drawn as one batch: pieces of samples of equal options, or one piece of another kind."""

    number: int
    file: str
    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        """How many images it is."""
        return sum(len(piece.numbers) for piece in self.pieces)


@dataclass(frozen=True)
class Held:
    """What is in memory: the files of a worker's models, and of its GPU the free and all bytes."""

    models: tuple[str, ...] = ()
    gpu: tuple[int, int] | None = None


@dataclass(frozen=True)
class Ready:
    """The worker has started."""

    device: str
    held: Held


@dataclass(frozen=True)
class Step:
    """`done` of `total` evaluations of an image; for some pieces, by their places, the images as they look now."""

    work: int
    done: int
    total: int
    previews: Mapping[int, Images]


@dataclass(frozen=True)
class Drawn:
    """The images of each piece, and the steps taken, of all images."""

    work: int
    images: tuple[Images, ...]
    held: Held
    steps: int = 0


@dataclass(frozen=True)
class Undone:
    """A work without images; reason: user, memory, stopped or failed."""

    work: int
    reason: str
    text: str
    held: Held


@dataclass(frozen=True)
class Dropped:
    """Idle models were dropped; this is left."""

    held: Held


class Stopped(Exception):
    """The engine stops the work."""


def main(pipe: connection.Connection, options: EngineConfig, index: int, threads: int) -> None:
    """Draw until the engine closes the pipe, or ends.

    :param index: of the GPU.
    :param threads: of the CPU; 0: torch's default.
    """
    catch(SIGNALS, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the engine ends this one
    sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        th.set_num_threads(threads)
    found = find_accelerator()
    if found is not None and found.type != "mps":
        th.get_device_module(found).set_device(index)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the engine is gone
        Worker(pipe, options).run()


def _end_with_parent() -> None:
    """End this process with the engine's, however that ends."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class Worker:
    """Models in memory, and what is drawn with them."""

    def __init__(self, pipe: connection.Connection, options: EngineConfig):
        self.pipe, self.options = pipe, options
        self.models: OrderedDict[str, tuple[object, api.Model, float]] = OrderedDict()  # by file, the newest used last

    def run(self) -> None:
        """Answer until the engine sends None."""
        self.pipe.send(Ready(device_name(), self._held()))
        while True:
            if not self.pipe.poll(self._idle_seconds()):
                self._drop_idle()
                continue
            message = self.pipe.recv()
            if message is None:
                return
            if isinstance(message, Work):  # a work to stop is done already
                self.pipe.send(self._answer(message))

    def _answer(self, work: Work) -> Drawn | Undone:
        try:
            model, watch = self._model(work.file), Watch(self.pipe, work)
            images = draw(model, work, watch)
            return Drawn(work.number, tuple(images), self._held(), watch.done)
        except Stopped:
            reason, text = "stopped", ""
        except UserError as error:
            reason, text = "user", str(error)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            if _is_memory(error):
                reason, text = "memory", ""
            else:
                reason, text = "failed", type(error).__name__
                logger.error(f"a worker failed to draw: {traceback.format_exc()}")
        # The traceback, which keeps tensors, is gone here.
        if reason == "memory":
            self._keep_only(work.file)
        return Undone(work.number, reason, text, self._held())

    def _model(self, file: str) -> api.Model:
        """The model of a file, loaded unless it is in memory and the file unchanged."""
        try:
            found = os.stat(file)
        except FileNotFoundError:
            raise UserError(f"{file} is gone, perhaps replaced by a newer checkpoint: ask again") from None
        state = (found.st_mtime_ns, found.st_size)
        if file not in self.models or self.models[file][0] != state:
            self.models.pop(file, None)
            while len(self.models) >= self.options.max_models:
                self.models.popitem(last=False)
            _free()
            self.models[file] = (state, api.load(file), 0.0)
        model = self.models[file][1]
        self.models[file] = (state, model, time.monotonic())
        self.models.move_to_end(file)
        return model

    def _idle_seconds(self) -> float | None:
        """The time until a model is idle for too long; None without models."""
        if not self.models:
            return None
        first_used = min(used for _, _, used in self.models.values())
        return max(0.0, first_used + 60 * self.options.idle_minutes - time.monotonic())

    def _drop_idle(self) -> None:
        last = time.monotonic() - 60 * self.options.idle_minutes
        for file in [file for file, (_, _, used) in self.models.items() if used <= last]:
            del self.models[file]
        _free()
        self.pipe.send(Dropped(self._held()))

    def _held(self) -> Held:
        return Held(tuple(self.models), distributed.memory_info(distributed.dev()))

    def _keep_only(self, file: str) -> None:
        """Free the memory of the other models."""
        for other in [other for other in self.models if other != file]:
            del self.models[other]
        _free()


def _free() -> None:
    gc.collect()
    distributed.empty_cache(distributed.dev())


def _is_memory(error: Exception) -> bool:
    """Whether memory was full: of a GPU, of Python, or of torch on the CPU, which has no class of its own."""
    on_cpu = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    return on_cpu or distributed.is_out_of_memory(error)


class Watch:
    """Called after each step: tells the engine how far the work is, and stops it when the engine says so."""

    def __init__(self, pipe: connection.Connection, work: Work):
        self.pipe, self.work = pipe, work
        self.done = 0
        self.told = self.shown = time.monotonic()
        ends = 0
        self.places: dict[int, slice] = {}  # of the images of the pieces that want previews
        for place, piece in enumerate(work.pieces):
            ends += len(piece.numbers)
            if piece.previews:
                self.places[place] = slice(ends - len(piece.numbers), ends)

    def __call__(self, step: SamplingStep) -> None:
        self._check()
        self.done += len(step.numbers)
        now = time.monotonic()
        total = self._total(step.steps)
        if now - self.told < PROGRESS_SECONDS and self.done < total:
            return
        previews = {}
        if self.places and now - self.shown >= PREVIEW_SECONDS and len(step.numbers) == self.work.count:
            images = step.images
            previews = {place: images[part] for place, part in self.places.items()}
            self.shown = now
        self.told = now
        self.pipe.send(Step(self.work.number, self.done, total, previews))

    def _check(self) -> None:
        while self.pipe.poll():
            message = self.pipe.recv()
            if message is None:
                raise EOFError
            if message == self.work.number:
                raise Stopped

    def _total(self, steps: int) -> int:
        request = self.work.pieces[0].request
        total = steps * self.work.count
        if request.images is not None and request.kind in ("interpolate", "transform"):  # which are encoded first
            total += steps * len(request.images)
        return total


def draw(model: api.Model, work: Work, on_step: Callable[[SamplingStep], None]) -> list[Images]:
    """The images of each piece."""
    request, numbers = work.pieces[0].request, work.pieces[0].numbers
    options: dict[str, Any] = {name: value for name, value in request.options.items() if name != "seeds"}
    if request.kind == "sample":
        asked = [
            {"seeds": piece.numbers, "seed": piece.request.seed, "classes": piece.request.classes or None}
            for piece in work.pieces
        ]
        return model.sample_together(asked, on_step=on_step, **options)
    options |= {"classes": request.classes or None, "batch_size": len(numbers), "on_step": on_step}
    if request.kind != "transform":
        options |= {"seed": request.seed, "progress": False}
    return [_EDITS[request.kind](model, request, numbers, options)]


def _upscale(model: api.Model, request: Request, numbers: tuple[int, ...], options: dict[str, Any]) -> Images:
    return model.upscale(request.images, seeds=numbers, **options)


def _inpaint(model: api.Model, request: Request, numbers: tuple[int, ...], options: dict[str, Any]) -> Images:
    return model.inpaint(request.images, request.mask, request.n, numbers=numbers, **options)


def _vary(model: api.Model, request: Request, numbers: tuple[int, ...], options: dict[str, Any]) -> Images:
    return model.variations(request.images, request.n, numbers=numbers, **options)


def _interpolate(model: api.Model, request: Request, numbers: tuple[int, ...], options: dict[str, Any]) -> Images:
    ends = request.ends()
    return model.interpolate(ends[0], ends[1], request.n, numbers=numbers, **options)


def _transform(model: api.Model, request: Request, numbers: tuple[int, ...], options: dict[str, Any]) -> Images:
    """Encode the images as what they are, and decode them as other classes."""
    own, classes = options.pop("image_classes", None), options.pop("classes")
    guidance = {name: options.pop(name) for name in tuple(options) if name.startswith("guidance_")}
    latents = model.encode(request.images, classes=own, **options)
    both = {name: value for name, value in options.items() if name in _OF_DECODING}
    return model.decode(latents, request.n, classes=classes, numbers=numbers, progress=False, **both, **guidance)


_OF_DECODING = {"batch_size", "on_step", "precision", "use_fp16", "clip_denoised"}  # beside the steps

_EDITS: Mapping[str, Callable[..., Images]] = {
    "upscale": _upscale, "inpaint": _inpaint, "variations": _vary, "interpolate": _interpolate, "transform": _transform,
}  # fmt: skip
