"""A request on its way: what happens to it, and how those who wait hear of it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..logs import logger
from ..sampling.images import Images
from .errors import Cancelled
from .requests import Request

LAST = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    :param kind: queued, running, progress, preview, and at the end done, failed or cancelled.
    :param position: queued: how many jobs are before it.
    :param done, total: progress: in steps x images.
    :param seconds_left: progress: an estimate; None at first.
    :param preview: preview: the images as they look now, some of the request's, with their numbers.
    :param error: failed: why.
    """

    kind: str
    position: int = 0
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    preview: Images | None = None
    error: str = ""


class Job:
    """A request in the engine's hands. Its fields are the engine's; others use the methods."""

    def __init__(self, request: Request, file: str, client: str, previews: bool, deadline: float):
        """:param file: the checkpoint's.
        :param deadline: when it is given up, in seconds of the monotonic clock."""
        self.id = uuid.uuid4().hex
        self.request, self.file, self.client, self.previews, self.deadline = request, file, client, previews, deadline
        self.numbers = list(request.numbers())
        self.todo = list(self.numbers)  # the numbers of images that nobody draws yet
        self.drawn: dict[int, Images] = {}  # one image each
        self.steps = 0  # of each image, where that is known
        self.deaths = 0  # of workers that were drawing it
        self.alone = False  # whether it shares no batch
        self.started: float | None = None
        self.wants_cancel = False
        self._began: tuple[float, float] | None = None  # when the first progress was, and how much
        self._wake: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._finished = threading.Event()
        self._listeners: list[Callable[[Event], None]] = []
        self._event = Event("queued")
        self._error: Exception | None = None
        self._images: Images | None = None
        self._settings = json.dumps(dict(request.options), sort_keys=True, default=str)

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.request.kind} of {self.request.model}, {self.state})"

    @property
    def state(self) -> str:
        """waiting, running, done, failed or cancelled."""
        kind = self._event.kind
        return kind if kind in LAST else "running" if self.started else "waiting"

    @property
    def group(self) -> tuple[str, ...]:
        """Jobs of the same group are drawn together."""
        together = self.request.kind == "sample" and not self.alone
        return (self.file, self._settings) if together else (self.id,)

    @property
    def position(self) -> int:
        """How many jobs were before it, as last told."""
        return self._event.position

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Let `cancel` call `wake`."""
        self._wake = wake

    def cancel(self) -> None:
        """Give the job up. Ends without effect where it is finished."""
        self.wants_cancel = True
        self._wake()

    def result(self, timeout: float | None = None) -> Images:
        """The images, when they are done.

        Raises UserError, Cancelled, OutOfMemory, TimedOut or Failed where there are none, and TimeoutError after
        `timeout` seconds.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"not done within {timeout} seconds")
        if self._error is not None:
            raise self._error
        assert self._images is not None
        return self._images

    def add_listener(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with the newest event now, and with each one to come, from the engine's thread.

        It must return at once, and may not call the engine.
        """
        with self._lock:
            self._listeners.append(callback)
            callback(self._event)

    def remove_listener(self, callback: Callable[[Event], None]) -> None:
        """Undo `add_listener`."""
        with self._lock:
            if callback in self._listeners:
                self._listeners.remove(callback)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """The newest event and those to come, up to the last. Who reads slowly gets the newest of each kind.

        Raises TimeoutError where nothing happens for `timeout` seconds.
        """
        unread: deque[Event] = deque()
        arrived = threading.Condition()

        def note(event: Event) -> None:
            with arrived:
                if event.kind not in ("running", *LAST):
                    for older in [each for each in unread if each.kind == event.kind]:
                        unread.remove(older)
                unread.append(event)
                arrived.notify()

        self.add_listener(note)
        try:
            while True:
                with arrived:
                    if not arrived.wait_for(lambda: unread, timeout):
                        raise TimeoutError(f"nothing happened for {timeout} seconds")
                    event = unread.popleft()
                yield event
                if event.kind in LAST:
                    return
        finally:
            self.remove_listener(note)

    # For the engine

    def tell(self, event: Event) -> None:
        """Let the listeners know."""
        with self._lock:
            self._event = event
            for callback in tuple(self._listeners):
                try:
                    callback(event)
                except Exception as error:  # such as an event loop that is closed: the others' jobs go on
                    logger.warn(f"a listener failed, and is told no more: {type(error).__name__}: {error}")
                    self._listeners.remove(callback)

    def finish(self, error: Exception | None = None) -> None:
        """End the job: with its images, or an error."""
        if self.state in LAST:
            return
        kind = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
        if error is None:
            self._images = self._joined()
        self._error = error
        self.todo, self.drawn = [], {}
        self.tell(Event(kind, error="" if error is None else str(error)))
        self._finished.set()

    def progress(self, under_way: float) -> Event:
        """How far the job is.

        :param under_way: how many images' worth of steps are done of those that are drawn now.
        """
        total = self.steps * len(self.numbers)
        share = (len(self.drawn) + under_way) / len(self.numbers)
        now = time.monotonic()
        self._began = self._began or (now, share)  # loading the model, before that, tells nothing of the speed
        elapsed, since = now - self._began[0], share - self._began[1]
        left = elapsed * (1 - share) / since if since > 0 else None
        return Event("progress", done=round(share * total), total=total, seconds_left=left)

    def _joined(self) -> Images:
        found = [self.drawn[number] for number in self.numbers]
        labels = None if found[0].labels is None else np.concatenate([each.labels for each in found])  # type: ignore[misc]
        array = np.concatenate([each.array for each in found])
        return Images(array, labels, found[0].class_names, self.numbers)
