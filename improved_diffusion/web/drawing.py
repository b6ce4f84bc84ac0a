"""A request on its way: what the page shows of it, and what it says where it fails."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..config import UserError
from ..sampling.images import Images
from ..service.errors import Busy, Cancelled, Failed, OutOfMemory
from .controls import title
from .state import AppState

LAST = ("done", "failed", "cancelled")
EVERY = 0.1  # seconds between two pictures of the progress


@dataclass(frozen=True)
class Update:
    """What is known of a request.

    :param status: a line of HTML.
    :param job: to cancel it by; None when it is over.
    :param preview: the images as the model predicts them so far.
    :param result: the images, at the end.
    """

    status: str
    job: Any = None
    preview: Images | None = None
    result: Images | None = None

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self.job is None


async def draw(app_state: AppState, request: Any, client: str) -> AsyncIterator[Update]:
    """Pass a request to the engine and follow it. What is wrong becomes a message; nothing is raised.

    :param client: whose turn it is: the session.
    """
    try:
        job = await asyncio.to_thread(app_state.engine.submit, request, client=client, previews=True)
    except (UserError, Busy) as error:
        yield _problem(error)
        return
    try:
        async for update in _follow(job):
            yield update
        yield Update(status_line("Done"), result=await asyncio.to_thread(job.result))
    except (UserError, Busy, Cancelled, OutOfMemory, Failed) as error:
        yield _problem(error)
    finally:
        job.cancel()  # nobody waits for it any more; one that is over stays as it is


async def _follow(job: Any) -> AsyncIterator[Update]:
    """An update for what has happened since the last one, until the job is over."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
    job.add_listener(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
    update = Update(status_line("Waiting"), job)
    yield update
    while True:
        fresh = [await events.get()]
        while not events.empty():
            fresh.append(events.get_nowait())
        for event in fresh:
            if event.kind in LAST:
                return
            status = progress_line(event) or update.status
            update = Update(status, job, event.preview if event.preview is not None else update.preview)
        yield update
        await asyncio.sleep(EVERY)


def progress_line(event: Any) -> str:
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
        return "Busy", f"many people are drawing: try again in {duration(error.retry_after)}"
    if isinstance(error, OutOfMemory):
        return "Out of memory", "one image does not fit: choose a smaller model, or fp16"
    if isinstance(error, Failed):
        return "Failed", f"the drawing process stopped: {plain_words(str(error))}"
    return "Not possible", plain_words(str(error))
