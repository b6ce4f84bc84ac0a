"""TensorBoard and W&B as outputs of the logger."""

import builtins
import io
import json
import os
import struct
import subprocess
import sys

import helpers
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from improved_diffusion import distributed
from improved_diffusion.config import TRACKERS, UserError
from improved_diffusion.logs import logger, trackers

# protobuf and the packages built on it warn about themselves on some versions of Python
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(run_dir, key):
    return [(event.step, event.value) for event in events(run_dir).Scalars(key)]


def make(run_dir, name, resume_step=0):
    [tracker] = trackers.make_trackers([name], str(run_dir), {"lr": 1e-4, "noise_schedule": "cosine"}, resume_step)
    return tracker


# Which


def test_the_trackers_are_those_of_the_option():
    assert tuple(trackers.TRACKERS) == TRACKERS


def test_rank_0_alone_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    assert trackers.make_trackers(["tensorboard", "wandb"], str(tmp_path), {}) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, name, module):
    original = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == module:
            raise ImportError(f"No module named {name!r}")
        return original(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"--trackers {name} .*pip install 'improved_diffusion\[{name}\]'"):
        trackers.make_trackers([name], str(tmp_path), {})


# TensorBoard


def test_tensorboard_gets_rows_and_images(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])
    logger.add_output(make(tmp_path, "tensorboard"))
    images = {}
    for step in (0, 10, 20):
        logger.logkvs({"step": step, "loss": 1 / (step + 1), "grad": float("nan" if step == 10 else step), "t": "a"})
        logger.dumpkvs()
    for channels in (1, 2, 3, 4):
        images[channels] = np.random.randint(0, 256, (6, 8, channels), dtype=np.uint8)
        logger.log_image(f"samples{channels}", images[channels], 20)
    logger.logkv("val_bpd", 3.5)  # a row without a step belongs to the last one
    logger.dumpkvs()
    logger.reset()
    assert scalars(tmp_path, "loss") == [(step, pytest.approx(1 / (step + 1), rel=1e-6)) for step in (0, 10, 20)]
    assert scalars(tmp_path, "grad") == [(0, 0.0), (20, 20.0)]
    assert scalars(tmp_path, "val_bpd") == [(20, 3.5)]
    tags = events(tmp_path).Tags()
    assert set(tags["scalars"]) == {"loss", "grad", "val_bpd"}
    assert set(tags["images"]) == {f"samples{channels}" for channels in images}
    accumulated = events(tmp_path)
    for channels, expected in images.items():
        [event] = accumulated.Images(f"samples{channels}")
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            decoded = np.asarray(picture)
        assert event.step == 20
        np.testing.assert_array_equal(decoded, expected if channels > 1 else np.repeat(expected, 3, axis=2))


@pytest.mark.parametrize("resume_step", [0, 20])
def test_tensorboard_shows_no_step_of_a_resumed_run_twice(tmp_path, resume_step):
    for start, value in ((0, 1.0), (resume_step, 2.0)):
        tracker = make(tmp_path, "tensorboard", start)
        for step in range(start, 50, 10):
            tracker.writekvs({"step": step, "loss": value})
        tracker.close()
    assert scalars(tmp_path, "loss") == [(step, 1.0 if step < resume_step else 2.0) for step in range(0, 50, 10)]


def fill(path):
    with open(path, "wb", buffering=0) as f:
        try:
            while True:
                f.write(b"x" * 512)
        except OSError:
            pass


@pytest.fixture
def small_disk():
    with helpers.small_disk(256) as folder:
        yield folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread
def test_tensorboard_survives_a_full_disk(small_disk, capsys, monkeypatch):
    monkeypatch.setattr(trackers.TensorBoardOutput, "FLUSH_SECONDS", 0)
    tracker = make(small_disk, "tensorboard")
    tracker.writekvs({"step": 0, "loss": 0.0})
    tracker.writer.flush()
    fill(small_disk / "filler")
    image = np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)
    for step in range(1, 30):
        tracker.writeimage("samples", image, step)
        tracker.writekvs({"step": step, "loss": float(step)})
    assert tracker.failing
    before = len(os.listdir(small_disk / "tensorboard"))
    assert capsys.readouterr().out.count("warning: TensorBoard failed") == 1
    (small_disk / "filler").unlink()
    for step in range(30, 33):
        tracker.writekvs({"step": step, "loss": float(step)})
    tracker.close()
    assert not tracker.failing and len(os.listdir(small_disk / "tensorboard")) == before + 1
    values = scalars(small_disk, "loss")
    assert values[0] == (0, 0.0) and values[-3:] == [(30, 30.0), (31, 31.0), (32, 32.0)]


