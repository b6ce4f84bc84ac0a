"""Every test starts from the same generators and settings, whatever ran before it."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several ranks in a test would share a GPU; before torch looks
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; before triton is imported

import numpy as np
import pytest
import torch as th

from improved_diffusion.logs import logger
from improved_diffusion.training import run
from improved_diffusion.utils.stop_signals import SIGNALS

SETTINGS = ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI", "DIFFUSION_BLOB_LOGDIR",
            "DIFFUSION_TRAINING_TEST")  # fmt: skip

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling this package takes each process that a test starts 0.4 s

# A shell's background job ignores Ctrl-C, and one under nohup a hang-up, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
th.set_num_threads(1)  # the tensors are small, and threads that wait for each other on a busy machine cost more


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage in what the tests import: while they are collected that takes a third of the time, and later
    half a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def own_config(tmp_path_factory):
    """The user's own files, such as the list of trusted programs, are neither read nor changed."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Nothing that a test writes needs to survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """A run that ends draws no curves.png, which takes longer than a small run; tests/logs/test_curves.py draws, and
    tests/cli/test_scripts.py looks for the picture of a run in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_curves", lambda csv_path, png_path, panels: Path(png_path).write_bytes(b"not drawn"))
        yield


@pytest.fixture(autouse=True)
def fresh_start(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    th.default_generator.manual_seed(0)  # th.manual_seed also writes down, for devices, where it was called: it is slow
    np.random.seed(0)
    logger.reset()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    logger.reset()
    for number, handler in handlers.items():  # a command that ends ignores them from then on
        signal.signal(number, handler)
    if "script_helpers" in sys.modules:
        sys.modules["script_helpers"].end_all()


@pytest.fixture
def out_dir(tmp_path):
    """Where a training loop in this test logs and saves."""
    logger.configure(dir=str(tmp_path / "run"), format_strs=["csv"])
    return tmp_path / "run"
