"""What the events of the page have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

# No other program calls it, nothing covers what it changes, and the engine rather than Gradio has the queue.
AT_ONCE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}


def close_menus(event: Callable[..., Any], outputs: Sequence[Any]) -> Any:
    """On an event, switch off the menus among `outputs` until what follows the event brings their new choices.

    Gradio's page stops working when a menu that is open gets fewer choices; one that is switched off is closed.
    """
    menus = [each for each in outputs if isinstance(each, gr.Dropdown)]
    return event(lambda: {menu: gr.update(interactive=False) for menu in menus}, None, menus, **AT_ONCE)
