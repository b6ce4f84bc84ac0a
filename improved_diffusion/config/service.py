"""Options of the engine that draws for the web page and the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass

from .base import LONGEST_WAIT, Config, extra


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
