"""Tests of HTTP: an engine that draws at once, in threads of this process, and clients."""

import asyncio
import contextlib
import io
import itertools
import json
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import httpx
import numpy as np
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.config.service import ServeConfig
from improved_diffusion.sampling.images import Images
from improved_diffusion.service import errors
from improved_diffusion.service.http import server
from improved_diffusion.service.http.app import PUBLIC, create_app
from improved_diffusion.service.http.metrics import COUNTERS, GAUGES
from improved_diffusion.service.http.security import Access, access_for

TOKEN = "a-token-of-these-tests-0123456789"


@dataclass(frozen=True)
class Info:
    name: str
    kind: str = "image"
    size: tuple = (8, 8)
    channels: int = 3
    class_names: tuple = ("cat", "dog")
    num_classes: int = 2
    class_cond: bool = True
    step: int = 20
    averages: tuple = ("0.9999", "raw")
    small_size: tuple | None = None
    diffusion_steps: int = 20
    hides_classes: bool = True
    resize_mode: str = "crop"
    background: str = "white"
    own_steps: int = 0


class Catalogue:
    models: ClassVar = {
        "tiny": Info("tiny"),
        "sub/run": Info("sub/run"),
        "large": Info("large", "super_res", small_size=(4, 4)),
    }

    def names(self):
        return sorted([*self.models, "broken"])

    def path(self, name):
        if name not in self.names():
            raise UserError(f"unknown model {name!r}: choose from: {', '.join(self.names())}")
        return f"/secret/place/{name}.pt"

    def describe(self, name):
        self.path(name)
        if name == "broken":
            raise UserError("/secret/place/broken.pt is no checkpoint")
        return self.models[name]


@dataclass
class Job:
    request: object
    id: str = "job"
    state: str = "waiting"
    seen: list = field(default_factory=list)
    listeners: list = field(default_factory=list)
    outcome: object = None
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_listener(self, callback):
        with self.lock:
            for event in self.seen:
                callback(event)
            self.listeners.append(callback)

    def tell(self, kind, **facts):
        event = SimpleNamespace(
            kind=kind, **{**dict(position=0, done=0, total=0, seconds_left=None, preview=None, error=""), **facts}
        )
        with self.lock:
            if self.ended.is_set():
                return
            if kind in ("done", "failed", "cancelled"):
                self.state = kind
                self.ended.set()
            self.seen.append(event)
            for callback in self.listeners:
                callback(event)

    def result(self, timeout=None):
        assert self.ended.wait(timeout)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.state == "cancelled":
            raise errors.Cancelled("cancelled")
        return self.outcome

    def cancel(self):
        self.tell("cancelled")


def picture(seed, number):
    return np.random.default_rng([seed, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)


class Engine:
    """Draws noise by seed and number; `hold` keeps jobs running, `fail` is the error they end with."""

    def __init__(self, max_queue=100):
        self.catalogue = Catalogue()
        self.jobs, self.stopped, self.max_queue = [], None, max_queue
        self.hold, self.fail, self.stop_waits = threading.Event(), None, False
        self.hold.set()
        self.counter = itertools.count()

    def submit(self, request, *, client="", previews=False):
        if self.stopped is not None:
            raise errors.Busy("the service stops", 30)
        request.check(self.catalogue.describe(request.model), 64)
        if sum(not job.ended.is_set() for job in self.jobs) >= self.max_queue:
            raise errors.Busy("the queue is full", 7)
        job = Job(request, id=str(next(self.counter)))
        self.jobs.append(job)
        threading.Thread(target=self.work, args=(job, previews), daemon=True).start()
        return job

    def work(self, job, previews):
        job.tell("queued", position=1)
        job.state = "running"
        job.tell("running")
        numbers = list(job.request.numbers())
        images = Images(np.stack([picture(job.request.seed, i) for i in numbers]), None, None, numbers)
        job.tell("progress", done=1, total=2, seconds_left=1.0)
        if previews:
            job.tell("preview", preview=images)
        self.hold.wait(20)
        job.outcome = self.fail or images
        job.tell("failed" if self.fail else "done", error=str(self.fail or ""))

    def health(self):
        counts = dict.fromkeys((*GAUGES, *COUNTERS), 3)
        found = {"gpu_memory": {1: (40, 100)}, "batch_sizes": {1: 1, 2: 1}}
        return SimpleNamespace(**counts, **found, models=("tiny",), state="ready")

    def stop(self, timeout=None):
        self.stopped = timeout
        if timeout == 0:
            for job in self.jobs:
                job.cancel()
        if self.stop_waits:
            for job in self.jobs:
                job.ended.wait(timeout)


class Client:
    """A client of an application without a socket."""

    def __init__(self, engine=None, access=None, **options):
        self.engine = engine or Engine()
        self.app, self.service = create_app(
            self.engine, ServeConfig(**options), access or Access(public=frozenset(PUBLIC))
        )

    def __call__(self, method, path, **kwargs):
        async def go():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(go())

    def sample(self, headers=None, **body):
        return self("POST", "/v1/samples", json={"model": "tiny", **body}, headers=headers)

    def edit(self, kind, files, **options):
        path = "/v1/upscale" if kind == "upscale" else f"/v1/edits/{kind}"
        return self("POST", path, files=files, data={"options": json.dumps({"model": "tiny", **options})})


def png(size=(8, 8), mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array if channels > 1 else array[..., 0], mode).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def events(text):
    """[(kind, data)] of a stream."""
    found = []
    for block in text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


class Running:
    """A service in a thread; its signals are calls."""

    def __init__(self, engine=None, stop=True, **options):
        self.engine = engine or Engine()
        self.options = ServeConfig(port=0, **options)
        self.listener = server.listen(self.options)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app, self.service = create_app(self.engine, self.options, access_for(self.options, public=PUBLIC))
        self.server = server.make_server(self.app, self.options, self.service.stop if stop else lambda seconds: None)
        self.thread = threading.Thread(target=server.run, args=(self.server, self.listener))
        self.thread.start()

    def signal(self, number=signal.SIGTERM):
        self.server.handle_exit(number, None)

    def client(self, **kwargs):
        return httpx.Client(base_url=self.url, timeout=20, **kwargs)

    def raw(self, data, seconds=5):
        """What comes back for bytes, until the service closes the connection or `seconds` are over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            found = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(65536):
                    found += part
            return found


@contextlib.contextmanager
def running(engine=None, stop=True, **options):
    """:param stop: whether the engine stops with the service."""
    service = Running(engine, stop, **options)
    try:
        yield service
    finally:
        service.signal()
        service.signal()
        service.thread.join(20)
        assert not service.thread.is_alive()


BODY = json.dumps({"model": "tiny"}).encode()


def post(*lines, body=BODY, path="/v1/samples"):
    head = [
        f"POST {path} HTTP/1.1",
        *(() if any(line.startswith("Host") for line in lines) else ("Host: localhost",)),
        *lines,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def status(reply):
    assert reply.startswith(b"HTTP/1.1 "), reply
    return int(reply.split()[1])


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arrays(answer):
    """The images of an answer that is an npz."""
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content)) as found:
        return found["arr_0"]
