"""The options of the web page and of the service."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra
from .values import path_of, paths_of


@dataclass(frozen=True, kw_only=True)
class WebConfig(Config):
    """Web page."""

    runs: str = extra("runs", "folder of runs, whose models the page offers", parse=path_of)
    model_path: str = extra("", "further models: folders of runs and checkpoints, comma-separated", parse=paths_of)
    data_root: str = extra(
        "data", "folder below which the page trains on, and compares with, folders of images", parse=path_of
    )
    host: str = extra("127.0.0.1", "address to listen on")
    port: int = extra(7860, "port to listen on; 0: any free one", low=0, high=65535)
    max_upload_mb: int = extra(512, "largest file that may be uploaded, in megabytes", low=1, high=100_000)
