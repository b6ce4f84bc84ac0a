"""A stand-in of the engine, in one process."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..api import load
from ..config import UserError
from ..sampling.images import Images
from .errors import Cancelled


@dataclass(frozen=True)
class Request:
    kind: str
    model: str
    average: str = ""
    n: int = 1
    seed: int = 0
    classes: tuple[str | int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    images: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Event:
    kind: str
    position: int = 0
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    preview: Images | None = None
    error: str = ""


class Job:
    def __init__(self, request):
        self.id, self.request, self.state = uuid.uuid4().hex, request, "waiting"
        self._events, self._listeners, self._lock = [], [], threading.Lock()
        self._stop, self._answer, self._over = False, None, threading.Event()

    def _tell(self, event):
        with self._lock:
            self._events.append(event)
            listeners = list(self._listeners)
        for each in listeners:
            each(event)

    def add_listener(self, callback):
        with self._lock:
            past = list(self._events)
            self._listeners.append(callback)
        for event in past:
            callback(event)

    def events(self, timeout=None):
        found = queue.Queue()
        self.add_listener(found.put)
        while True:
            event = found.get(timeout=timeout)
            yield event
            if event.kind in ("done", "failed", "cancelled"):
                return

    def result(self, timeout=None):
        self._over.wait(timeout)
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def cancel(self):
        self._stop = True


class Engine:
    def __init__(self, catalogue, options=None):
        self.catalogue, self._models, self._queue = catalogue, {}, queue.Queue()

    def __enter__(self):
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._queue.put((None, False))

    def submit(self, request, *, client="", previews=False):
        self.catalogue.path(request.model)
        job = Job(request)
        job._tell(Event("queued", position=self._queue.qsize()))
        self._queue.put((job, previews))
        return job

    def _work(self):
        while True:
            job, previews = self._queue.get()
            if job is None:
                return
            job.state = "running"
            job._tell(Event("running"))
            try:
                job._answer = self._draw(job, previews)
                job.state = "done"
                job._over.set()
                job._tell(Event("done"))
            except (UserError, Cancelled) as error:
                job._answer, job.state = error, "cancelled" if isinstance(error, Cancelled) else "failed"
                job._over.set()
                job._tell(Event(job.state, error=str(error)))

    def _draw(self, job, previews):
        r = job.request
        key = (r.model, r.average)
        if key not in self._models:
            self._models[key] = load(self.catalogue.path(r.model), average=r.average or None)
        model = self._models[key]
        start, done = time.time(), 0

        def on_step(step):
            nonlocal done
            if job._stop:
                raise Cancelled()
            done += len(step.numbers)
            total = r.n * step.steps
            left = (time.time() - start) / done * (total - done)
            job._tell(Event("progress", done=done, total=total, seconds_left=left))
            if previews:
                job._tell(Event("preview", preview=step.images))

        common = dict(seed=r.seed, classes=list(r.classes) or None, progress=False, **r.options)
        if r.kind == "sample":
            return model.sample(r.n, on_step=on_step, **common)
        if r.kind == "upscale":
            return model.upscale(r.images, on_step=on_step, **common)
        if r.kind == "inpaint":
            return model.inpaint(r.images, r.mask, r.n, **common)
        if r.kind == "variations":
            return model.variations(r.images, r.n, **common)
        if r.kind == "interpolate":
            return model.interpolate(r.images[:1], r.images[1:], r.n, **common)
        latents = model.encode(r.images, classes=r.options["image_classes"], steps=r.options["steps"])
        return model.decode(latents, r.n, classes=list(r.classes), steps=r.options["steps"], progress=False)
