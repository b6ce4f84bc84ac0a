"""Training that is interrupted, in every way there is: by signals, kills, full disks, numbers that are none."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th
from helpers import ROOT, small_disk
from script_helpers import TINY_IMAGE, call, environment, python, run, start, started_by, wait, wait_for, write_images

from improved_diffusion.checkpoints.sets import complete_sets, problem_of

LABELS = ["0.9999"]
WORKER = Path(__file__).resolve().parents[1] / "survival_worker.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 16)


@pytest.fixture(scope="module")
def training(images):
    return [*TINY_IMAGE, "--data_dir", images, "--total_batch_size", 4, "--log_interval", 5]


def rows(folder):
    with open(folder / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def steps_in_log(folder):
    return [float(row["step"]) for row in rows(folder)]


# Signals


def is_training(folder):
    return lambda: (folder / "manifest000000.json").exists()


def ranks_of(process):
    """Rank -> process id, of the processes that train."""
    found = {}
    for pid in started_by(process):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        numbers = [line.split(b"=")[1] for line in environment if line.startswith((b"PMI_RANK=", b"RANK="))]
        if any(word.endswith(b"image_train.py") for word in command[:3]):
            found[int(numbers[0]) if numbers else 0] = pid
    return found


def assert_stopped(result, folder, number, code):
    """The run said so, ended with the code, and left a whole set of its last step."""
    assert result.code == code, f"{result.out}\n{result.err}"
    (steps,) = re.findall(rf"stopped by {signal.Signals(number).name} after (\d+) steps", result.out)
    newest = complete_sets(str(folder), LABELS)[-1]
    assert problem_of(str(folder), newest) is None
    assert json.loads((folder / f"manifest{newest:06d}.json").read_text())["step"] == int(steps)
    assert not list(folder.glob(".*.tmp"))
    return int(steps)


CASES = [
    ("python", "group", signal.SIGTERM, 75),
    ("python", "group", signal.SIGINT, 75),
    ("mpiexec", "launcher", signal.SIGTERM, 75),
    ("mpiexec", "rank 1", signal.SIGTERM, 75),
    ("torchrun", "launcher", signal.SIGTERM, 1),  # torchrun has no other code for ranks that did not return 0
]
# The same ways with other signals, whose handlers are those of SIGTERM and are tested in test_run.py and below.
MORE = [
    ("python", "launcher", signal.SIGTERM, 75),
    ("python", "group", signal.SIGHUP, 75),
    ("mpiexec", "launcher", signal.SIGUSR1, 75),
    ("mpiexec", "rank 0", signal.SIGTERM, 75),
    ("torchrun", "rank 1", signal.SIGUSR1, 1),
]


@pytest.mark.parametrize(
    "launcher, target, number, code", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_documented_code(
    launcher, target, number, code, training, tmp_path
):
    folder = tmp_path / "run"
    workers = 1 if target == "group" else 0  # the processes that read images get the signal too
    args = [*training, "--out_dir", folder, "--num_workers", workers, "--save_interval", 1000]
    process = start(launcher, 2, "image_train", *args, cwd=tmp_path)
    wait_for(is_training(folder), "first checkpoint", process)
    if target == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if target == "launcher" else ranks_of(process)[int(target[-1])], number)
    steps = assert_stopped(wait(process), folder, number, code)
    if launcher == "mpiexec" and target == "rank 1":
        resumed = call("image_train", "--out_dir", folder, "--resume", "auto", "--max_steps", steps + 1, cwd=tmp_path)
        assert f"resumed after {steps} steps" in resumed.succeed().out


def test_ranks_whose_launcher_is_killed_save_and_end(training, tmp_path):
    folder = tmp_path / "run"
    process = start("torchrun", 2, "image_train", *training, "--out_dir", folder, cwd=tmp_path)
    wait_for(is_training(folder), "first checkpoint", process)
    process.kill()  # the ranks go on, and keep its output open until they end
    assert_stopped(wait(process), folder, signal.SIGTERM, -signal.SIGKILL)


def test_a_schedulers_warning_before_the_first_step_is_not_lost(training, tmp_path):
    """MPI libraries have a handler for it that does nothing."""
    folder = tmp_path / "run"
    process = start("mpiexec", 2, "image_train", *training, "--out_dir", folder, cwd=tmp_path)
    wait_for(lambda: "total batch" in read(folder / "log.txt"), "start", process)
    os.kill(ranks_of(process)[0], signal.SIGUSR1)
    assert assert_stopped(wait(process), folder, signal.SIGUSR1, 75) <= 3


def read(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("stuck_in", ["python", "torch"])
def test_a_second_ctrl_c_ends_at_once(stuck_in, tmp_path):
    """In the midst of a step that takes for ever, in Python or, where Python's handlers are not called, in C++."""
    process = start("python", 1, WORKER, tmp_path / "run", stuck_in, 0, cwd=tmp_path, env=with_tests())
    wait_for(lambda: (tmp_path / "run" / "stuck").exists(), "step that takes for ever", process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    result = wait(process, 15)
    assert result.code == 130 and "Traceback" not in result.err
    if stuck_in == "python":
        assert "interrupted: training stopped after 2 steps; last checkpoint: " in result.err


def test_two_runs_may_not_write_into_one_folder(training, tmp_path):
    folder = tmp_path / "run"
    process = start("python", 1, "image_train", *training, "--out_dir", folder, cwd=tmp_path)
    wait_for(is_training(folder), "first checkpoint", process)
    second = call("image_train", *training, "--out_dir", folder, "--resume", "auto", cwd=tmp_path)
    assert second.code == 1
    assert second.err == (
        f"error: another run is writing into {folder}: wait until it has ended, or choose another --out_dir\n"
    )
    os.kill(process.pid, signal.SIGTERM)
    assert_stopped(wait(process), folder, signal.SIGTERM, 75)


# Errors


@pytest.mark.parametrize(
    "launcher, place, ranks",
    [("mpiexec", "hook", "01"), pytest.param("torchrun", "data", "0", marks=pytest.mark.slow)],
)
def test_an_error_of_rank_0_ends_several_ranks_with_a_checkpoint(launcher, place, ranks, tmp_path):
    result = run(launcher, 2, WORKER, tmp_path / "run", place, ranks, cwd=tmp_path, env=with_tests())
    assert result.code != 0 and "an odd image" in result.err
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0, 5], result.out


