"""Runs as processes: started, found again, stopped, resumed; and what a run's folder says of it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.logs.run_folder import Claims
from improved_diffusion.service import trainings as module
from improved_diffusion.service.commands import Process, launch, read_record
from improved_diffusion.service.run_files import MOST_POINTS
from improved_diffusion.service.trainings import OFFERED, PROCESS_FILE, Trainings

TINY = {
    "data_dir": "digits", "image_size": 8, "channels": 1, "num_channels": 32, "num_res_blocks": 1, "num_heads": 1,
    "channel_mult": "1", "attention_resolutions": "4", "diffusion_steps": 20, "noise_schedule": "cosine",
    "batch_size": 2, "num_workers": 0, "log_interval": 1, "save_interval": 1000, "ema_rate": "0.5",
}  # fmt: skip
PAGE = """
import json, sys
from improved_diffusion.service.trainings import Trainings

print(Trainings(sys.argv[1], sys.argv[2]).start("mine", json.loads(sys.argv[3])))
print("started", flush=True)
sys.stdin.read()
"""


def write_images(folder, count=6):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.RandomState(i).randint(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def places(tmp_path):
    write_images(tmp_path / "data" / "digits")
    return tmp_path / "runs", tmp_path / "data"


@pytest.fixture
def trainings(places):
    made = Trainings(*places)
    yield made
    for name in made.names():
        record = read_record(made.folder(name), PROCESS_FILE)
        if record and record.process.pid != os.getpid():
            record.process.kill()


def wait_for(happened, seconds=120):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.1)


def make_run(trainings, name, log="", rows=(), process=None, config=None, **options):
    """The folder of a run, without training it."""
    folder = trainings.root.path + f"/{name}"
    os.makedirs(folder)
    files = {"log.txt": log, "progress.csv": "", "progress.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    files["config.json"] = json.dumps({"config": {"num_channels": 32, "max_steps": 40, **(config or {})}})
    if process:
        record = {"process": {"pid": process.pid, "started": process.started}, "options": options}
        files[PROCESS_FILE] = json.dumps(record)
    for file, text in files.items():
        with open(f"{folder}/{file}", "w") as f:
            f.write(text)
    return folder


def row(step, **values):
    return {"step": step, "loss": 1 / (step + 1), "samples": 2 * (step + 1), "images_per_second": 4.0, **values}


# Processes


def test_a_run_outlives_the_page_and_is_stopped_and_resumed_bit_for_bit(places, trainings, tmp_path):
    runs, data = places
    options = {**TINY, "max_steps": 2_000_000}
    page = subprocess.Popen(
        [sys.executable, "-c", PAGE, str(runs), str(data), json.dumps(options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert page.stdout.readline().startswith("time per step ")
    for line in page.stdout:
        if line == "started\n":
            break
    page.kill()
    page.communicate()

    wait_for(lambda: trainings.status("mine").step > 1)
    status = trainings.status("mine")
    assert (status.state, status.outside, status.steps) == ("running", False, 2_000_000)
    assert status.loss > 0 and status.images_per_second > 0 and status.peak_gib > 0 and status.seconds_left > 0
    assert trainings.running() == ["mine"]
    with pytest.raises(UserError, match="mine is running"):
        trainings.start("other", options)

    status = trainings.stop("mine")
    assert status.state == "stopped" and "resume" in status.reason
    folder = runs / "mine"
    (stopped,) = {int(path.stem.removeprefix("model")) for path in folder.glob("model*.pt")} - {0}
    assert json.loads((folder / f"manifest{stopped:06d}.json").read_text())["step"] == stopped

    trainings.resume("mine", max_steps=stopped + 3)
    wait_for(lambda: not trainings.status("mine").is_running)
    assert trainings.status("mine").state == "finished"
    assert trainings.status("mine").step == stopped + 2
    wait_for(lambda: not any(state == "Z" for state in states_of_children()))

    whole = trainings.check({**TINY, "max_steps": stopped + 3})
    assert launch([*whole, f"--out_dir={tmp_path / 'whole'}"], str(tmp_path / "whole.txt")).wait(120)
    for name in ("model", "ema_0.5_"):
        one, other = (
            th.load(where / f"{name}{stopped + 3:06d}.pt", weights_only=True) for where in (folder, tmp_path / "whole")
        )
        assert all(th.equal(one[key], other[key]) for key in one)


def states_of_children():
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "state="], capture_output=True, text=True)
    return found.stdout.split()


def test_what_ends_before_training_is_told_and_leaves_no_run(trainings, monkeypatch):
    with pytest.raises(UserError, match="--batch_size 100"):
        trainings.start("mine", {**TINY, "batch_size": 100})
    assert trainings.names() == [] and os.listdir(trainings.root.path) == []


def test_a_run_that_fails_says_why(trainings, monkeypatch):
    monkeypatch.setattr(trainings, "_dry_run", lambda words: "")
    trainings.start("mine", {**TINY, "batch_size": 100})
    wait_for(lambda: not trainings.status("mine").is_running)
    status = trainings.status("mine")
    assert status.state == "failed" and "--batch_size 100" in status.reason
    assert "--batch_size 100" in trainings.log("mine")


def test_a_later_process_of_the_same_number_is_not_the_run(trainings):
    sleeper = subprocess.Popen(["sleep", "100"], start_new_session=True)
    try:
        make_run(trainings, "mine", process=Process(sleeper.pid, "another start"))
        assert not trainings.status("mine").is_running
        with pytest.raises(UserError, match="not running"):
            trainings.stop("mine")
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_run_that_another_program_writes_is_seen_and_left_alone(trainings):
    folder = make_run(trainings, "mine", rows=[row(3)])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        status = trainings.status("mine")
        assert status.state == "running" and status.outside and status.step == 3
        with pytest.raises(UserError, match="another program"):
            trainings.stop("mine")
        with pytest.raises(UserError, match="running"):
            trainings.resume("mine")
    finally:
        holder.communicate("")
    assert not trainings.status("mine").is_running
    with Claims() as claims:  # looking has taken nothing
        claims.claim([folder])


HOLD = """
import sys
from improved_diffusion.logs.run_folder import Claims

