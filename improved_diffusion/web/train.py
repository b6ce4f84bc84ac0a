"""The tab that trains a model."""

from __future__ import annotations

import gradio as gr

from .state import AppState


def build_train(app_state: AppState) -> None:
    """The tab's controls."""
    gr.Markdown("Training from the page is not ready yet.")
