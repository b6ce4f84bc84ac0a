"""Workers are processes that may end at any time; no request's answer is lost by it."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from service_helpers import FAST, WAIT, ask, until

import improved_diffusion as idf
from improved_diffusion.service.engine import Request
from improved_diffusion.service.errors import Failed, OutOfMemory
from improved_diffusion.service.processes import WorkerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")

PARENT = """
import sys, time
from improved_diffusion.service.engine import Catalogue, Engine, Request

if __name__ == "__main__":
    engine = Engine(Catalogue(sys.argv[1]))
    engine.start()
    while not engine._workers:
        time.sleep(0.01)
    print(engine._workers[0].process.pid, flush=True)
    job = engine.submit(Request("sample", "plain", n=2, options={"sampler": "ddim", "steps": 2}))
    print(len(job.result(120)), flush=True)
    engine.submit(Request("sample", "plain", n=1000)).result()
"""


def pid_of(engine):
    until(lambda: engine.health().workers == 1)
    return engine._workers[0].process.pid


def alone(runs, n, seed):
    return idf.load(runs / "plain").sample(n, seed=seed, **FAST, progress=False).array


def test_a_killed_worker_and_a_request_that_kills_workers(processes, runs, monkeypatch):
    """All other requests are answered, and with the right images."""
    draw, restarts = WorkerProcess.draw, processes.health().restarts
    pid_of(processes)

    def deadly(self, number, shares):
        draw(self, number, shares)
        if any(job.request.seed == 9 for job, _ in shares):
            self.process.kill()

    monkeypatch.setattr(WorkerProcess, "draw", deadly)
    innocent = [processes.submit(ask(n=2, seed=seed), client=str(seed)) for seed in range(2)]
    poison = processes.submit(ask(n=2, seed=9), client="poison")
    innocent += [processes.submit(ask(n=2, seed=seed), client=str(seed)) for seed in range(2, 4)]
    with pytest.raises(Failed, match="workers ended"):
        poison.result(3 * WAIT)
    for seed, job in enumerate(innocent):
        assert np.array_equal(job.result(WAIT).array, alone(runs, 2, seed))
    assert processes.health().restarts == restarts + 3


def test_memory_that_is_full_ends_one_request_and_no_worker(processes, runs):
    pid, restarts = pid_of(processes), processes.health().restarts
    base = np.zeros((1, 8, 8, 3), np.uint8)
    processes.submit(Request("upscale", "nested/large", n=0, images=base, options=FAST)).result(WAIT)  # is loaded
    with open(f"/proc/{pid}/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 2**25, resource.RLIM_INFINITY))
    try:
        large = np.zeros((1, 256, 256, 3), np.uint8)
        options = dict(FAST, any_size=True)
        job = processes.submit(Request("upscale", "nested/large", n=0, images=large, options=options))
        other = processes.submit(ask(n=2, seed=5), client="other")
        with pytest.raises(OutOfMemory):
            job.result(WAIT)
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert np.array_equal(other.result(WAIT).array, alone(runs, 2, 5))
    assert processes.health().restarts == restarts and pid_of(processes) == pid


def test_a_worker_ignores_ctrl_c_and_ends_with_its_parent(runs, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            worker = int(parent.stdout.readline())
            for _ in range(3):  # while it starts
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    os.kill(worker, number)
                time.sleep(0.2)
            assert parent.stdout.readline() == "2\n"
            os.kill(worker, signal.SIGINT)
            os.kill(worker, 0)  # is alive
            parent.kill()
            until(lambda: not is_running(worker))
        finally:
            parent.kill()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_ends_when_the_engine_stops(processes):
    """And starts again with it."""
    pid = pid_of(processes)
    processes.stop()
    assert not is_running(pid)
    processes.start()
    assert len(processes.submit(ask(n=3)).result(WAIT)) == 3
