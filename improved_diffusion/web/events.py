"""What all events of the page have in common."""

from typing import Any

# No other program calls it, nothing covers what it changes, and the engine rather than Gradio has the queue.
AT_ONCE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
