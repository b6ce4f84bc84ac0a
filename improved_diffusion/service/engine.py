"""The engine: a queue, and worker processes that draw what waits in it."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch as th

from ..config import UserError
from ..config.service import EngineConfig
from ..distributed.devices import find_accelerator
from ..logs import logger
from . import worker
from .catalogue import Catalogue, ModelInfo
from .errors import Busy, Cancelled, Failed, OutOfMemory, Stopping, TimedOut
from .job import Event, Job
from .processes import WorkerProcess
from .queue import FairQueue, Share
from .requests import Request

__all__ = ["Catalogue", "Engine", "Event", "Health", "Job", "ModelInfo", "Request"]

MAX_DEATHS = 3  # of workers that draw the same request; before the last it is drawn alone
MAX_FAILED_STARTS = 5  # of workers, in a row
TEND_SECONDS = 1.0  # between two looks at deadlines and uploads
ABANDONED_SECONDS = 60.0  # that a worker may go on with what nobody waits for
LONGEST_RETRY = 120  # seconds


@dataclass(frozen=True)
class Health:
    """How the engine is.

    :param workers: processes that are ready; `wanted` is how many there should be.
    :param waiting, running: requests.
    :param models: names of the models in memory, those of all workers.
    :param gpu_memory: the free and all bytes of each worker's GPU, by the worker's index, as it last said.
    :param images, batches: drawn since the start; `steps` of samplers are those of all images.
    :param batch_sizes: how many batches had so many images.
    :param restarts: of workers that died; :param memory_full: batches that did not fit.
    """

    state: str  # starting, ready, stopping or stopped
    workers: int
    wanted: int
    devices: tuple[str, ...]
    waiting: int
    running: int
    models: tuple[str, ...]
    gpu_memory: Mapping[int, tuple[int, int]]
    images: int
    steps: int
    batches: int
    batch_sizes: Mapping[int, int]
    done: int
    failed: int
    cancelled: int
    restarts: int
    memory_full: int
    images_per_second: float


class Engine:
    """Draws what requests ask for, several at once. A context manager.

    All jobs are handled by one thread; the methods may be called from any.
    """

    def __init__(self, catalogue: Catalogue, options: EngineConfig | None = None):
        self.catalogue, self.options = catalogue, options or EngineConfig()
        self._queue = FairQueue()
        self._jobs: dict[str, Job] = {}  # not finished yet, by id
        self._lock = threading.RLock()
        self._awake, self._waker = multiprocessing.Pipe(duplex=False)
        self._workers: list[WorkerProcess] = []
        self._thread: threading.Thread | None = None
        self._state = "stopped"
        self._stop_at = math.inf
        self._failed_starts, self._start_at = 0, 0.0
        self._number = 0  # of the last work
        self._largest: dict[str, int] = {}  # how many images of a model fit, where that is less than max_batch
        self._counts = dict.fromkeys(
            ("images", "steps", "batches", "done", "failed", "cancelled", "restarts", "memory_full"), 0
        )
        self._batch_sizes = Counter[int]()
        self._recent: deque[tuple[float, int]] = deque(maxlen=100)  # (when, how many images)

    # For everybody

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the workers; requests may be submitted at once."""
        with self._lock:
            if self._thread is not None:
                return
            self._state, self._stop_at = "ready", math.inf
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Take no more requests, refuse those that wait, finish those that run for up to `timeout` seconds, and end."""
        with self._lock:
            thread = self._thread
            if thread is None:
                return
            self._state, self._stop_at = "stopping", time.monotonic() + timeout
        self._wake()
        thread.join()
        with self._lock:
            self._thread, self._state = None, "stopped"
        self.catalogue.drop_uploads()

    def submit(self, request: Request, *, client: str = "", previews: bool = False) -> Job:
        """Let a request wait for its turn.

        :param client: who asks: clients take turns.
        :param previews: send the images as they look on the way, a few times a second.
        Raises UserError for a request that cannot work, and Busy where too many wait or the engine stops.
        """
        request.check(self.catalogue.describe(request.model), self.options.max_images)
        file = self.catalogue.file(request.model, request.average)
        limit = self.options.time_limit
        job = Job(request, file, client, previews, time.monotonic() + limit if limit else math.inf)
        job.on_cancel(self._wake)
        with self._lock:
            if self._state != "ready":
                raise Busy("the service is stopping: try again later", LONGEST_RETRY)
            if sum(job.started is None for job in self._queue) >= self.options.max_queue:
                raise Busy(f"{self.options.max_queue} requests wait already: try again later", self._retry_after())
            job.tell(Event("queued", position=len(self._queue)))
            self._queue.add(job)
            self._jobs[job.id] = job
        self._wake()
        return job

    def health(self) -> Health:
        """How the engine is."""
        with self._lock:
            ready = [each for each in self._workers if each.device]
            jobs, files = list(self._jobs.values()), {file for each in ready for file in each.held.models}
            return Health(
                state="starting" if self._state == "ready" and not ready else self._state,
                workers=len(ready),
                wanted=self._wanted() if self._state == "ready" else 0,
                devices=tuple(each.device for each in ready),
                waiting=sum(job.started is None for job in jobs),
                running=sum(job.started is not None for job in jobs),
                models=tuple(sorted(map(self.catalogue.name_of, files))),
                gpu_memory={each.index: each.held.gpu for each in ready if each.held.gpu},
                batch_sizes=dict(self._batch_sizes),
                images_per_second=self._rate(),
                **self._counts,
            )

    def _retry_after(self) -> int:
        """The seconds until about half of what waits is drawn."""
        waiting = sum(len(job.todo) for job in self._queue)
        return max(1, min(LONGEST_RETRY, math.ceil(waiting / 2 / max(self._rate(), 1.0))))

    def _rate(self) -> float:
        """Images a second in the last minute."""
        since = time.monotonic() - 60
        recent = [(when, count) for when, count in self._recent if when > since]
        if len(recent) < 2:
            return 0.0
        return sum(count for _, count in recent) / max(time.monotonic() - recent[0][0], 1e-3)

    def _wake(self) -> None:
        with suppress(OSError):  # closed, or full, so that it wakes anyhow
            self._waker.send_bytes(b"")

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._tend():
                sources: list[Any] = [self._awake]
                for each in self._workers:
                    sources += [each.pipe, each.process.sentinel]
                ready = connection.wait(sources, self._patience())
                while self._awake.poll():
                    self._awake.recv_bytes()
                for each in tuple(self._workers):
                    if each.pipe in ready or each.process.sentinel in ready:
                        self._listen(each)
        except Exception as error:  # a fault of this program: nobody may wait for ever
            logger.error(f"the engine failed: {type(error).__name__}: {error}")
            raise
        finally:
            with self._lock:
                self._state = "stopping"
                for job in tuple(self._jobs.values()):
                    self._finish(job, Stopping("the service has stopped"))
            for each in self._workers:
                each.close()
            self._workers.clear()

    def _patience(self) -> float | None:
        """Seconds to wait for news; None without end."""
        return TEND_SECONDS if self._jobs or self._state != "ready" or not self._workers else 60.0

    def _tend(self) -> bool:
        """Do what is due; returns whether the engine goes on."""
        with self._lock:
            now = time.monotonic()
            self._give_up(now)
            self._release(now)
            if self._state == "stopping" and (not self._jobs or now >= self._stop_at):
                return False
            self._start_workers(now)
            self._hand_out()
            self.catalogue.drop_uploads(60 * self.options.idle_minutes)
            return True

    def _give_up(self, now: float) -> None:
        """Finish the jobs that are cancelled, or too late, or have not begun when the engine stops."""
        for job in tuple(self._jobs.values()):
            if job.wants_cancel:
                self._finish(job, Cancelled("cancelled"))
            elif now >= job.deadline:
                self._finish(job, TimedOut(f"not done within {self.options.time_limit:g} seconds"))
            elif self._state == "stopping" and job.started is None:
                self._finish(job, Stopping("the service is stopping: try again later"))

    def _release(self, now: float) -> None:
        """Stop workers that draw what nobody waits for any more."""
        for each in self._workers:
            if each.work is None or any(job.id in self._jobs for job, _ in each.shares):
                continue
            if each.stopped_at is None:
                each.stop_work(now)
            elif now - each.stopped_at > ABANDONED_SECONDS:
                each.process.kill()  # its end is noticed like any other

    def _wanted(self) -> int:
        return self.options.workers or _devices()

    def _start_workers(self, now: float) -> None:
        if now < self._start_at or (self._state != "ready" and not self._jobs):
            return
        taken = {each.index for each in self._workers}
        for index in range(self._wanted()):
            if index not in taken:
                threads = self.options.device_threads or _threads(self._wanted())
                self._workers.append(WorkerProcess(self.options, index, _devices(), threads))

    def _hand_out(self) -> None:
        """Give idle workers what is next."""
        moved = False
        while idle := [each for each in self._workers if each.device and each.work is None]:
            shares = self._queue.take(self._most)
            if not shares:
                break
            moved = True
            file = shares[0][0].file
            chosen = next((each for each in idle if file in each.held.models), idle[0])
            self._number += 1
            chosen.draw(self._number, shares)
            for job, _ in shares:
                if job.started is None:
                    job.started = time.monotonic()
                    job.tell(Event("running"))
        if moved:
            self._tell_positions()

    def _most(self, job: Job) -> int:
        return min(self.options.max_batch, self._largest.get(job.file, self.options.max_batch))

    def _tell_positions(self) -> None:
        for position, job in enumerate(job for job in self._queue if job.started is None):
            if job.position != position:
                job.tell(Event("queued", position=position))

    def _listen(self, each: WorkerProcess) -> None:
        """Take the messages of a worker, or notice its end."""
        try:
            while each.pipe.poll():
                message = each.pipe.recv()
                with self._lock:
                    self._heard(each, message)
        except (EOFError, OSError):
            with self._lock:
                self._lost(each)

    def _heard(self, each: WorkerProcess, message: Any) -> None:
        if isinstance(message, worker.Ready):
            each.device, each.held, self._failed_starts = message.device, message.held, 0
        elif isinstance(message, worker.Step):
            self._advance(each, message)
        elif isinstance(message, worker.Dropped):
            each.held = message.held
        else:
            shares, each.held = each.finish(), message.held
            if isinstance(message, worker.Drawn):
                self._collect(shares, message)
            else:
                self._retry(shares, message.reason, message.text)

    def _advance(self, each: WorkerProcess, step: worker.Step) -> None:
        each.share_done = step.done / step.total
        for place, (job, _) in enumerate(each.shares):
            if job.id not in self._jobs:
                continue
            job.steps = max(1, step.total // each.work.count) if each.work else 1
            job.tell(job.progress(self._under_way(job)))
            if place in step.previews:
                job.tell(Event("preview", preview=step.previews[place]))

    def _under_way(self, job: Job) -> float:
        """How many images' worth of steps of a job are done in the batches that are drawn now."""
        return sum(
            each.share_done * len(numbers) for each in self._workers for mine, numbers in each.shares if mine is job
        )

    def _collect(self, shares: list[Share], drawn: worker.Drawn) -> None:
        count = sum(map(len, drawn.images))
        self._counts["batches"] += 1
        self._batch_sizes[count] += 1
        self._counts["images"] += count
        self._counts["steps"] += drawn.steps
        self._recent.append((time.monotonic(), count))
        for (job, numbers), images in zip(shares, drawn.images):
            if job.id not in self._jobs:
                continue
            job.drawn.update({number: images[i] for i, number in enumerate(numbers)})
            if len(job.drawn) == len(job.numbers):
                self._finish(job)
            else:
                job.tell(job.progress(self._under_way(job)))

    def _retry(self, shares: list[Share], reason: str, text: str) -> None:
        """Draw again what a worker could not draw, in a smaller batch or each request alone; or end the request."""
        count = sum(len(numbers) for _, numbers in shares)
        shares = [(job, numbers) for job, numbers in shares if job.id in self._jobs]
        if reason == "memory":
            self._counts["memory_full"] += 1
            if count > 1:
                self._largest[shares[0][0].file if shares else ""] = count // 2
        elif len(shares) > 1:
            for job, _ in shares:
                job.alone = True
        for job, numbers in reversed(shares):
            if reason == "memory" and count == 1:
                self._finish(job, OutOfMemory("a single image does not fit into memory: choose a smaller size"))
            elif reason == "user" and len(shares) == 1:
                self._finish(job, UserError(text.replace(job.file, job.request.model)))  # paths are not for users
            elif reason == "failed" and len(shares) == 1:
                self._finish(job, Failed(f"drawing failed ({text}): the service's log says more"))
            else:
                self._queue.put_back(job, numbers)

    def _lost(self, each: WorkerProcess) -> None:
        """A worker has ended by itself: draw again what it had, elsewhere."""
        shares = each.finish()
        each.close()
        self._workers.remove(each)
        logger.warn(f"worker {each.index} ended ({each.ending()}): starting another")
        self._counts["restarts"] += 1
        if each.device:
            self._failed_starts = 0
        else:
            self._failed_starts += 1
            self._start_at = time.monotonic() + min(2**self._failed_starts, 60)
        for job, numbers in reversed(shares):
            if job.id not in self._jobs:
                continue
            job.deaths += 1
            job.alone = job.alone or job.deaths >= MAX_DEATHS - 1
            if job.deaths >= MAX_DEATHS:
                self._finish(
                    job, Failed(f"{MAX_DEATHS} workers ended while they drew this: it may need too much memory")
                )
            else:
                self._queue.put_back(job, numbers)
        if self._failed_starts >= MAX_FAILED_STARTS:
            for job in tuple(self._jobs.values()):
                self._finish(job, Failed("workers cannot start: the service's log says why"))

    def _finish(self, job: Job, error: Exception | None = None) -> None:
        self._jobs.pop(job.id, None)
        self._queue.remove(job)
        job.finish(error)
        self._counts[job.state] += 1


def _devices() -> int:
    """How many devices there are: GPUs, or the CPU."""
    found = find_accelerator()
    return 1 if found is None or found.type == "mps" else th.get_device_module(found).device_count()


def _threads(workers: int) -> int:
    """CPU threads of each of several workers; 0: torch's default."""
    if workers == 1 or find_accelerator() is not None or "OMP_NUM_THREADS" in os.environ:
        return 0
    return max(1, th.get_num_threads() // workers)
