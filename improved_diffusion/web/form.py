"""A form for a command's options: a control for each, which gives the option only where it is filled in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import gradio as gr

from ..config import UserError
from ..config.settings import Settings
from ..evaluation.report import escape
from .controls import title
from .live import culprit


def groups(kind: type[Settings], names: Collection[str], placed: Collection[str]) -> dict[str, list[str]]:
    """The options `names` of a command, without those `placed` already, by the title of their group in --help-all."""
    found: dict[str, list[str]] = {}
    placed = {*placed}
    for config in kind.groups().values():
        mine = [f.name for f in fields(config) if f.name in names and f.name not in placed]
        placed |= {*mine}
        if mine:
            found[(config.__doc__ or "").strip().partition(".")[0]] = mine
    return found


def default_of(f: Field) -> str:
    """What an option is where it is not given."""
    return f"default: {'none' if f.default == '' else f.default}"


def menu(names: Sequence[str], empty: str) -> gr.Dropdown:
    """A menu of names. :param empty: what it shows where none is chosen."""
    return gr.Dropdown(choices=[(empty, ""), *((name, name) for name in names)])


class Form:
    """The controls of options.

    :param prefix: of the controls' ids in the page.
    :param offered: the options, by name.
    :param listed: those that are chosen from a menu which is filled later.
    """

    def __init__(self, prefix: str, offered: Mapping[str, Field], listed: Collection[str]):
        self.prefix, self.offered, self.listed = prefix, offered, listed
        self.controls: dict[str, Any] = {}
        self.places: dict[str, gr.Accordion] = {}

    def add(self, name: str, empty: str, **changed: Any) -> None:
        """Add the control of an option here. :param empty: what it shows where nothing is given."""
        f = self.offered[name]
        known = {"label": title(name), "info": f.metadata["help"], "elem_id": f"{self.prefix}-{name}", **changed}
        if name in self.listed or self.choices(name):
            choices = [(empty, ""), *((value, value) for value in self.choices(name))]
            self.controls[name] = gr.Dropdown(choices, value="", interactive=True, **known)
        else:
            self.controls[name] = gr.Textbox("", placeholder=empty, max_length=1000, interactive=True, **known)

    def add_row(self, empty: Mapping[str, str]) -> None:
        """Add controls side by side. :param empty: of each option."""
        with gr.Row():
            for name, text in empty.items():
                with gr.Column(min_width=200):
                    self.add(name, text)

    def add_group(self, group: str, empty: Mapping[str, str]) -> None:
        """Add the controls of a group that is closed at first."""
        with gr.Accordion(group, open=False) as place:
            for name, text in empty.items():
                self.add(name, text)
                self.places[name] = place

    def choices(self, name: str) -> list[str]:
        """The values of an option that has few; else none."""
        f = self.offered[name]
        return ["True", "False"] if isinstance(f.default, bool) else list(f.metadata["choices"])

    def with_empty(self, name: str, text: str) -> Any:
        """The control of an option that shows another text where nothing is given."""
        if name in self.listed:
            return gr.skip()  # whoever fills the menu says
        if self.choices(name):
            return menu(self.choices(name), text)
        return gr.Textbox(placeholder=text)

    def options(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """The options by name, of the controls' values."""
        return {name: given[control] for name, control in self.controls.items()}

    def helps(self) -> dict[Any, Any]:
        """The help of each control, in place of an earlier mistake."""
        return {control: type(control)(info=control.info) for control in self.controls.values()}

    def beside(self, error: UserError) -> dict[Any, Any]:
        """What shows a mistake beside the control of the option that it names."""
        name = culprit(error, self.controls)
        if name is None:
            return {}
        control = self.controls[name]
        shown: dict[Any, Any] = {control: type(control)(info=f"\N{WARNING SIGN} {escape(str(error))}")}
        if name in self.places:
            shown[self.places[name]] = gr.Accordion(open=True)
        return shown

    @property
    def parts(self) -> set[Any]:
        """All that the form may change."""
        return {*self.controls.values(), *self.places.values()}
