"""Controls for options: titles, help and limits are those of the command line."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

import gradio as gr

from ..config import Config, UserError
from ..config.settings import Settings


def option(kind: type[Settings] | type[Config], name: str) -> Field:
    """The option of a command, or of a group of options."""
    known = kind.options() if issubclass(kind, Settings) else {f.name: f for f in fields(kind)}
    return known[name]


def title(name: str) -> str:
    """What the page calls an option: its name in words."""
    return name.replace("_", " ").capitalize()


def help_of(kind: type[Settings] | type[Config], name: str) -> str:
    """The sentence that --help shows."""
    return option(kind, name).metadata["help"]


def control(kind: type[Settings] | type[Config], name: str, **changed: Any) -> Any:
    """The control of an option: a menu, a box to tick, a number or a text, with the option's default.

    :param changed: arguments of the component, where they are others than the option's own.
    """
    f = option(kind, name)
    known = {"label": title(name), "info": f.metadata["help"], "value": f.default, "interactive": True}
    if f.metadata["choices"]:
        return gr.Dropdown(**{**known, "choices": list(f.metadata["choices"]), **changed})
    if isinstance(f.default, bool):
        return gr.Checkbox(**{**known, **changed})
    if isinstance(f.default, (int, float)):
        limits = {"minimum": f.metadata["low"], "maximum": f.metadata["high"]}
        precision = 0 if isinstance(f.default, int) else None
        return gr.Number(**{**known, **limits, "precision": precision, **changed})
    return gr.Textbox(**{**known, **changed})


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value of a number's control. Raises UserError for an empty one, and for one outside of its limits."""
    if value is None:
        raise UserError(f"--{name} is empty: give a number")
    if value != int(value) or value < low or (high is not None and value > high):
        raise UserError(f"--{name} {value}: expected a whole number from {low}" + (f" to {high}" if high else ""))
    return int(value)
