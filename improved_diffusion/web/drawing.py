"""A request on its way: what the page shows of it, and what it says where it fails."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import gradio as gr
import numpy as np

from ..config import UserError
from ..sampling.images import Images
from ..service.errors import Busy, Cancelled, OutOfMemory, ServiceError, TimedOut
from ..service.job import LAST, Event, Job
from ..service.requests import Request
from .controls import title
from .state import AppState

EVERY = 0.1  # seconds between two pictures of the progress


@dataclass(frozen=True)
class Update:
    """What is known of a request.

    :param status: a line of HTML.
    :param job: to cancel it by; None when it is over.
    :param previews: the images as the model predicts them so far, by their numbers.
    :param result: the images, at the end, and the file of the checkpoint that drew them.
    """

    status: str
    job: Job | None = None
    previews: Mapping[int, np.ndarray] = field(default_factory=dict)
    result: tuple[Images, str] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self.job is None


async def draw(app_state: AppState, request: Request, client: str) -> AsyncIterator[Update]:
    """Pass a request to the engine and follow it. What is wrong becomes a message; nothing is raised.

    :param client: whose turn it is: the session.
    """
    try:
        job = await asyncio.to_thread(app_state.engine.submit, request, client=client, previews=True)
    except (UserError, ServiceError) as error:
        yield _problem(error)
        return
    try:
        async for update in _follow(job):
            yield update
        yield Update(status_line("Done"), result=(await asyncio.to_thread(job.result), job.file))
    except (UserError, ServiceError) as error:
        yield _problem(error)
    finally:
        job.cancel()  # nobody waits for it any more; one that is over stays as it is


async def _follow(job: Job) -> AsyncIterator[Update]:
    """An update for what has happened since the last one, until the job is over."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def note(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job.add_listener(note)
    try:
        update = Update(status_line("Waiting"), job)
        while True:
            fresh = [await events.get()]
            while not events.empty():
                fresh.append(events.get_nowait())
            for event in fresh:
                if event.kind in LAST:
                    return
                status = progress_line(event) or update.status
                update = Update(status, job, {**update.previews, **_by_number(event.preview)})
            yield update
            await asyncio.sleep(EVERY)
    finally:
        job.remove_listener(note)


def _by_number(preview: Images | None) -> dict[int, np.ndarray]:
    """The images of a preview, which may be some of the request's."""
    return {} if preview is None else dict(zip(map(int, preview.numbers or ()), preview.array))


def progress_line(event: Event) -> str:
    """What the page says of an event; "" for one that says nothing new."""
    if event.kind == "queued":
        place = f"{event.position} before you" if event.position else "you are next"
        return status_line(f"Waiting: {place}", 0)
    if event.kind == "running":
        return status_line("Starting", 0)
    if event.kind == "progress":
        left = "" if event.seconds_left is None else f", {duration(event.seconds_left)} left"
        share = event.done / max(event.total, 1)
        return status_line(f"Drawing: {share:.0%}{left}", share)
    return ""


def duration(seconds: float) -> str:
    """A time in words."""
    seconds = max(1, round(seconds))
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def status_line(text: str, share: float | None = None, *, bad: bool = False) -> str:
    """A line on the state of a request, with a bar where a share of it is done; of one height, whatever it says."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>'
    return f'<div class="status{" bad" if bad else ""}" role="status"><span>{html.escape(text)}</span>{bar}</div>'


def plain_words(message: str) -> str:
    """A message of the command line as the page says it: options by their titles."""
    return re.sub(r"--([a-z_]+)", lambda match: title(match[1]), message)


def _problem(error: Exception) -> Update:
    """The end of a request that has no images; the page shows a message, too, unless the user wanted it."""
    if isinstance(error, Cancelled):
        return Update(status_line("Cancelled"))
    return Update(warn(error))


def warn(error: Exception) -> str:
    """Show a message that goes away; returns the line that stays."""
    heading, text = explain(error)
    gr.Warning(html.escape(text), title=heading)
    return status_line(f"{heading}: {text}", bad=True)


def explain(error: Exception) -> tuple[str, str]:
    """(a heading, what happened and what to do) for an error."""
    if isinstance(error, Busy):
        return "Busy", f"many images are waiting to be drawn: try again in {duration(error.retry_after)}"
    if isinstance(error, OutOfMemory):
        return "Out of memory", "a single image does not fit: choose a smaller model, or another precision"
    if isinstance(error, TimedOut):
        return "Too slow", "the time limit of the page is over: ask for fewer images or steps"
    if isinstance(error, ServiceError):
        return "Failed", plain_words(str(error))
    return "Not possible", plain_words(str(error))
