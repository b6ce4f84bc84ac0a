"""Models of the service's tests, and engines: with workers that are threads of this process, and with real ones."""

import os
import threading
from types import SimpleNamespace

import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings

from improved_diffusion.config.service import EngineConfig
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.service import engine as engines
from improved_diffusion.service import worker
from improved_diffusion.service.catalogue import Catalogue
from improved_diffusion.service.processes import WorkerProcess


class ThreadWorker(WorkerProcess):
    """A worker that is a thread, so that it starts at once; `end` is how it would end as a process."""

    def _start(self, pipe, options, device, threads):
        read, write = os.pipe()

        def run():
            try:
                worker.Worker(pipe, options).run()
            except (OSError, EOFError):
                pass
            finally:
                pipe.close()
                os.close(write)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def join(timeout=None):
            thread.join(timeout)
            process.exitcode = 0

        process = SimpleNamespace(sentinel=read, exitcode=None, join=join, kill=self.pipe.close)
        return process

    def close(self):
        super().close()
        os.close(self.process.sentinel)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs: animals (with classes), plain and nested/large (super-resolution)."""
    root = tmp_path_factory.mktemp("service") / "runs"
    # Attention and layers of several widths.
    animals = tiny_settings(class_cond=True, channel_mult="1,2", attention_resolutions="8,4")
    for name in ("model000005.pt", "ema_0.9_000005.pt"):
        save_checkpoint(root / "animals" / name, animals, class_names=CLASSES, steps=0)
    save_checkpoint(root / "plain/ema_0.99_000001.pt", tiny_settings())
    large = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    save_checkpoint(root / "nested/large/model000002.pt", large)
    return root


@pytest.fixture
def start(runs, monkeypatch):
    """Starts an engine whose workers are threads."""
    monkeypatch.setattr(engines, "WorkerProcess", ThreadWorker)
    started = []

    def start_engine(**options):
        engine = engines.Engine(Catalogue(str(runs)), EngineConfig(**{"max_batch": 8, **options}))
        engine.start()
        started.append(engine)
        return engine

    yield start_engine
    for engine in started:
        engine.stop(0)


@pytest.fixture(scope="session")
def processes(runs):
    """An engine whose worker is a process."""
    with engines.Engine(Catalogue(str(runs)), EngineConfig(max_batch=8)) as engine:
        yield engine
