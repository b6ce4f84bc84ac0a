"""Serve models over HTTP."""

from ..config.settings import Serving
from .command import Command

COMMAND = Command(
    "Serve models over HTTP: sampling, editing and upscaling, with progress.",
    Serving,
    "serve:serve",
    first=(
        "runs", "model_path", "host", "port", "token_file", "max_images", "max_batch", "max_queue", "workers",
        "stop_seconds",
    ),
    words="model_path",
)  # fmt: skip
