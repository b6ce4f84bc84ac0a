"""A small model with classes, an engine that has it, and the page on it."""

import asyncio

import numpy as np
import pytest
from model_helpers import save_checkpoint, tiny_settings
from web_helpers import Place

from improved_diffusion.config.service import EngineConfig, WebConfig
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.service.catalogue import Catalogue
from improved_diffusion.service.engine import Engine
from improved_diffusion.web.state import AppState

CLASSES = [str(i) for i in range(10)]


LOOP = asyncio.new_event_loop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same event loop for all tests here, before their fixtures: asyncio.run in other tests leaves none."""
    asyncio.set_event_loop(LOOP)


def pytest_sessionfinish():
    asyncio.set_event_loop(None)
    LOOP.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs: grey digits with classes, images without classes, and a super-resolution model."""
    root = tmp_path_factory.mktemp("web") / "runs"
    digits = tiny_settings(class_cond=True, channels=1)
    for name in ("ema_0.99_000010.pt", "model000010.pt"):
        save_checkpoint(root / "digits" / name, digits, class_names=CLASSES)
    save_checkpoint(root / "plain" / "ema_0.99_000010.pt", tiny_settings())
    large = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    save_checkpoint(root / "super" / "ema_0.99_000010.pt", large)
    return root


@pytest.fixture(scope="session")
def app_state(runs, tmp_path_factory):
    """What the page's tabs share, with an engine that runs."""
    work = tmp_path_factory.mktemp("work")
    options = WebConfig(runs=runs, data_root=work)
    catalogue = Catalogue(str(runs))
    with (
        pytest.MonkeyPatch.context() as patch,
        Engine(catalogue, EngineConfig(device_threads=1, max_queue=8)) as engine,
    ):
        patch.setattr("improved_diffusion.service.catalogue.RESCAN_SECONDS", 0)  # tests add models
        yield AppState(engine, catalogue, options, str(runs), str(work), str(work))


@pytest.fixture
def place(app_state):
    """The tabs, with methods to use them as a browser does."""
    return Place(app_state)


@pytest.fixture(scope="session")
def image():
    """uint8 [8, 8, 1]."""
    return np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
