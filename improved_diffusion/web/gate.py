"""What reaches Gradio: the requests that the page itself makes, and values such as its controls have.

Gradio serves more than the page needs, takes the path of a file from whoever sends one, and prints what it cannot take
into the log. So everything is looked at before it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr
from anyio import to_thread
from PIL import Image

from ..service.http.replies import Refused
from ..service.http.security import App, Receive, Scope, Send

API = "/gradio_api"
CALL, UPLOAD, FILE = f"{API}/queue/join", f"{API}/upload", f"{API}/file="
PAGES = ("/", "/healthz", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
READ = (f"{API}/queue/data", f"{API}/upload_progress", f"{API}/startup-events")
READ_BELOW = ("/assets/", "/static/", f"{API}/heartbeat/")
WRITTEN = (CALL, UPLOAD, f"{API}/cancel", f"{API}/reset")
MOST_PIXELS = 40_000_000  # of an image that a control gets
MOST_FILES = 8  # in one call: an editor has a background, a layer and both together
LONGEST_TEXT = 2000
LONGEST_SESSION = 64
_NUMBERS: tuple[type, ...] = (gr.Number, gr.Slider)
_IMAGES: tuple[type, ...] = (gr.Image, gr.ImageEditor)


class NotTaken(Refused):
    """A call that is refused, in words that Gradio's page shows."""

    def __init__(self, message: str, parameter: str = "data"):
        super().__init__(400, message, parameter)

    def content(self) -> dict[str, Any]:
        """What the reply says; Gradio's page looks for `detail`."""
        return {**super().content(), "detail": self.message}


class Gate:
    """The middleware between the guard and Gradio.

    :param page: whose functions may be called.
    :param folder: of the files that Gradio keeps: those that were uploaded, and those that are shown.
    """

    def __init__(self, app: App, page: gr.Blocks, folder: str):
        self.app, self.page, self.folder = app, page, os.path.realpath(folder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            self._check_route(method, path)
            if path == CALL:
                receive = await self._checked(receive)
        await self.app(scope, receive, send)

    def _check_route(self, method: str, path: str) -> None:
        if method == "POST" and path in WRITTEN:
            return
        if method in ("GET", "HEAD"):
            if path in PAGES or path in READ or path.startswith(READ_BELOW):
                return
            if path.startswith(FILE) and self._holds(path.removeprefix(FILE)):
                return
        raise Refused(404, "there is no such page")

    def _holds(self, path: str) -> bool:
        """Whether a path, which may be anything, is of a file that Gradio keeps."""
        real = os.path.realpath(path) if os.path.isabs(path) and "\0" not in path else ""
        return real.startswith(self.folder + os.sep) and os.path.isfile(real)

    async def _checked(self, receive: Receive) -> Receive:
        """What gives the body of a call again, once it is one that the page could make."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            call = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise NotTaken("the request is not JSON") from None
        images = self._check_call(call)
        await to_thread.run_sync(_check_images, images)
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        return again

    def _check_call(self, call: Any) -> list[str]:
        """Raise NotTaken for a call that the page does not make; returns the paths of the images that it is for."""
        known = isinstance(call, dict) and type(call.get("fn_index")) is int
        function = self.page.fns.get(call["fn_index"]) if known else None
        if function is None:
            raise NotTaken("there is no such function", "fn_index")
        session, data = call.get("session_hash"), call.get("data")
        if not isinstance(session, str) or not session.isalnum() or len(session) > LONGEST_SESSION:
            raise NotTaken("expected letters and digits", "session_hash")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise NotTaken(f"expected {len(function.inputs)} values")
        for control, value in zip(function.inputs, data):
            if not _fits(control, value):
                raise NotTaken(f"{_title(control)}: this value is not one that the control can have")
        self._check_values([data, call.get("event_data")])
        given = [value for control, value in zip(function.inputs, data) if isinstance(control, _IMAGES)]
        return [path for name, path in _leaves(given) if name == "path" and path is not None]

    def _check_values(self, values: Any) -> None:
        """Look at what a call holds, however deep: the files are those that Gradio keeps, and texts are plain."""
        paths = 0
        for name, value in _leaves(values):
            if isinstance(value, str) and (len(value) > LONGEST_TEXT or not value.isprintable()):
                raise NotTaken("a text is too long, or has characters that cannot be shown")
            if isinstance(value, float) and not math.isfinite(value):
                raise NotTaken("a number is too large")
            if name == "path" and value is not None:
                paths += 1
                if not isinstance(value, str) or not self._holds(value):
                    raise NotTaken("this file is not here any more: upload it again")
        if paths > MOST_FILES:
            raise NotTaken(f"more than {MOST_FILES} files")


def _no_number(text: str) -> float:
    raise ValueError(text)


def _title(control: Any) -> str:
    return getattr(control, "label", None) or control.get_block_name()


def _fits(control: Any, value: Any) -> bool:
    """Whether a control can have a value, as far as its type tells; a state's is kept by the server."""
    if value is None or isinstance(control, gr.State):
        return True
    if isinstance(control, _NUMBERS):
        return type(value) in (int, float)
    if isinstance(control, gr.Checkbox):
        return type(value) is bool
    if isinstance(control, gr.Dropdown):
        chosen = value if control.multiselect and isinstance(value, list) else [value]
        return all(isinstance(each, str) for each in chosen)
    if isinstance(control, gr.Textbox):
        return isinstance(value, str)
    return isinstance(value, Mapping)  # a file, or several of an editor


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """(the nearest name, value) of everything in a JSON value that is no list and no object."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        name, found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.items()
        elif isinstance(found, list):
            waiting += [(name, each) for each in found]
        else:
            yield name, found


def _check_images(paths: Sequence[str]) -> None:
    """Raise NotTaken for what is no image, or too large a one; only their heads are read."""
    for path in paths:
        width, height = 0, 0
        with suppress(Exception), Image.open(path) as image:  # Pillow raises many kinds for damaged files
            width, height = image.size
        if not width * height:
            raise NotTaken("this is no image that can be read")
        if width * height > MOST_PIXELS:
            raise NotTaken(f"the image has more than {MOST_PIXELS:,} pixels")
