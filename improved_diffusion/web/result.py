"""What was drawn: shown, to download, and to draw again."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..config import UserError
from ..sampling.images import Images
from .drawing import Update, draw, status_line, warn
from .events import AT_ONCE
from .kept import DRAWN, NO_ROOM, new_folder
from .pictures import Downloads, captions_of, grid_html
from .reproduce import Recipe
from .state import AppState


@dataclass(frozen=True)
class Drawn:
    """The images of a request, with their files and how to draw them again."""

    images: Images
    downloads: Downloads
    recipe: Recipe

    def codes(self, chosen: int | None = None) -> tuple[str, str]:
        """The command and the Python: of all images, or of the one at a position."""
        numbers = () if chosen is None else (self.numbers[chosen],)
        return self.recipe.command(numbers), self.recipe.python(numbers)

    @property
    def numbers(self) -> list[int]:
        """The number of each image."""
        found = self.images.numbers
        return list(range(len(self.images)) if found is None else map(int, found))


@dataclass(frozen=True)
class Order:
    """What a user asks for.

    :param request: the engine's.
    :param recipe: to draw the images again.
    :param beside: further files for the zip: what the images are made from.
    """

    request: Any
    recipe: Recipe
    beside: dict[str, bytes] | None = None


class Result:
    """The place of a tab's images.

    :param name: begins the ids of its elements.
    :param empty: what stands there at first.
    :param drawn: a gr.State of Drawn; None at first.
    :param chosen: a gr.State of the position of the selected image; None for none.
    """

    def __init__(self, app_state: AppState, name: str, empty: str):
        self.app_state = app_state
        with gr.Row(elem_classes="snug bar", equal_height=True):
            with gr.Column(scale=4, min_width=180):
                self.status = gr.HTML(status_line(""), elem_id=f"{name}-status", padding=False)
            self.cancel = gr.Button(
                "Cancel", variant="stop", size="sm", scale=1, min_width=80, interactive=False, elem_id=f"{name}-cancel"
            )
        self.preview = gr.HTML(f'<div class="empty">{empty}</div>', elem_id=f"{name}-preview", padding=False)
        self.gallery = gr.Gallery(
            label="Images", show_label=False, visible=False, columns=4, height="auto", object_fit="contain",
            format="png", interactive=False, elem_id=f"{name}-gallery", elem_classes="pixels", buttons=["fullscreen"],
        )  # fmt: skip
        with gr.Row(elem_classes="snug"):
            self.files = [
                gr.DownloadButton(text, interactive=False, size="sm", min_width=80, elem_id=f"{name}-{kind}")
                for kind, text in (("png", "PNG"), ("zip", "ZIP of all"), ("npz", "NPZ of all"))
            ]
        with gr.Accordion("Draw these again, byte for byte", open=False, elem_id=f"{name}-again"):
            code: dict[str, Any] = {"lines": 1, "interactive": False, "buttons": ["copy"], "show_line_numbers": False}
            self.codes = [
                gr.Code(label="As a command", language="shell", elem_id=f"{name}-command", **code),
                gr.Code(label="As Python", language="python", elem_id=f"{name}-python", **code),
            ]
        self.drawn, self.chosen, self.job = gr.State(delete_callback=_remove), gr.State(), gr.State()
        self.cancel.click(_cancel, self.job, **AT_ONCE)
        self.gallery.select(_select, self.drawn, [self.chosen, self.files[0], *self.codes], **AT_ONCE)

    def outputs(self, go: gr.Button) -> list[Any]:
        """The outputs of an event that draws.

        :param go: the button that starts it, which waits until it is over.
        """
        shown = [self.status, self.job, go, self.cancel, self.preview, self.gallery, self.drawn, self.chosen]
        return [*shown, *self.files, *self.codes]

    async def follow(self, request: gr.Request, order: Order) -> AsyncIterator[tuple[Any, ...]]:
        """The values of the outputs while the engine draws."""
        async for update in draw(self.app_state, order.request, request.session_hash or ""):
            if update.result is not None:
                images, file = update.result
                try:
                    downloads = await asyncio.to_thread(self._write, images, order)
                except UserError as error:
                    yield refused(error)
                    return
                yield _finished(update, Drawn(images, downloads, order.recipe.of(file)))
            elif update.over:
                yield _ended(update.status)
            else:
                yield _running(update, order.request.numbers())

    def _write(self, images: Images, order: Order) -> Downloads:
        """The files of drawn images. Raises UserError where they do not fit on the disk."""
        folder = new_folder(self.app_state, DRAWN)
        try:
            return Downloads(images, folder, order.beside, film=order.request.kind == "interpolate")
        except (OSError, UserError):
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(NO_ROOM) from None


def refused(error: UserError) -> tuple[Any, ...]:
    """The values of the outputs where there is nothing to draw; a message says why."""
    return _ended(warn(error))


def _running(update: Update, numbers: Sequence[int]) -> tuple[Any, ...]:
    grid = gr.update(value=grid_html([update.previews.get(i) for i in numbers]), visible=True)
    buttons = gr.update(interactive=False), gr.update(interactive=True)
    return update.status, update.job, *buttons, grid, gr.update(visible=False), *[gr.skip()] * 7


def _ended(status: str) -> tuple[Any, ...]:
    """Without images: what is there stays."""
    return status, None, gr.update(interactive=True), gr.update(interactive=False), *[gr.skip()] * 9


def _finished(update: Update, drawn: Drawn) -> tuple[Any, ...]:
    files = drawn.downloads
    pictures = list(zip(files.pngs, captions_of(drawn.images)))
    gallery = gr.update(value=pictures, visible=True, selected_index=None)
    buttons = [gr.update(value=path, interactive=True) for path in (files.pngs[0], files.zip, files.npz)]
    shown = update.status, None, gr.update(interactive=True), gr.update(interactive=False), gr.update(visible=False)
    return *shown, gallery, drawn, None, *buttons, *drawn.codes()


def _remove(drawn: Drawn | None) -> None:
    """Remove the files of a session that is over."""
    if drawn is not None:
        shutil.rmtree(drawn.downloads.folder, ignore_errors=True)


def _cancel(job: Any) -> None:
    if job is not None:
        job.cancel()


def _select(drawn: Drawn | None, event: gr.SelectData) -> Sequence[Any]:
    """The selected image: to download, to draw again alone, and to edit."""
    if drawn is None:
        return None, gr.skip(), gr.skip(), gr.skip()
    i = int(event.index)
    return i, gr.update(value=drawn.downloads.pngs[i]), *drawn.codes(i)
