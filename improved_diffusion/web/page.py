"""The page: its tabs, and the application that serves it."""

from __future__ import annotations

import contextlib

import gradio as gr
from fastapi import FastAPI, Response
from gradio.utils import get_upload_folder

from ..config import UserError
from ..service.engine import Engine
from ..service.errors import ServiceError
from ..service.http.security import App
from ..service.requests import Request
from .edit import EditTab
from .evaluate import build_evaluate
from .gate import Gate
from .picker import Picker
from .sample import SAMPLER, SampleTab
from .state import AppState
from .theme import CSS, theme
from .train import build_train
from .upscale import UpscaleTab

PUBLIC = ("/healthz",)  # needs no token, says no more than whether the engine works
# Nothing comes from other hosts and nothing goes there. Gradio's page has scripts and styles within it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


def create_app(app_state: AppState) -> App:
    """The application that serves the page; the guard stands outside."""
    page = build_page(app_state)
    page.has_launched = True  # else Gradio takes any file of this machine for one that was uploaded
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> Response:
        return Response(status_code=200 if app_state.engine.health().workers else 503)

    mounted = gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(),
        css=CSS,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        max_file_size=app_state.options.max_upload_mb * 10**6,
        show_error=False,
    )
    return Gate(mounted, page, get_upload_folder())


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


def warm_up(engine: Engine) -> None:
    """Let a worker load the model that the page offers first, so that the first image comes soon."""
    for name in engine.catalogue.names()[:1]:
        with contextlib.suppress(UserError, ServiceError):  # the page says what is wrong with it
            engine.submit(Request("sample", name, options={"sampler": SAMPLER, "steps": 1}))
