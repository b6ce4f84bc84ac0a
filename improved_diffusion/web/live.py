"""What the tabs that watch processes share: a timer that ticks while its tab is shown, and messages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

import gradio as gr
from gradio.context import Context

from .events import AT_ONCE

SECONDS = 2.0  # between two looks


def enclosing_tab() -> gr.Tab:
    """The tab that is being built."""
    block: Any = Context.block
    while not isinstance(block, gr.Tab):
        block = block.parent
    return block


def timer_of(tab: gr.Tab, active: bool = False) -> gr.Timer:
    """A timer that ticks only while the tab is shown."""
    timer = gr.Timer(SECONDS, active=active)

    def toggle(event: gr.SelectData) -> gr.Timer:
        return gr.Timer(active=event.value == tab.label)

    tabs: Any = tab.parent
    tabs.select(toggle, None, timer, **AT_ONCE)
    return timer


def note(text: str) -> str:
    """A message as HTML."""
    return f'<p class="quiet" role="status">{html.escape(text)}</p>' if text else ""


def mistake(text: str) -> str:
    """A user's mistake as HTML."""
    return f'<p role="alert" style="color: var(--error-text-color)">{html.escape(text)}</p>'


def lines_view(text: str) -> str:
    """Lines of fixed width as HTML."""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px"
    return f'<pre style="{style}">{html.escape(text)}</pre>'


def log_view(text: str) -> str:
    """The last lines of a log as HTML, scrolled to their end."""
    style = "display: flex; flex-direction: column-reverse; max-height: 300px; overflow: auto"
    return f'<div style="{style}">{lines_view(text)}</div>'


def culprit(error: Exception, names: Iterable[str]) -> str | None:
    """The option that the message of an error names first; None where it names none of these."""
    known = set(names)
    return next((name for name in re.findall(r"--(\w+)", str(error)) if name in known), None)
