"""Options of the web page and of the HTTP service."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from .base import LONGEST_WAIT, Config, extra, with_default
from .values import path_of, paths_of


@dataclass(frozen=True, kw_only=True)
class DoorConfig(Config):
    """Models, address and access."""

    runs: str = extra("", "folder of runs: every model below it can be used, by its folder's name", parse=path_of)
    model_path: str = extra("", "checkpoints or runs to use, separated by commas", parse=paths_of)
    host: str = extra(
        "127.0.0.1", "address to listen on; any but this machine's own (127.0.0.1, ::1, localhost) needs a token"
    )
    port: int = extra(8000, "port to listen on; 0: a free one", low=0, high=65_535)
    token_file: str = extra(
        "",
        "file whose only line is the token that clients must send; empty: the variable IMPROVED_DIFFUSION_TOKEN, or "
        "none",
        parse=path_of,
    )
    allowed_hosts: str = extra(
        "",
        "further names by which clients may call this service, such as those of a proxy, separated by commas; empty: "
        "on this machine's own addresses localhost and those, elsewhere any name",
    )
    max_upload_mb: int = extra(64, "largest request with images, in MB", low=1, high=10_000)
    body_seconds: float = extra(60.0, "seconds that a client may take to send a request", high=LONGEST_WAIT)
    max_connections: int = extra(512, "connections at a time; further ones are told to come back", low=1, high=65_535)
    stop_seconds: float = extra(
        30.0, "seconds that running requests may take to finish after SIGTERM or Ctrl-C", low=0, high=LONGEST_WAIT
    )

    def validate(self) -> None:
        self.require(bool(self.host), "host", "is empty: name an address such as 127.0.0.1, or 0.0.0.0 for all")
        self.require(self.body_seconds > 0, "body_seconds", "must be positive")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the address."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, kw_only=True)
class ServeConfig(DoorConfig):
    """HTTP service."""

    max_steps: int = extra(1000, "steps of one request's sampler", low=1)
    max_pixels: int = extra(
        16_000_000, "pixels of an image that a client sends, and of all images of one request together", low=1
    )
    result_minutes: float = extra(10.0, "minutes that results of streamed requests are kept", high=LONGEST_WAIT / 60)
    result_mb: int = extra(256, "memory for such results, in MB; the oldest are dropped first", low=1, high=10**6)

    def validate(self) -> None:
        super().validate()
        self.require(self.result_minutes > 0, "result_minutes", "must be positive")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """Engine."""

    max_batch: int = extra(32, "images drawn at once, of several requests; halved where memory is full", low=1)
    max_images: int = extra(1000, "images that one request may ask for", low=1)
    max_queue: int = extra(256, "requests that may wait; more are refused", low=1)
    max_models: int = extra(2, "models that each worker keeps in memory", low=1)
    idle_minutes: float = extra(30.0, "minutes until an unused model, or an upload, is dropped", high=LONGEST_WAIT / 60)
    workers: int = extra(0, "worker processes; 0: one for each GPU, or one on a CPU", low=0, high=256)
    device_threads: int = extra(0, "CPU threads of each worker; 0: torch's default, shared by the workers", low=0)
    time_limit: float = extra(
        600.0, "seconds that a request may take, waiting included; 0: no limit", low=0, high=LONGEST_WAIT
    )

    def validate(self) -> None:
        self.require(self.idle_minutes > 0, "idle_minutes", "must be positive")


@dataclass(frozen=True, kw_only=True)
class WebConfig(DoorConfig):
    """Web page."""

    runs: str = with_default(DoorConfig, "runs", "runs")
    port: int = with_default(DoorConfig, "port", 7860)
    max_upload_mb: int = extra(512, "largest upload, of an image or of a model's weights, in MB", low=1, high=10_000)
    max_kept_mb: int = extra(
        4096, "uploads and drawn images that the page keeps for its users, in MB; what was drawn first is removed",
        low=1, high=10**6,
    )  # fmt: skip
    data_root: str = extra(
        "data", "folder below which the page trains on, and compares with, folders of images", parse=path_of
    )
    features: str = extra(
        "", "feature network of the page's evaluations: a .pt2 or .pt program, or inception; empty: none", parse=path_of
    )
    trust_features: bool = extra(False, "allow the program of --features, which can run any code on this machine")
