"""Choosing a model: from the folder of runs, or uploaded."""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..config import UserError
from ..utils.text import counted
from .drawing import explain, warn
from .events import AT_ONCE, close_menus
from .facts import Facts, known_facts
from .kept import MODELS, NO_ROOM, new_folder
from .state import AppState

MOST_UPLOADS = 4  # models that one user keeps
NO_MODELS = (
    "There is no model yet. Train one in the <b>Train</b> tab and press <b>Refresh</b>, or upload the weights of one."
)


class Picker:
    """The row of controls that choose a model, with what is known of the chosen one below it.

    :param model: a menu of names in the catalogue.
    :param average: a menu of a run's moving averages of the weights; "" where there is no choice.
    """

    def __init__(self, app_state: AppState, page: gr.Blocks):
        self.app_state, self.catalogue = app_state, app_state.catalogue
        first = next(iter(self.catalogue.names()), None)
        self.known = known_facts(app_state, first)
        uploads = gr.State([])
        with gr.Row(elem_classes="picker", equal_height=True):
            averages = self._averages(first)
            self.model = gr.Dropdown(
                self._choices([]), value=first, label="Model", scale=4, min_width=200, elem_id="model"
            )
            self.average = gr.Dropdown(
                averages, value=averages[0][1], label="Average", scale=3, min_width=120, elem_id="average",
                interactive=len(averages) > 1,
            )  # fmt: skip
            refresh = gr.Button("Refresh", size="sm", scale=1, min_width=90, elem_id="refresh")
            upload = gr.UploadButton(
                "Upload weights",
                file_types=[".pt", ".safetensors"],
                size="sm",
                scale=1,
                min_width=120,
                elem_id="upload-weights",
            )
        about = gr.HTML(self._about(first), elem_id="about-model", padding=False)

        closed = close_menus(refresh.click, [self.model])
        closed.then(self.refresh, [self.model, uploads], self.model, **AT_ONCE)
        self.loaded = page.load(self.refresh, [self.model, uploads], self.model, **AT_ONCE)
        upload.upload(self.take_upload, [upload, self.model, uploads], [self.model, uploads], **AT_ONCE)
        self.on_change(self.describe, [self.average, about])

    def on_change(self, fn: Callable[..., Any], outputs: Sequence[Any], inputs: Sequence[Any] = ()) -> None:
        """Call `fn` with the name of each model that is chosen, or with None, and when the page opens.

        :param outputs: `fn` says of its menus whether they can be used.
        :param inputs: controls whose values follow the name.
        """
        for event in (close_menus(self.model.change, outputs).then, self.loaded.then):
            event(fn, [self.model, *inputs], list(outputs), trigger_mode="always_last", **AT_ONCE)

    def refresh(self, chosen: str | None, uploads: list[tuple[str, str]]) -> Any:
        """The models that there are now; the chosen one stays chosen while it is there."""
        choices = self._choices(uploads)
        names = [name for _, name in choices]
        if chosen in names:
            # The value is left alone: a quick user may have chosen meanwhile.
            return gr.update(choices=choices, interactive=True)
        return gr.update(choices=choices, value=next(iter(names), None), interactive=True)

    def take_upload(self, path: str, chosen: str | None, uploads: list[tuple[str, str]]) -> Any:
        """The menu with the uploaded model, which this session alone can choose."""
        title = os.path.basename(path)
        try:
            name = self._add(path, title)
        except UserError as error:
            warn(error)
            return gr.skip(), uploads
        for _, older in uploads[: -MOST_UPLOADS + 1]:
            self.catalogue.remove_upload(older)
        uploads = [*uploads[-MOST_UPLOADS + 1 :], (f"{title} (uploaded)", name)]
        return gr.update(choices=self._choices(uploads), value=name), uploads

    def _add(self, path: str, title: str) -> str:
        """The name in the catalogue of an uploaded file, which is moved to where Gradio does not remove it."""
        folder = new_folder(self.app_state, MODELS)
        kept = os.path.join(folder, title)
        try:
            shutil.move(path, kept)
            return self.catalogue.add_upload(kept, title)
        except (UserError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            text = str(error).replace(kept, title) if isinstance(error, UserError) else NO_ROOM
            raise UserError(text) from None

    def describe(self, name: str | None) -> Any:
        """The averages of a model, and a line on it."""
        averages = self._averages(name)
        menu = gr.update(choices=averages, value=averages[0][1], interactive=len(averages) > 1)
        return menu, self._about(name)

    def _choices(self, uploads: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [*((name, name) for name in self.catalogue.names()), *uploads]

    def _averages(self, name: str | None) -> list[tuple[str, str]]:
        found = self._info(name)
        known = () if found is None or isinstance(found, UserError) else found.averages
        return [(each, each) for each in known] or [("as saved", "")]

    def _info(self, name: str | None) -> Any:
        """What is known of a model: None without one, the error for one that cannot be read."""
        if name is None:
            return None
        try:
            return self.catalogue.describe(name)
        except UserError as error:
            return error

    def _about(self, name: str | None) -> str:
        """A line on the chosen model."""
        info = self._info(name)
        if info is None:
            return f'<p class="quiet">{NO_MODELS}</p>'
        if isinstance(info, UserError):
            return f'<p class="status bad">{html.escape(explain(info)[1])}</p>'
        size = "x".join(map(str, info.size))
        parts = [f"{size} pixels", "grey" if info.channels == 1 else f"{info.channels} channels"]
        if info.kind == "super_res":
            parts.insert(0, "enlarges images of " + "x".join(map(str, info.small_size)) + " to")
        parts.append(f"{info.num_classes} classes" if info.class_cond else "no classes")
        if info.step is not None:
            parts.append(f"trained for {counted(info.step, 'step')}")
        if info.own_steps:
            parts.append(f"distilled: samples in {counted(info.own_steps, 'step')}")
        return f'<p class="quiet">{html.escape(" · ".join(parts))}</p>'


def class_menu(known: Facts | None, info: str, chosen: Any = ()) -> dict[str, Any]:
    """What a menu of classes has for a model: switched off for one without classes, with the reason.

    The value is left alone, so that a user who is quick keeps it, unless the model does not have what is chosen.
    """
    names = [] if known is None else list(known.classes)
    why = "There is no model yet." if known is None else "This model has no classes."
    menu: dict[str, Any] = {"choices": names, "interactive": bool(names), "info": info if names else why}
    several = isinstance(chosen, (list, tuple))
    wanted = chosen if several else [] if chosen is None else [chosen]
    left = [name for name in wanted if name in names]
    if len(left) < len(wanted):
        menu["value"] = left if several else None
    return menu
