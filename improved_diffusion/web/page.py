"""The page: its tabs, and the application that serves it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .edit import EditTab
from .evaluate import build_evaluate
from .picker import Picker
from .sample import SampleTab
from .state import AppState
from .theme import CSS, theme
from .train import build_train
from .upscale import UpscaleTab


def build_page(app_state: AppState) -> gr.Blocks:
    """The page."""
    with gr.Blocks(analytics_enabled=False, title="improved_diffusion", delete_cache=(600, 3600)) as page:
        picker = Picker(app_state, page)
        with gr.Tabs():
            with gr.Tab("Sample", id="sample"):
                sampled = SampleTab(app_state, picker).result
            with gr.Tab("Edit", id="edit"):
                EditTab(app_state, picker, sampled)
            with gr.Tab("Upscale", id="upscale"):
                UpscaleTab(app_state, picker, sampled)
            with gr.Tab("Train", id="train"):
                build_train(app_state)
            with gr.Tab("Evaluate", id="evaluate"):
                build_evaluate(app_state)
    # The engine has the queue: Gradio passes each request on at once.
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def mount_page(app: Any, app_state: AppState, path: str = "/") -> Any:
    """Mount the page in a FastAPI application, which is returned.

    Nothing is loaded from other hosts and nothing is sent there; no file but the page's own is served.
    """
    return gr.mount_gradio_app(
        app,
        build_page(app_state),
        path=path,
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        max_file_size=app_state.options.max_upload_mb * 10**6,
    )