# Weights & Biases


class Broken(trackers.Tracker):
    name = "Test"

    def __init__(self):
        super().__init__()
        self.works, self.got = False, []

    def _send(self, scalars, step):
        if not self.works:
            raise ConnectionError("network gone")
        self.got.append((step, scalars))

    def _send_image(self, name, image, step):
        raise BrokenPipeError

    def _finish(self):
        raise RuntimeError("never connected")


def test_a_tracker_that_fails_is_told_once_in_each_spell_and_ends_nothing(capsys):
    tracker = Broken()
    for tracker.works in (False, False, True, False, False):
        tracker.writekvs({"step": 3, "loss": 1.0})
    tracker.writeimage("x", None, 1)
    tracker.close()
    assert tracker.got == [(3, {"loss": 1.0})]
    out = capsys.readouterr().out
    assert out.count("warning: Test failed") == 2 and "network gone" in out


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without network, account and the user's files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


WANDB_RUN = """
import sys
import numpy as np
from improved_diffusion.logs import logger, trackers
run_dir, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
logger.configure(run_dir, format_strs=["log"])
for tracker in trackers.make_trackers(["wandb"], run_dir, {"noise_schedule": "cosine"}, start):
    logger.add_output(tracker)
for step in range(start, stop, 10):
    logger.logkvs({"step": step, "loss": 1.5 * step, "bad": float("inf")})
    logger.dumpkvs()
for channels in (1, 2, 3, 4):
    logger.log_image("samples", np.full((6, 8, channels), 7, np.uint8), stop)
logger.reset()
"""


def wandb_run(*args, **settings):
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL, env={**os.environ, **settings},
    )  # fmt: skip


def log_records(data):
    """The records of a log in LevelDB's format, which a .wandb file is behind its first 7 bytes."""
    start, record = 7, b""
    while start + 7 <= len(data):
        if 32768 - start % 32768 < 7:  # too short for a header: the block's end is padding
            start += 32768 - start % 32768
        _, length, kind = struct.unpack("<IHB", data[start : start + 7])
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(path):
    """The logged rows and the config in a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, config = [], {}
    for data in log_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        if record.HasField("run"):
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
    return rows, config


def test_wandb_offline_gets_the_rows_and_a_resumed_run_continues_it(tmp_path, offline):
    run_dir = tmp_path / "my_run"
    for start, stop in ((0, 30), (20, 50)):
        done = wandb_run(run_dir, start, stop)
        assert done.returncode == 0, done.stderr
        assert "failed" not in (run_dir / "log.txt").read_text()
    note = json.loads((run_dir / "wandb_run.json").read_text())
    assert note["project"] == "improved_diffusion"
    paths = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in paths] == [f"run-{note['id']}.wandb"] * 2  # one run, in two parts
    assert len(list(run_dir.glob("wandb/offline-run-*/files/media/images/*.png"))) == 8
    rows, config = history(paths[0])
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(0, 0.0), (10, 15.0), (20, 30.0)]
    assert all("bad" not in row for row in rows) and config["noise_schedule"] == "cosine"
    assert [row["step"] for row in rows if "samples" in row] == [30] * 4


def test_wandb_without_a_key_is_an_error_and_asks_nobody(tmp_path, offline):
    """Even where there is a terminal to ask on."""
    import pty

    terminal, inner = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run"), "0", "10"],
            cwd=ROOT, stdin=inner, stdout=subprocess.PIPE, stderr=inner, timeout=100,
            env={**os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")},
        )  # fmt: skip
        os.close(inner)
        said = b""
        try:
            while chunk := os.read(terminal, 65536):
                said += chunk
        except OSError:  # the end, on Linux
            pass
    finally:
        os.close(terminal)
    assert done.returncode == 1
    assert b"UserError: W&B does not start: " in said and b"`wandb login`" in said and b"WANDB_MODE=offline" in said


def test_a_damaged_note_of_the_wandb_run_is_named(tmp_path):
    (tmp_path / "wandb_run.json").write_text('{"id')
    with pytest.raises(UserError, match=r"wandb_run\.json is damaged: remove it"):
        make(tmp_path, "wandb")
