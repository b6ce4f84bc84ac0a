"""Open the web page."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from ...config import UserError
from ...config.service import WebConfig
from ...config.settings import WebPage
from ...utils.terminal import show
from ..parsing import Parsed


def web(parsed: Parsed[WebPage]) -> None:
    """Start the engine, and serve the page until a signal."""
    options = parsed.settings.web
    if "runs" not in parsed.given:
        os.makedirs(options.runs, exist_ok=True)  # where the page's own runs go
    with tempfile.TemporaryDirectory(prefix="improved_diffusion_web_") as work_dir:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(work_dir, "gradio")
        page, server, security = _packages()
        access = security.access_for(options, login=True, public=page.PUBLIC, policy=page.POLICY)
        catalogue = _catalogue(options)
        with server.listen(options) as listener:
            from ...service.engine import Engine

            with Engine(catalogue, parsed.settings.engine) as engine:
                state = page.AppState(
                    engine, catalogue, options, os.path.abspath(options.runs), os.path.abspath(options.data_root),
                    work_dir,
                )  # fmt: skip
                page.warm_up(engine)
                application = security.Guard(page.create_app(state), access)
                show(server.announcement(listener, options, access))
                server.serve(application, listener, options, engine.stop, has_lifespan=True)


def _catalogue(options: WebConfig) -> Any:
    from ...service.catalogue import Catalogue

    return Catalogue(options.runs, [path for path in options.model_path.split(",") if path])


def _packages() -> tuple[Any, Any, Any]:
    """The modules of the page. Raises UserError where packages of the extra are missing."""
    try:
        from ...service.http import security, server
        from ...web import page
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        raise UserError(f"web needs {error.name}: pip install 'improved_diffusion[web]'") from None
    return page, server, security
