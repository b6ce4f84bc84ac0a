"""Jobs of the engine, whose events come from its threads, as asyncio and clients wait for them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...config import UserError
from ...sampling.images import Images
from .. import errors
from .replies import Refused, busy, mistake
from .security import Receive

if TYPE_CHECKING:
    from ..engine import Event, Job

LAST = ("done", "failed", "cancelled")  # the kinds of a job's last event
STOP_RETRY = 30  # seconds until another try is worth it, where the service stops
HEARTBEAT = 15.0  # seconds between signs of life on a quiet stream


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


class Watch:
    """The events of one job. A reader that is slow misses what newer events of the same kind say anyway."""

    def __init__(self, job: Job):
        self.job = job
        self._loop = asyncio.get_running_loop()
        self._new = asyncio.Event()
        self._waiting: OrderedDict[str, Event] = OrderedDict()
        job.add_listener(self._from_engine)

    def _from_engine(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        self._waiting[event.kind] = event
        self._waiting.move_to_end(event.kind)
        self._new.set()

    async def events(self) -> AsyncIterator[Event | None]:
        """The events up to the last one; None where nothing has happened for a while."""
        while True:
            try:
                await asyncio.wait_for(self._new.wait(), HEARTBEAT)
            except asyncio.TimeoutError:
                yield None
                continue
            self._new.clear()
            while self._waiting:
                _, event = self._waiting.popitem(last=False)
                yield event
                if event.kind in LAST:
                    return

    async def end(self) -> None:
        """Wait for the last event."""
        async for _ in self.events():
            pass


async def gone(receive: Receive) -> None:
    """Wait until the client leaves; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def finish(job: Job, receive: Receive) -> Images:
    """The images of a job, which is cancelled where the client leaves.

    Raises ClientGone, and Refused for whatever else went wrong.
    """
    ended = asyncio.ensure_future(Watch(job).end())
    left = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise ClientGone
        return images_of(job)
    finally:
        if not ended.done():
            job.cancel()
        for task in (ended, left):
            task.cancel()


def images_of(job: Job) -> Images:
    """The images of a job that has ended. Raises Refused where there are none."""
    try:
        return job.result(timeout=5)  # the engine tells of the end just before the images are there
    except Exception as error:
        raise refused(error) from None


def refused(error: Exception) -> Refused:
    """The reply to an error of the engine. One that it does not know of is raised."""
    if isinstance(error, errors.Busy):
        return busy(str(error), error.retry_after)
    if isinstance(error, errors.TimedOut):
        return Refused(504, str(error))
    if isinstance(error, errors.OutOfMemory):
        return Refused(507, str(error))
    if isinstance(error, (errors.Cancelled, errors.Stopping)):
        return busy(str(error), STOP_RETRY, status=503)
    if isinstance(error, errors.Failed):
        return Refused(500, str(error))
    if isinstance(error, UserError):
        return mistake(error)
    raise error


class Results:
    """Images of streamed requests that wait to be fetched: for some minutes, in bounded memory."""

    def __init__(self, seconds: float, most_bytes: int):
        self.seconds = seconds
        self.most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[float, Images]] = OrderedDict()

    def put(self, images: Images) -> str:
        """Keep images; returns what they are fetched by. Older ones are dropped where memory is short."""
        self._drop_old()
        name = secrets.token_urlsafe(16)
        self._kept[name] = (time.monotonic() + self.seconds, images)
        while len(self._kept) > 1 and sum(kept.array.nbytes for _, kept in self._kept.values()) > self.most_bytes:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> Images:
        """Raises Refused where they are not kept, or not any more."""
        self._drop_old()
        if name not in self._kept:
            raise Refused(404, f"there is no such result: results are kept for {self.seconds / 60:g} minutes")
        return self._kept[name][1]

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._kept and next(iter(self._kept.values()))[0] < now:
            self._kept.popitem(last=False)


def sse(kind: str, data: Any) -> bytes:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
