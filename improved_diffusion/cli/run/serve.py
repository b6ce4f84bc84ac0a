"""Serve models over HTTP."""

from __future__ import annotations

from typing import Any

from ...config import UserError
from ...config.settings import Serving
from ...utils.terminal import show
from ..parsing import Parsed


def serve(parsed: Parsed[Serving]) -> None:
    """Start the engine, and answer requests until a signal."""
    options = parsed.settings.serve
    app, server, security = _packages()
    access = security.access_for(options, public=app.PUBLIC)
    catalogue = catalogue_of(options)
    listener = server.listen(options)
    from ...service.engine import Engine

    with listener, Engine(catalogue, parsed.settings.engine) as engine:
        application, service = app.create_app(engine, options, access)
        names = catalogue.names()
        show(f"models: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}")
        show(server.announcement(listener, options, access))
        server.serve(application, listener, options, service.stop)


def catalogue_of(options: Any) -> Any:
    """The models that the options name. Raises UserError where there are none."""
    from ...service.catalogue import Catalogue

    if not options.runs and not options.model_path:
        raise UserError("name the models: --runs with the folder of your runs, or --model_path with a checkpoint")
    paths = [path for path in options.model_path.split(",") if path]
    catalogue = Catalogue(options.runs, paths)
    if not catalogue.names():
        raise UserError(f"--runs {options.runs} holds no trained model")
    return catalogue


def _packages() -> tuple[Any, Any, Any]:
    """The modules of the service. Raises UserError where packages of the extra are missing."""
    try:
        from ...service.http import app, security, server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        raise UserError(f"serve needs {error.name}: pip install 'improved_diffusion[serve]'") from None
    return app, server, security
