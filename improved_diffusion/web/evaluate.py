"""The tab that evaluates samples."""

from __future__ import annotations

import gradio as gr

from .state import AppState


def build_evaluate(app_state: AppState) -> None:
    """The tab's controls."""
    gr.Markdown("Evaluation from the page is not ready yet.")
