"""The processes that read images: they end with their program, and their end does not end it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image
from script_helpers import ROOT, TIMEOUT, environment, wait_for, write_images

from improved_diffusion.config import UserError
from improved_diffusion.data import stream as stream_module
from improved_diffusion.data import workers
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream, load_data
from improved_diffusion.data.workers import BatchReader
from improved_diffusion.distributed import watchdog

BATCH = "import sys\nfrom improved_diffusion.image_datasets import load_data\n"
BATCH += "def load(**kwargs):\n    return load_data(data_dir=sys.argv[1], batch_size=2, image_size=8, **kwargs)\n"


@pytest.fixture(autouse=True)
def deaths_are_seen_soon(monkeypatch):
    """torch looks every 5 seconds whether a worker has ended."""
    iterator = th.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.3,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("data"), 40, size=(8, 8)))


def open_stream(folder, **kwargs):
    return load_data(data_dir=folder, batch_size=4, image_size=8, **{"num_workers": 2, **kwargs})


def expected(folder, steps):
    data = open_stream(folder, num_workers=0)
    return [next(data)[0] for _ in range(steps)]


def assert_same(batches, others):
    assert len(batches) == len(others) and all(th.equal(one, two) for one, two in zip(batches, others))


def processes(data):
    return list(workers._workers_of(data.reader.batches))


# Programs end


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def start(code, folder):
    return subprocess.Popen([sys.executable, "-c", BATCH + code, folder], cwd=ROOT, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


ENDINGS = {
    "one batch": ("data = load()\nnext(data)", 0, ""),
    "two streams": ("one, two = load(num_workers=2), load()\nnext(one), next(two)", 0, ""),
    "in a function": ("def f():\n    data = load()\n    return next(data), 1 / 0\nf()", 1, "ZeroDivisionError"),
    "in a thread": ("import threading\ndata = load()\nthread = threading.Thread(target=lambda: next(data))\n"
                    "thread.start()\nthread.join()", 0, ""),
    "SystemExit": ("data = load()\nfor batch in data:\n    sys.exit(3)", 3, ""),
    "Ctrl-C": ("import os, signal\ndata = load()\nnext(data)\nos.kill(os.getpid(), signal.SIGINT)\n"
               "import time\ntime.sleep(9)", None, "KeyboardInterrupt"),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDINGS)
def test_a_program_that_reads_a_batch_ends(folder, how):
    code, expected_code, message = ENDINGS[how]
    process = start(code, folder)
    try:
        _, err = process.communicate(timeout=TIMEOUT)  # it would hang without end
    finally:
        process.kill()
    assert expected_code is None or process.returncode == expected_code, err
    assert message in err and (message or not err), err


def test_workers_end_when_their_program_is_killed(folder):
    process = start(
        "import time, torch\ntorch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.3\n"  # instead of 5 seconds
        "data = load(num_workers=2)\nnext(data)\nprint('read', flush=True)\ntime.sleep(99)", folder
    )  # fmt: skip
    assert process.stdout.readline() == "read\n"
    pids = children(process)
    assert len(pids) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "end of the workers", seconds=30)


def test_workers_are_started_afresh_where_python_cannot_fork(folder, tmp_path):
    (tmp_path / "main.py").write_text(
        BATCH + "import multiprocessing\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    print(next(load())[0].shape)\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "main.py"), folder], env=environment(), capture_output=True,
                          text=True, timeout=TIMEOUT)  # fmt: skip
    assert done.returncode == 0 and done.stdout == "torch.Size([2, 3, 8, 8])\n" and not done.stderr


def test_closed_and_forgotten_streams_have_no_workers(folder):
    with open_stream(folder) as data:
        next(data)
        first = processes(data)
        assert len(first) == 2
    assert not any(worker.is_alive() for worker in first)
    next(data)  # starts them again
    again = processes(data)
    del data
    assert not any(worker.is_alive() for worker in again)


# Workers that end


@pytest.mark.parametrize("killed", [1, 2])
def test_killed_workers_are_replaced_and_the_batches_stay_the_same(folder, killed, capsys):
    handler = signal.getsignal(signal.SIGCHLD)
    with open_stream(folder) as data:
        batches = [next(data)[0] for _ in range(3)]
        for worker in processes(data)[:killed]:
            worker.kill()
            worker.join()
        batches += [next(data)[0] for _ in range(9)]
        assert len(processes(data)) == 2
    assert_same(batches, expected(folder, 12))
    assert capsys.readouterr().out.count("probably by the out-of-memory killer") == 1
    assert signal.getsignal(signal.SIGCHLD) == handler


class Deadly:
    """Items whose position is their value; a worker does something else at position 4."""

    def __init__(self, act):
        self.act = act

    def __getitem__(self, position):
        if position == 4 and th.utils.data.get_worker_info() is not None:
            self.act()
        return position


def kill(number):
    os.kill(os.getpid(), number)


def kill_holding_locks():
    """End where the worker holds every lock that it shares with the process that reads."""
    frame = sys._getframe()
    while "done_event" not in frame.f_locals:
        frame = frame.f_back
    shared = frame.f_locals
    for lock in (getattr(shared["done_event"], "_cond", None), shared["data_queue"]._wlock):
        if lock is not None:
            lock.acquire()
    kill(signal.SIGKILL)


def full():
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def many_files():
    raise OSError(24, "Too many open files")


def reader_of(act, num_workers=1):
    return BatchReader(Deadly(act), lambda step: [2 * step, 2 * step + 1], th.tensor, num_workers, 2**20)


def read_ten(reader):
    try:
        return [next(reader).tolist() for _ in range(5)]
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (partial(kill, signal.SIGKILL), "2 times in a row: killed, probably by the out-of-memory killer"),
        (kill_holding_locks, "2 times in a row: killed, probably by the out-of-memory killer"),
        (partial(kill, signal.SIGBUS), "batches of 1.0 MiB in shared memory (SIGBUS"),
        (full, "batches of 1.0 MiB in shared memory (RuntimeError: unable to write"),
        (many_files, "Too many open files"),
        (partial(os._exit, 3), "exit code 3"),
    ],
)
def test_where_workers_cannot_work_the_main_process_reads(act, message, capsys, monkeypatch):
    monkeypatch.setattr(workers, "MAX_DEATHS", 2)
    reader = reader_of(act)
    assert read_ten(reader) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    out = capsys.readouterr().out
    assert message in out and "--num_workers" in out.replace("__main__", "--num_workers")
    assert out.count("The main process reads the images itself") == 1 and reader.num_workers == 0


def test_the_size_of_shared_memory_is_named(capsys):
    read_ten(reader_of(full))
    assert ("/dev/shm has" in capsys.readouterr().out) == os.path.isdir("/dev/shm")


def test_a_crash_that_comes_again_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(workers, "MAX_DEATHS", 2)
    reader = reader_of(partial(kill, signal.SIGSEGV), 2)
    with pytest.raises(UserError, match=r"crash \(SIGSEGV\), 2 times in a row, .* step \d"):
        read_ten(reader)
    assert capsys.readouterr().out.count("crashed (SIGSEGV); new ones") >= 1


def test_where_no_process_can_be_started_the_main_process_reads(monkeypatch, capsys):
    def start(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    assert read_ten(reader_of(int, 2))[-1] == [8, 9]
    assert "cannot be started ([Errno 11] Resource temporarily unavailable)" in capsys.readouterr().out


def test_a_mistake_in_the_data_set_is_raised_as_it_is():
    def fail():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        read_ten(reader_of(fail))


# Images that do not fit


def big_set(folder, monkeypatch):
    """A hundred grey images, of which none is checked before and none is kept in memory."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    monkeypatch.setattr("improved_diffusion.data.dataset.MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(stream_module, "PAUSES", (0.01,))
    dataset = ImageDataset(8, open_images(str(folder)), channels=1)
    return partial(BatchStream, dataset, 10, shuffle=False, check=False)


