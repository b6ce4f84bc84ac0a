"""A training run and what it leaves behind."""

import csv
import json
import os
import shutil
import signal

import pytest
from filelock import FileLock, Timeout
from script_helpers import write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints.sets import complete_sets
from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.training import run
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.training.signals import SIGNALS, Stopped
from improved_diffusion.training.tasks import ImageTask

TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1", attention_resolutions="4",
    diffusion_steps=20, noise_schedule="cosine", num_workers=0, batch_size=2, max_steps=1,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 4)


def is_free(folder):
    """Whether somebody else can claim the folder."""
    try:
        with FileLock(os.path.join(folder, ".lock"), timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.parametrize("error", [None, UserError("a mistake"), RuntimeError("a fault"), KeyboardInterrupt()])
def test_a_run_that_has_ended_holds_nothing(error, photos, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    if error is None:
        idf.train(photos, out_dir=folder, **TINY)
    else:

        def fail(loop):
            assert logger.get_dir() == folder
            raise error

        monkeypatch.setattr(TrainLoop, "run_loop", fail)
        with pytest.raises(type(error)):
            idf.train(photos, out_dir=folder, **TINY)
        log = (tmp_path / "run/log.txt").read_text()
        assert f"{type(error).__name__}: a fault" in log or f"error: {error}" in log or "interrupted\n" in log
    assert is_free(folder)
    assert logger.Logger.CURRENT is logger.Logger.DEFAULT


def test_the_folder_is_free_after_a_mistake_before_the_loop(photos, tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(UserError, match="batch_size 100"):
        idf.train(photos, out_dir=folder, **{**TINY, "batch_size": 100})
    assert is_free(folder)


def test_a_run_shows_lines_and_keeps_tables(photos, tmp_path, capsys):
    idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 3, "log_interval": 1})
    shown, kept = capsys.readouterr().out, (tmp_path / "run/log.txt").read_text()
    rows = [line for line in shown.splitlines() if line.startswith("step")]
    assert [row.split(",")[0] for row in rows] == ["step 0", "step 1", "step 2"]
    assert "|" not in "".join(line for line in shown.splitlines() if not line.startswith("training: "))
    assert kept.count("| images_per_second |") == 3 and "\nstep 0" not in kept


def test_log_formats_of_the_environment_win(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,csv")
    idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    assert "| images_per_second |" in capsys.readouterr().out and not (tmp_path / "run/log.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_without_a_word_of_lost_rows(number, photos, tmp_path, capsys, monkeypatch):
    options = {**TINY, "max_steps": 12, "log_interval": 5, "out_dir": str(tmp_path / "run")}
    step, steps = TrainLoop.run_step, []

    def stopping(loop, batch, cond):
        step(loop, batch, cond)
        steps.append(loop.absolute_step)
        if loop.absolute_step == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainLoop, "run_step", stopping)
    idf.train(photos, **options)
    monkeypatch.setattr(TrainLoop, "run_step", step)
    assert "stopped by" in capsys.readouterr().out and steps[-1] == 7
    idf.train(photos, resume="auto", **options)
    text = capsys.readouterr().out
    assert "resumed after 8 steps" in text and "discarded" not in text
    with open(tmp_path / "run/progress.csv", newline="") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["0", "5", "10", "11"]


# The log of a run that goes on


TIMES = {"images_per_second", "data_wait", "peak_gib"}  # these columns are no function of the step


def rows_without_times(folder):
    with open(folder / "progress.csv", newline="") as f:
        in_csv = [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(f)]
    in_json = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in in_csv] == [str(row["step"]) for row in in_json]
    return in_csv


@pytest.mark.parametrize(
    "stops, more", [([7], {}), ([8], {}), ([7, 8], {}), ([7], {"microbatch": 1, "precision": "bf16"})], ids=str
)
def test_rows_hold_what_was_measured_before_the_run_was_stopped(photos, tmp_path, stops, more):
    """A row of 4 steps has the validation of any of them, whether the run was stopped after it or not."""
    options = {**TINY, **more, "log_interval": 4, "save_interval": 3, "val_dir": photos, "val_interval": 7}
    for folder, ends in (("whole", [9]), ("parts", [*stops, 9])):
        for end in ends:
            idf.train(photos, out_dir=str(tmp_path / folder), resume="auto", **{**options, "max_steps": end})
    whole = rows_without_times(tmp_path / "whole")
    assert rows_without_times(tmp_path / "parts") == whole
    assert [bool(row["val_loss"]) for row in whole] == [False, False, True]


def test_rows_go_on_where_a_run_is_resumed_into_another_folder(photos, tmp_path):
    options = {**TINY, "log_interval": 4, "val_dir": photos, "val_interval": 7}
    idf.train(photos, out_dir=str(tmp_path / "first"), **{**options, "max_steps": 7})
    resumed = {**options, "resume": str(tmp_path / "first"), "max_steps": 9}
    idf.train(photos, out_dir=str(tmp_path / "second"), **resumed)
    (row,) = rows_without_times(tmp_path / "second")
    assert row["step"] == "8" and row["val_loss"]


@pytest.mark.parametrize("after", [5, 7])
def test_a_run_that_is_stopped_within_its_first_step_writes_no_row_without_a_step(photos, tmp_path, monkeypatch, after):
    options = {**TINY, "out_dir": str(tmp_path / "run"), "log_interval": 4, "save_interval": 3, "microbatch": 1}
    idf.train(photos, **{**options, "max_steps": after})
    with monkeypatch.context() as patch:
        patch.setattr(run, "build_loop", signalling(signal.SIGUSR1, run.build_loop))
        idf.train(photos, resume="auto", **{**options, "max_steps": 12})
    steps = ["0", "4"] if after == 5 else ["0", "4", "6"]
    assert [row["step"] for row in rows_without_times(tmp_path / "run")] == steps
    idf.train(photos, resume="auto", **{**options, "max_steps": 12})
    assert [row["step"] for row in rows_without_times(tmp_path / "run")] == ["0", "4", "8", "11"]


@pytest.mark.parametrize("resume", ["", "auto"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_its_log_afresh(photos, tmp_path, resume, capsys):
    options = {**TINY, "out_dir": str(tmp_path / "run"), "log_interval": 2, "max_steps": 5, "resume": resume}
    idf.train(photos, **options)
    for path in (tmp_path / "run").glob("*0000*"):
        path.unlink()  # as if it had been killed during its first save
    before = rows_without_times(tmp_path / "run")
    capsys.readouterr()
    idf.train(photos, **options)
    assert rows_without_times(tmp_path / "run") == before
    assert f"discarded {len(before)} rows" in capsys.readouterr().out


def test_a_running_run_holds_its_folder(photos, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TrainLoop, "run_loop", lambda loop: seen.append(is_free(logger.get_dir())))
    with pytest.raises(UserError, match="holds no checkpoint"):
        idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    assert seen == [False]


def test_a_moving_average_is_not_taken_for_a_model_that_starts_at_step_0(photos, tmp_path):
    idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    average = str(tmp_path / "run/ema_0.9999_000000.pt")
    with pytest.raises(UserError, match=r"ema_0\.9999_000000\.pt .*model000000\.pt"):
        idf.train(photos, out_dir=str(tmp_path / "new"), resume_checkpoint=average, **{**TINY, "max_steps": 2})


# Before the folder is made


@pytest.mark.parametrize(
    "wrong", [
        dict(data_dir="nowhere"), dict(batch_size=100), dict(image_size=7, channel_mult="1,1"),
        dict(class_cond=True, num_classes=1), dict(resume_checkpoint="model000010.pt"),
        dict(init_checkpoint="model.pt"), dict(val_dir="nowhere"), dict(total_batch_size=2, batch_size=4),
        dict(label_drop=0.1), dict(resume="elsewhere"),
    ], ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
@pytest.mark.parametrize("checkpoints", ["", "checkpoints"])
def test_a_mistake_leaves_no_folder_behind(photos, tmp_path, monkeypatch, wrong, checkpoints):
    monkeypatch.chdir(tmp_path)
    if checkpoints:
        monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", checkpoints)
    before = sorted(os.listdir())
    with pytest.raises(UserError):
        idf.train(**{"data_dir": photos, "out_dir": "run/deep", **TINY, **wrong})
    assert sorted(os.listdir()) == before


def test_the_log_of_a_run_holds_what_was_said_before_its_folder_was_made(photos, tmp_path):
    idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    lines = (tmp_path / "run/log.txt").read_text().splitlines()
    for phrase in ("logging to", "1 process on", "total batch", "4 images", "parameters", "saved"):
        assert sum(phrase in line for line in lines) == 1, phrase


@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_a_folder_that_cannot_be_made_is_an_error_before_the_images_are_read(photos, tmp_path, place, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(run, "open_data", lambda *args: pytest.fail("the images were read"))
    with pytest.raises(UserError, match=r"a_file is not a folder.*--out_dir"):
        idf.train(photos, out_dir=str(tmp_path / place), **TINY)


# Signals


def signalling(number, function):
    """The function, with a signal to this process in front of it."""

    def call(*args, **kwargs):
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return call


@pytest.fixture
def handlers():
    """Those of the signals are the same afterwards."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("stage", ["open_data", "build_loop", "resolve"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_run_starts_stops_it(photos, tmp_path, monkeypatch, handlers, number, stage):
    monkeypatch.setattr(run, stage, signalling(number, getattr(run, stage)))
    with pytest.raises(Stopped) as ended:
        idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    assert ended.value.code == 75 and not (tmp_path / "run").exists()


def test_a_schedulers_warning_while_a_run_starts_is_kept(photos, tmp_path, monkeypatch, handlers):
    monkeypatch.setattr(run, "open_data", signalling(signal.SIGUSR1, run.open_data))
    assert idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 9}).step == 1


@pytest.mark.parametrize("stage", ["write_curves", "make_trackers"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM], [signal.SIGINT]])
def test_signals_after_the_last_checkpoint_change_nothing(
    photos, tmp_path, monkeypatch, handlers, numbers, first, stage
):
    """Whether the run was stopped by a signal, or has finished."""
    if first and signal.SIGINT in numbers:
        return  # a second Ctrl-C ends a run at once
    stopped = []

    def late(*args, **kwargs):
        for number in numbers:
            os.kill(os.getpid(), number)

    class Tracker:
        def writekvs(self, row):
            if first:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self):
            if stage == "make_trackers":
                late()

    train = run.train
    monkeypatch.setattr(run, "train", lambda *args: stopped.append(train(*args)) or stopped[0])
    monkeypatch.setattr(run, "make_trackers", lambda *args: [Tracker()])
    if stage == "write_curves":
        monkeypatch.setattr(run, stage, late)
    idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 9, "log_interval": 2})
    assert stopped[0].stopped == first
    assert complete_sets(str(tmp_path / "run"), ["0.9999"])[-1] == (0 if first else 9)


# Folders that vanish


@pytest.mark.parametrize("what", ["run", "checkpoints"])
def test_a_folder_that_is_removed_is_made_again_with_its_claim(photos, tmp_path, monkeypatch, capsys, what):
    if what == "checkpoints":
        monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / what))
    folder, seen = tmp_path / what, []

    def remove(loop):
        if loop.step == 3:
            loop.checkpointer.wait()
            shutil.rmtree(folder)
        if loop.step == 7:
            loop.checkpointer.wait()
            seen.append(is_free(folder))

    monkeypatch.setattr(ImageTask, "hooks", lambda *args: [(1, remove)])
    idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 9, "save_interval": 5})
    assert seen == [False] and complete_sets(str(folder), ["0.9999"]) == [5, 9]
    assert (folder / "config.json").exists() and is_free(folder)
    assert f"{folder} had been removed" in capsys.readouterr().out


def test_a_folder_that_another_run_has_taken_is_not_written_into(photos, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def take(loop):
        if loop.step == 3:
            loop.checkpointer.wait()
            shutil.rmtree(folder)
            folder.mkdir()
            held.append(FileLock(str(folder / ".lock"), timeout=0, is_singleton=False))
            held[0].acquire()

    held = []
    monkeypatch.setattr(ImageTask, "hooks", lambda *args: [(1, take)])
    with pytest.raises(UserError, match="another run is writing into"):
        idf.train(photos, out_dir=str(folder), **{**TINY, "max_steps": 9, "save_interval": 5})
    held[0].release()
    assert complete_sets(str(folder), []) == []


@pytest.mark.parametrize("error", [UserError("no rows"), ValueError("no such backend"), ImportError("no matplotlib")])
def test_curves_that_cannot_be_drawn_do_not_fail_a_run(photos, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(run, "write_curves", fail)
    assert idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 3}).step == 3
    assert f"no curves.png: {error}" in (tmp_path / "run/log.txt").read_text()


# Options of a resumed run


@pytest.fixture(scope="module")
def resumable(tmp_path_factory):
    """A finished run, and its images."""
    place = tmp_path_factory.mktemp("resumable")
    photos = write_images(place / "photos", 4)
    idf.train(photos, out_dir=str(place / "run"), **{**TINY, "class_cond": True, "batch_size": 1})
    return place


@pytest.mark.parametrize("computes, precision", [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_what_the_device_computes_in_and_a_resumed_run_keeps_it(
    computes, precision, tmp_path, monkeypatch
):
    photos, run = write_images(tmp_path / "photos", 2), tmp_path / "run"
    for steps, able in ((2, computes), (4, not computes)):
        monkeypatch.setattr("improved_diffusion.distributed.computes_bf16", lambda device, able=able: able)
        options = {**TINY, "precision": "auto", "max_steps": steps, "resume": "auto"}
        assert idf.train(photos, out_dir=str(run), **options).step == steps
        assert json.loads((run / "config.json").read_text())["config"]["precision"] == precision


ACCEPTED = dict(lr=1e-3, seed=3, label_drop=0.1, batch_size=2, data_dir="moved", dropout=0.1, keep_last=1)
REFUSED = dict(
    num_channels=64, image_size=16, noise_schedule="linear", learn_sigma=True, class_cond=False, ema_rate="0.5",
    precision="bf16",
)  # fmt: skip


@pytest.mark.parametrize("name, value", [*ACCEPTED.items(), *REFUSED.items()])
def test_what_a_resumed_run_may_change_is_said_and_the_rest_refused(name, value, resumable, tmp_path, capsys):
    shutil.copytree(resumable / "run", tmp_path / "run")
    photos = resumable / "photos"
    if name == "data_dir":
        value = shutil.copytree(photos, tmp_path / "moved")
    asked = {"data_dir": photos, "resume": "auto", "out_dir": str(tmp_path / "run"), "max_steps": 2, name: value}
    if name in REFUSED:
        with pytest.raises(UserError, match=f"--{name}|ema_{value}"):
            idf.train(**asked)
    else:
        assert idf.train(**asked).step == 2
        assert f"--{name} " in capsys.readouterr().out.split("changed since the checkpoint was written: ")[1]
