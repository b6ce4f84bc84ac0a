"""Open the web page."""

from ..config.settings import WebPage
from .command import Command

COMMAND = Command(
    "Open a web page that samples, edits, enlarges, trains and evaluates.",
    WebPage,
    "web:web",
    first=(
        "runs", "model_path", "data_root", "features", "host", "port", "token_file", "max_upload_mb", "max_images",
        "workers",
    ),
    words="model_path",
)  # fmt: skip