with Claims() as claims:
    claims.claim(sys.argv[1:])
    print("held", flush=True)
    sys.stdin.read()
"""


# Names and options


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "-rf", ".hidden", "a\n", "a\0", "a "])
def test_hostile_names_of_runs_are_refused(trainings, name):
    before = os.listdir(trainings.root.path)
    for call in (lambda: trainings.start(name, TINY), lambda: trainings.folder(name), lambda: trainings.stop(name)):
        with pytest.raises(UserError):
            call()
    assert os.listdir(trainings.root.path) == before


@pytest.mark.parametrize("option", ["data_dir", "val_dir", "labels", "init_checkpoint"])
@pytest.mark.parametrize(
    "name", ["..", "../secret", "/etc", "digits/../../secret", "away", "no/such", "a\0b", "gs://x/y"]
)
def test_no_path_leads_out_of_the_roots(trainings, tmp_path, option, name):
    write_images(tmp_path / "secret")
    for root in (trainings.root, trainings.data_root):
        os.symlink(tmp_path / "secret", f"{root.path}/away")
    with pytest.raises(UserError, match=f"--{option}"):
        trainings.check({**TINY, option: name})


def test_a_link_that_stays_below_the_root_is_followed(trainings):
    os.symlink(f"{trainings.data_root.path}/digits", f"{trainings.data_root.path}/same")
    assert f"--data_dir={trainings.data_root.path}/digits" in trainings.check({**TINY, "data_dir": "same"})


@pytest.mark.parametrize("option", ["out_dir", "resume", "resume_checkpoint", "dry_run", "trackers"])
def test_options_of_where_a_run_is_and_where_it_reports_are_not_offered(trainings, option):
    assert option not in OFFERED
    with pytest.raises(UserError, match=f"--{option} cannot be given"):
        trainings.check({**TINY, option: "x"})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"lr": -1}, "--lr"), ({"lr": "fast"}, "--lr"), ({"batch_sise": 4}, "batch_size"), ({"preset": "no"}, "no"),
     ({"keep_every": 5}, "--keep_every"), ({"data_dir": ""}, "--data_dir"),
     ({"noise_schedule": "linear"}, "--diffusion_steps")],
)  # fmt: skip
def test_a_mistake_is_told_at_once(trainings, wrong, named):
    with pytest.raises(UserError, match=named):
        trainings.check({**TINY, **wrong})


def test_options_that_are_left_empty_are_not_given(trainings):
    words = trainings.check({"data_dir": "digits", "preset": "auto", "lr": "", "dropout": None, "batch_size": "4"})
    data_dir = f"--data_dir={trainings.data_root.path}/digits"
    assert sorted(words) == sorted(["train", "--preset=auto", data_dir, "--batch_size=4"])


def test_a_value_is_never_taken_for_a_flag(trainings):
    assert "--ema_rate=0.9" in trainings.check({**TINY, "ema_rate": "0.9"})
    with pytest.raises(UserError):
        trainings.check({**TINY, "ema_rate": "0.9 --out_dir=/tmp"})


def test_a_run_keeps_its_name(trainings):
    make_run(trainings, "mine")
    with pytest.raises(UserError, match="exists already"):
        trainings.start("mine", TINY)


def test_a_run_of_the_command_is_resumed_where_its_data_lie_below_the_root(trainings, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(module, "begin", lambda words, *others: launched.append(words))
    make_run(trainings, "inside", config={"data_dir": f"{trainings.data_root.path}/digits"})
    make_run(trainings, "outside", config={"data_dir": str(tmp_path)})
    make_run(trainings, "upsampler", config={"data_dir": f"{trainings.data_root.path}/digits", "large_size": 64})
    trainings.resume("inside", max_steps=50)
    assert {"train", "--max_steps=50", f"--out_dir={trainings.folder('inside')}", "--resume=auto"} <= set(launched[0])
    for name in ("outside", "upsampler"):
        with pytest.raises(UserError, match=name):
            trainings.resume(name)


# What a folder says


def test_runs_are_the_folders_of_runs_and_no_links(trainings, tmp_path):
    folder = make_run(trainings, "mine")
    os.makedirs(f"{trainings.root.path}/empty")
    os.symlink(folder, f"{trainings.root.path}/linked")
    os.rename(make_run(trainings, "hidden"), f"{trainings.root.path}/.hidden")
    assert trainings.names() == ["mine"]


START = "total batch: 2 images a step (2 per rank x 1 ranks)\nstep 0, loss 1\n"


@pytest.mark.parametrize(
    ("log", "state", "reason"),
    [
        (START + "training: 100% 40/40 [00:01<00:00]\nwrote curves.png\n", "finished", ""),
        (START + "--max_hours 1.0 reached after 12 steps\nsaved model000012.pt\n", "finished", ""),
        (START + "stopped by SIGTERM after 7 steps; --resume auto continues from there\n", "stopped", "after 7 steps"),
        (START + "error: the disk is full\n", "failed", "the disk is full"),
        (START + "Traceback (most recent call last):\n  File x\nRuntimeError: no\n", "failed", "RuntimeError: no"),
        (START, "failed", "killed|kill"),
        (START + "stopped by SIGTERM after 7 steps; x\n" + START, "failed", "kill"),  # resumed, and killed then
        (START + "error: the disk is full\n" + START + "training: 100% 40/40 [\nsampling: 100%\n", "finished", ""),
        ("", "stopped", "missing"),
    ],
)
def test_how_a_run_ended_is_in_its_last_lines(trainings, log, state, reason):
    make_run(trainings, "mine", log=log)
    status = trainings.status("mine")
    assert status.state == state and (reason in status.reason or any(r in status.reason for r in reason.split("|")))


def test_half_a_line_waits_for_its_other_half(trainings):
    folder = make_run(trainings, "mine", rows=[row(0), row(1)])
    line = json.dumps(row(2)) + "\n"
    with open(f"{folder}/progress.jsonl", "a") as f:
        f.write(line[:20])
        f.flush()
        assert trainings.status("mine").step == 1
        f.write(line[20:])
    assert trainings.status("mine").step == 2
    assert trainings.curve("mine", "loss") == ([0, 1, 2], [1, 1 / 2, 1 / 3])


def test_rows_that_a_resumed_run_removes_are_forgotten(trainings):
    folder = make_run(trainings, "mine", rows=[row(i) for i in range(5)])
    assert trainings.status("mine").step == 4
    os.rename(
        make_run(trainings, "other", rows=[row(0), row(1, extra=3.0)]) + "/progress.jsonl", f"{folder}/progress.jsonl"
    )
    assert trainings.status("mine").step == 1
    assert trainings.curve("mine", "extra") == ([1], [3.0])


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", '{"step": null}', '{"step": "x"}', '{"loss": NaN}', "\0\0", "[" * 10**5]
)
def test_damaged_rows_are_left_out(trainings, line):
    folder = make_run(trainings, "mine", rows=[row(0)])
    with open(f"{folder}/progress.jsonl", "a") as f:
        f.write(f"{line}\n{json.dumps(row(1, loss=None))}\n")
    assert trainings.status("mine").step == 1
    assert trainings.curve("mine", "loss") == ([0], [1.0])


def test_a_long_curve_is_thinned_and_ends_with_the_newest_value(trainings):
    make_run(trainings, "mine", rows=[row(i) for i in range(5 * MOST_POINTS + 3)])
    steps, values = trainings.curve("mine", "loss")
    assert MOST_POINTS / 2 < len(steps) <= MOST_POINTS and steps[-1] == 5 * MOST_POINTS + 2
    assert values[-1] == row(steps[-1])["loss"]


def test_the_time_left_follows_from_the_speed(trainings):
    folder = make_run(trainings, "mine", rows=[row(9)])
    with Claims() as claims:
        claims.claim([folder])
        status = trainings.status("mine")
    assert status.seconds_left == pytest.approx((40 - 10) * 2 / 4.0)


@pytest.mark.parametrize("content", ["", "[]", '{"process": 3}', '{"process": {"pid": "x"}, "options": {}}'])
def test_a_damaged_record_is_no_record(trainings, content):
    folder = make_run(trainings, "mine", log=START)
    with open(f"{folder}/{PROCESS_FILE}", "w") as f:
        f.write(content)
    assert trainings.status("mine").state == "failed" and trainings.running() == []


def test_links_in_a_run_are_not_followed(trainings, tmp_path):
    folder = make_run(trainings, "mine")
    (tmp_path / "secret").write_text("error: secret\n")
    (tmp_path / "secret.jsonl").write_text(json.dumps(row(7)) + "\n")
    for name, target in (("log.txt", "secret"), ("console.txt", "secret"), ("progress.jsonl", "secret.jsonl")):
        with open(f"{folder}/{name}", "w"):
            os.unlink(f"{folder}/{name}")
        os.symlink(tmp_path / target, f"{folder}/{name}")
    status = trainings.status("mine")
    assert "secret" not in status.reason + trainings.log("mine") and status.step == 0


def test_previews_come_newest_first(trainings):
    folder = make_run(trainings, "mine")
    os.makedirs(f"{folder}/previews")
    for name in ("step_000100.png", "step_000100_raw.png", "step_002000.png", "step_x.png", ".step_000300.png.1.tmp"):
        open(f"{folder}/previews/{name}", "w").close()
    assert trainings.previews("mine", 2) == ["step_002000.png", "step_000100.png"]


def test_a_signal_does_not_reach_a_process_that_has_ended():
    ended = subprocess.Popen(["sleep", "0"])
    ended.wait()
    Process(ended.pid, "then").send(signal.SIGKILL)