def test_an_error_of_another_rank_alone_ends_all_in_time(tmp_path):
    result = run("mpiexec", 2, WORKER, tmp_path / "run", "data", "1", cwd=tmp_path, env=with_tests())
    assert result.code != 0 and "an odd image" in result.err
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0]


# Kills


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, kills):
    """SIGKILL to all processes of a two-rank run, half of the times in the midst of a save."""
    argv = [sys.executable, str(ROOT / "benchmarks/kill_and_resume.py"), "--kills", str(kills), "--out", "result.json"]
    result = run_plain(argv, tmp_path)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["differences"] == [] and found["kills"] == kills
    assert found["in_the_midst_of_a_save"] >= max(kills // 4, 1)
    assert {name.rstrip("0123456789").split("0")[0] for name in found["files"]} >= {"model", "opt"}


def run_plain(argv, cwd):
    return subprocess.run(argv, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=850)


# Damaged checkpoints


@pytest.fixture(scope="module")
def finished(training, tmp_path_factory):
    """A run of eight steps with sets 0, 4 and 8."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    args = [*training, "--out_dir", folder, "--save_interval", 4, "--max_steps", 8]
    call("image_train", *args, cwd=folder.parent).succeed()
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder, *args):
    return call("image_train", "--out_dir", folder, "--resume", "auto", "--max_steps", 9, *args, cwd=folder.parent)


@pytest.mark.parametrize("name", ["model000008.pt", "ema_0.9999_000008.pt", "opt000008.pt", "manifest000008.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_newest_set_is_passed_over_with_a_message(name, damage, copied):
    data = bytearray((copied / name).read_bytes())
    if damage == "cut":
        del data[len(data) * 2 // 3 :]
    else:
        data[len(data) // 2] ^= 0x10
    (copied / name).write_bytes(data)
    result = resume(copied).succeed()
    if name.endswith(".json") and damage == "flipped":
        assert "resumed after" in result.out  # a digit of a checksum, or of a name: some set is whole
        return
    assert f"warning: skipped the damaged checkpoint of step 8: {copied / name} " in result.out
    assert "resumed after 5 steps" in result.out
    assert "training: 100% 9/9" in result.out


@pytest.mark.parametrize("name", ["model000008.pt", "ema_0.9999_000008.pt", "opt000008.pt", "manifest000008.json"])
def test_a_newest_set_without_a_part_is_not_there(name, copied):
    (copied / name).unlink()
    assert "resumed after 5 steps" in resume(copied).succeed().out


def test_a_damaged_set_that_was_asked_for_by_name_is_an_error(copied):
    with open(copied / "opt000008.pt", "r+b") as f:
        f.truncate(1000)
    result = call("image_train", "--out_dir", "new", "--resume", copied / "model000008.pt", cwd=copied.parent)
    assert result.code == 1
    assert f"{copied}/opt000008.pt has 1000 bytes, not the " in result.err and f"--resume {copied} takes" in result.err


@pytest.mark.parametrize("name", ["model000004.pt", "ema_0.9999_000004.pt", "opt000004.pt"])
def test_any_file_of_a_set_names_it(name, finished, training, tmp_path):
    args = [*training, "--out_dir", "new", "--resume", finished / name, "--max_steps", 6]
    assert "resumed after 5 steps" in call("image_train", *args, cwd=tmp_path).succeed().out


def test_a_run_that_goes_back_renames_the_newer_checkpoints(copied):
    args = ["--out_dir", copied, "--resume", copied / "model000000.pt", "--max_steps", 3]
    result = call("image_train", *args, cwd=copied.parent).succeed()
    assert (copied / "model000008.pt.newer").exists()
    assert "manifest000004.json, manifest000008.json" in result.out
    assert complete_sets(str(copied), LABELS) == [0, 3]
    assert "resumed after 3 steps" in resume(copied).succeed().out


def test_the_set_that_a_run_was_resumed_from_is_not_written_over(copied):
    """It has eight steps, and the one of that number that comes at once would have nine."""
    before = (copied / "opt000008.pt").read_bytes()
    result = resume(copied, "--save_interval", 4, "--max_steps", 10).succeed()
    assert "resumed after 8 steps" in result.out and complete_sets(str(copied), LABELS) == [0, 4, 8, 10]
    assert (copied / "opt000008.pt").read_bytes() == before


def test_what_differs_from_the_checkpoint_is_an_error_or_is_said(copied):
    result = resume(copied, "--num_channels", 64)
    assert result.code == 1 and "--num_channels 64 contradicts" in result.err and "--num_channels 32" in result.err
    result = resume(copied, "--lr", "0.0003").succeed()
    assert "changed since the checkpoint was written: --lr 0.0001 -> 0.0003, --max_steps 8 -> 9" in result.out


def test_rows_after_the_checkpoint_are_written_again(finished, training, tmp_path):
    """A run killed after its last save had written more rows."""
    args = [*training, "--log_interval", 1, "--out_dir", "run", "--save_interval", 4]
    call("image_train", *args, "--max_steps", 8, cwd=tmp_path).succeed()
    for path in (tmp_path / "run").glob("*000008.*"):
        path.unlink()
    result = call("image_train", "--out_dir", "run", "--resume", "auto", cwd=tmp_path).succeed()
    assert "discarded 3 rows" in result.out  # those of steps that the checkpoint does not have
    assert steps_in_log(tmp_path / "run") == list(range(8))
    lines = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))


# Full disks


def test_a_disk_that_fills_up_ends_the_run_after_three_saves_and_keeps_the_older_sets(training, tmp_path):
    with small_disk(13_000) as disk:  # two sets and a half
        args = [*training, "--out_dir", disk / "run", "--save_interval", 3]
        result = python("image_train", *args, cwd=tmp_path)
        assert result.code == 1
        saved = complete_sets(str(disk / "run"), LABELS)
        assert saved and all(problem_of(str(disk / "run"), step) is None for step in saved)
        assert result.out.count("saving failed and will be retried") == 2
        last = f"last good checkpoint: {disk}/run/model{saved[-1]:06d}.pt"
        assert "error: 3 saves in a row have failed" in result.err and "No space left on device" in result.err
        assert last in result.err and "Traceback" not in result.err
        for path in (disk / "run").glob(f"*{saved[0]:06d}.*"):
            path.unlink()
        steps = json.loads((disk / "run" / f"manifest{saved[-1]:06d}.json").read_text())["step"]
        resumed = call("image_train", "--out_dir", disk / "run", "--resume", "auto", "--max_steps", steps + 1,
                       "--keep_last", 1, cwd=tmp_path)  # fmt: skip
        assert f"resumed after {steps} steps" in resumed.succeed().out


def test_a_disk_that_is_full_for_a_while_costs_no_row_and_no_step(training, tmp_path):
    with small_disk(14_000) as disk:
        folder = disk / "run"
        args = [*training, "--out_dir", folder, "--save_interval", 50, "--log_interval", 1, "--keep_last", 1]
        process = start("python", 1, "image_train", *args, "--max_steps", 400, cwd=tmp_path)
        wait_for(is_training(folder), "first checkpoint", process)
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(4096))
            except OSError:
                pass
        time.sleep(1.0)
        before = len(rows(folder))
        ballast.unlink()
        result = wait(process).succeed()
        assert before < 400
        assert steps_in_log(folder) == list(range(400))
        assert complete_sets(str(folder), LABELS)[-1] == 400
        assert "No space left on device" in result.out + result.err


# Numbers that are none


# One rank's share of these is tested in test_loop.py and test_dry_run.py.
ONE_RANK = pytest.param("python", 1, marks=pytest.mark.slow)


@pytest.mark.parametrize("launcher, ranks", [ONE_RANK, ("mpiexec", 2)])
def test_one_bad_step_is_skipped_on_all_ranks(launcher, ranks, tmp_path):
    run(launcher, ranks, WORKER, tmp_path / "run", 3, 3, cwd=tmp_path, env=with_tests()).succeed()
    assert [float(row["skipped_steps"]) for row in rows(tmp_path / "run")] == [0, 0, 0.5, 0, 0, 0]
    parameters = [th.load(tmp_path / "run" / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    assert all(th.equal(p, parameters[0]) and th.isfinite(p).all() for p in parameters)


@pytest.mark.parametrize(
    "launcher, ranks", [ONE_RANK, ("mpiexec", 2), pytest.param("torchrun", 2, marks=pytest.mark.slow)]
)
def test_bad_steps_for_ever_end_all_ranks_with_one_message(launcher, ranks, tmp_path):
    result = run(launcher, ranks, WORKER, tmp_path / "run", 3, 99, cwd=tmp_path, env=with_tests())
    assert result.code != 0
    message = (
        "4 steps in a row had no finite loss and gradient (--max_bad_steps 4), the first at step 3: resume from the "
        f"last good checkpoint, {tmp_path}/run/model000000.pt"
    )
    assert result.err.count(message) == 1 and "train_util.py" not in result.err  # torchrun has a traceback of its own


def with_tests():
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).resolve().parents[1]}"}


# Before it starts


@pytest.mark.parametrize("launcher, ranks", [ONE_RANK, ("mpiexec", 2)])
def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(launcher, ranks, training, tmp_path):
    args = [*training, "--out_dir", "run", "--dry_run", "--max_steps", 1000, "--save_interval", 100]
    result = run(launcher, ranks, "image_train", *args, cwd=tmp_path).succeed()
    text = result.out[result.out.rindex("dry run:") :]
    for pattern in (
        r"time per step +\d.* s \(.* images/s; measured\)",
        r"time in all +\d+\.\d\d hours to --max_steps 1,000",
        r"peak memory +[\d.]+ [MG]iB of \d+\.\d GiB",
        rf"largest microbatch +\d+ or more \(estimated; now {4 // ranks}\)",
        r"checkpoints +4.88 MiB each, 11 of them at --max_steps 1,000: 53.6 MiB; \d+\.\d GiB are free",
    ):
        assert re.search(pattern, text), f"{pattern} is not in\n{text}"
    assert result.out.count("time per step") == 1 and not (tmp_path / "run").exists()