def colour(path):
    Image.new("RGB", (8, 8), (90, 10, 10)).save(path)


ODD = {"colour": colour, "gone": os.unlink, "damaged": lambda path: path.write_bytes(b"hello")}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ODD)
def test_an_image_that_does_not_fit_costs_that_image(tmp_path, monkeypatch, capsys, kind, num_workers):
    make = big_set(tmp_path / "data", monkeypatch)
    ODD[kind](tmp_path / "data" / "042.png")
    with make(num_workers=num_workers) as data:
        batches = [next(data)[0] for _ in range(25)]
    assert th.equal(batches[4][2], batches[4][3]) and th.equal(batches[4], batches[14])
    out = capsys.readouterr().out
    assert out.count("another image is used") == 1 == out.count("warning") and "042.png" in out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_vanish_are_an_error(tmp_path, monkeypatch, num_workers):
    make = big_set(tmp_path / "data", monkeypatch)
    with make(num_workers=num_workers) as data:
        next(data)
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"images cannot be used any more.*\.png.*No such file"):
            for _ in range(20):
                next(data)


def test_a_file_that_comes_back_is_used(tmp_path, monkeypatch, capsys):
    make = big_set(tmp_path / "data", monkeypatch)
    with make(num_workers=0) as data:
        path = tmp_path / "data" / "003.png"
        path.rename(tmp_path / "away.png")
        monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "away.png").rename(path))
        batch = next(data)[0]
    assert not th.equal(batch[3], batch[4]) and not capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [-1, 1.5, float("nan"), "2", None])
def test_odd_numbers_of_workers_are_refused(folder, num_workers):
    with pytest.raises(UserError, match="--num_workers"):
        open_stream(folder, num_workers=num_workers)


def test_more_workers_than_cores_are_one_line_of_ours(folder, capsys):
    with open_stream(folder, num_workers=len(os.sched_getaffinity(0)) + 1) as data:
        next(data)  # torch's warning would be an error here
    assert capsys.readouterr().out.count("CPU cores") == 1


def test_a_hang_while_images_are_checked_is_noticed(folder, monkeypatch):
    seen = []

    def check(self, i):
        deadline = time.monotonic() + 10  # the threads that read may start before the main thread waits for them
        while watchdog._process.work is None and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(watchdog._process.work)
        return ()

    monkeypatch.setattr(ImageDataset, "check", check)
    open_stream(folder).close()
    assert seen and all(work is not None for work in seen)
