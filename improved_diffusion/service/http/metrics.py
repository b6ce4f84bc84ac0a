"""Prometheus metrics, in a registry of the application's own, and one line in the log for each request.

Routes stand there by their patterns: a request's path, its query, headers and body are neither logged nor counted.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from ...logs import logger
from .security import App, Receive, Scope, Send

PREFIX = "improved_diffusion"
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_QUIET = ("/healthz", "/healthz/live", "/metrics")
# Fields of the engine's Health: what is so now, and what only grows.
GAUGES = {
    "workers": "Worker processes that are ready",
    "waiting": "Requests that wait in the queue",
    "running": "Requests that are being drawn",
    "images_per_second": "Images drawn a second, in the last minute",
}
COUNTERS = {
    "images": "Images drawn",
    "steps": "Steps of samplers, one for each image: evaluations of the network, but for solvers that need several",
    "batches": "Batches drawn",
    "done": "Requests for images that were answered with them",
    "failed": "Requests for images that failed",
    "cancelled": "Requests for images that were cancelled",
    "restarts": "Worker processes that died and were started again",
    "memory_full": "Batches that did not fit into memory",
}


class Metrics:
    """What is counted of one application."""

    def __init__(self, health: Callable[[], Any]):
        self.registry = CollectorRegistry()
        names = ("route", "method", "status")
        self.requests = Counter(f"{PREFIX}_requests", "Requests answered", names, registry=self.registry)
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds", "Seconds to the reply's end", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.open = Gauge(f"{PREFIX}_open_requests", "Requests that are being answered", registry=self.registry)
        self.registry.register(_OfEngine(health))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _OfEngine:
    """The engine's numbers, taken when they are asked for."""

    def __init__(self, health: Callable[[], Any]):
        self.health = health

    def collect(self) -> Iterator[Any]:
        found = self.health()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, getattr(found, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, getattr(found, name))
        yield GaugeMetricFamily(f"{PREFIX}_models", "Models in memory", len(found.models))
        yield _batch_sizes(found.batch_sizes)
        yield from _gpu_memory(found.gpu_memory)
        text = "Resident memory of the service and its workers; nothing where the system does not say"
        yield GaugeMetricFamily(f"{PREFIX}_memory_bytes", text, resident_bytes())

    def describe(self) -> list[Any]:
        return []


def _batch_sizes(found: Mapping[int, int]) -> HistogramMetricFamily:
    """A histogram of how many batches have so many images."""
    up_to = [(str(most), sum(n for size, n in found.items() if size <= most)) for most in BATCH_SIZES]
    buckets = [*up_to, ("+Inf", sum(found.values()))]
    images = sum(size * n for size, n in found.items())
    return HistogramMetricFamily(f"{PREFIX}_batch_images", "Images of a batch", buckets=buckets, sum_value=images)


def _gpu_memory(found: Mapping[int, tuple[int, int]]) -> Iterator[GaugeMetricFamily]:
    """The memory of each worker's GPU, as it was after its last batch."""
    used = GaugeMetricFamily(f"{PREFIX}_gpu_used_bytes", "GPU memory in use, by all programs", labels=["worker"])
    total = GaugeMetricFamily(f"{PREFIX}_gpu_total_bytes", "GPU memory", labels=["worker"])
    for worker, (free, size) in found.items():
        used.add_metric([str(worker)], size - free)
        total.add_metric([str(worker)], size)
    yield from (used, total)


class Observed:
    """The middleware that counts requests and logs them: outside of the guard, whose refusals count too."""

    def __init__(self, app: App, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, time.monotonic()

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self.metrics.open.track_inprogress():
                await self.app(scope, receive, noting)
        finally:
            self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.requests.labels(route, method, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if route not in _QUIET or status != 200:
            client = (scope.get("client") or ("-",))[0]
            logger.log(f"{client} {method} {route} {status} {seconds:.3f} s")


def resident_bytes() -> int:
    """The memory of this process and those that it has started, by Linux; 0 elsewhere."""
    found = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with suppress(OSError), open(f"/proc/{pid}/statm") as f:  # a process may have ended
            found += int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found
