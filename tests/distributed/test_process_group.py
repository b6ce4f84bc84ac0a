"""Ranks: what starts them, what they give each other, and how they end together."""

import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import dist_worker
import pytest
import torch as th
from script_helpers import environment, run, start, started_by, wait, wait_for, without_mpi4py

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.distributed import process_group
from improved_diffusion.logs import logger
from improved_diffusion.resample import LossSecondMomentResampler

WORKER = Path(dist_worker.__file__)
SRUN = pytest.param("srun", marks=pytest.mark.slow)  # joins as torchrun does; its variables are tested elsewhere
LAUNCHERS = ("mpiexec", "torchrun", SRUN)
TORCHRUN = pytest.param("torchrun", marks=pytest.mark.slow)  # ranks that have joined are the same there


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """microbatch -> (parameters, norm of the gradient) after six steps on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    yield {microbatch: dist_worker.six_steps(folder / str(microbatch), microbatch) for microbatch in (-1, 1, 2)}
    logger.reset()


@pytest.fixture(scope="module", params=["mpiexec", TORCHRUN, SRUN])
def ranks(request, tmp_path_factory):
    """What each of two ranks got, under each launcher."""
    folder = tmp_path_factory.mktemp(request.param)
    run(request.param, 2, WORKER, "all", folder, cwd=folder).succeed()
    return [th.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("microbatch", [1, 2])
def test_the_microbatch_does_not_change_what_is_learned(alone, microbatch):
    params, norm = alone[microbatch]
    assert (params - alone[-1][0]).abs().max() < 1e-4
    assert norm == pytest.approx(alone[-1][1], rel=1e-4)


def test_two_ranks_learn_what_one_learns_from_the_same_images(alone, ranks):
    for rank in ranks:
        params, norm = rank["six_steps"]
        assert (params - alone[-1][0]).abs().max() < 1e-4
        assert norm == pytest.approx(alone[-1][1], rel=1e-4)


@pytest.mark.parametrize("name, method", [("tuned", dist_worker.tuning), ("halved", dist_worker.halving)])
def test_two_ranks_distil_what_one_distils(name, method, ranks, tmp_path):
    alone, norm = dist_worker.six_steps(tmp_path, diffusion=method())
    logger.reset()
    for rank in ranks:
        assert (rank[name][0] - alone).abs().max() < 1e-4
        assert rank[name][1] == pytest.approx(norm, rel=1e-4)
    th.manual_seed(0)
    start = th.cat([p.detach().flatten() for p in dist_worker.make_model().parameters()])
    assert (alone - start).abs().max() > 3e-3


def test_ranks_that_see_different_images_end_with_the_same_parameters(ranks):
    assert th.equal(ranks[0]["six_steps"][0], ranks[1]["six_steps"][0])


def test_six_steps_move_the_parameters_far_more_than_the_tolerance(alone):
    th.manual_seed(0)
    start = dist_worker.make_model()
    moved = (alone[-1][0] - th.cat([p.detach().flatten() for p in start.parameters()])).abs()
    assert moved.max() > 3e-3


def test_every_rank_knows_its_number_and_device(ranks):
    assert [r["rank"] for r in ranks] == [0, 1]
    assert [r["ranks"] for r in ranks] == [2, 2]
    for r in ranks:
        where, times = r["described"].splitlines()
        assert where.startswith("2 processes on ") and r["device"] in where
        assert re.fullmatch(
            r"collectives: 2 ranks on 1 host, all-reduce of 4 MiB in [\d.]+ ms on (cpu|cuda)(, .*)?", times
        )


@pytest.mark.parametrize("rows, expected", [
    ([("vm", "cpu")], "1 process on vm: cpu"),
    ([("vm", "cpu")] * 3, "3 processes on vm: 3 x cpu"),
    ([("vm", "cuda:0 (X)"), ("vm", "cuda:1 (X)")], "2 processes on vm: cuda:0 (X), cuda:1 (X)"),
    ([("a", "cpu"), ("b", "cpu"), ("a", "cpu")], "3 processes on 2 hosts: a (2 x cpu), b (cpu)"),
    ([(str(i), "cpu") for i in range(100)], "100 processes on 100 hosts: 0 (cpu), 1 (cpu), 2 (cpu), 3 (cpu), "
     "4 (cpu), 5 (cpu), 6 (cpu), 7 (cpu), ..."),
])  # fmt: skip
def test_the_processes_are_described_in_one_line(rows, expected, monkeypatch):
    monkeypatch.setattr(process_group, "all_gather_object", lambda mine: rows)
    assert process_group.describe_ranks() == expected


def test_ranks_gather_tensors_of_different_lengths(ranks):
    for r in ranks:
        rows, numbers = r["ragged"]
        assert [tuple(part.shape) for part in rows] == [(0, 2), (1, 2)]
        assert rows[1].tolist() == [[10.0, 11.0]] and rows[1].dtype == th.float64
        assert [part.tolist() for part in numbers] == [[0], [100, 101]] and numbers[1].dtype == th.int64


def test_ranks_gather_objects_sums_and_rank_0s_values(ranks):
    for r in ranks:
        assert r["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert r["summed"].tolist() == [3.0]
        assert r["synced"].tolist() == [0.0, 0.0, 0.0]
        assert r["from_rank0"] == "from 0"


def test_what_rank_0_refuses_ends_every_rank(ranks):
    assert [r["refused"] for r in ranks] == ["refused by rank 0"] * 2


def test_every_rank_gets_rank_0s_file_and_reads_it_itself_where_it_has_the_same_one(ranks):
    for r in ranks:
        found, content = r["read"]  # in hex digits
        assert found["shared"] == (content, 0)
        assert found["absent"] == found["stale"] == (content, 1)
        assert found["empty"][0] == ""
        assert found["model"]["w"].tolist() == [0, 1, 2, 3, 4]
        state_dict, description = found["safetensors"]
        assert state_dict["w"].tolist() == [0, 1, 2, 3, 4] and description == {"step": 3}


def test_a_file_that_cannot_be_loaded_is_the_same_error_on_all_ranks(ranks):
    first, second = (r["read"][0] for r in ranks)
    assert first["damaged"] == second["damaged"] and "own0/model.pt" in first["damaged"]
    assert first["missing"] == second["missing"] and "nothing.pt" in first["missing"]


def test_loss_second_moment_learns_the_same_on_ranks_with_different_counts(ranks):
    expected = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4), history_per_term=3)
    expected.update_with_all_losses([0, 1, 2, 0], [1.0, 2.0, 3.0, 11.0])
    for r in ranks:
        for name, value in expected.state_dict().items():
            assert th.equal(r["history"][name], value), name


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_takes_the_job_down_with_a_message(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "killed", tmp_path, cwd=tmp_path)
    assert result.code != 0
    message = f"lost contact with another rank: rank 1 on {socket.gethostname()} ended"
    if launcher == "mpiexec":  # it may end the other ranks itself, before they notice
        assert "Killed (signal 9)" in result.out + result.err or message in result.err
    else:
        assert result.err.count(f"rank 0 on {socket.gethostname()}: error: {message}") == 1


@pytest.mark.parametrize(
    ("launcher", "variable"), [("mpiexec", "PMI_RANK"), pytest.param("torchrun", "RANK", marks=pytest.mark.slow)]
)
def test_a_frozen_rank_takes_the_others_down_with_a_message(launcher, variable, tmp_path):
    process = start(launcher, 2, WORKER, "frozen", tmp_path, cwd=tmp_path)
    wait_for(lambda: started_by(process, **{variable: 0}), "rank 0", process)
    wait_for(lambda: not started_by(process, **{variable: 0}), "end of rank 0")
    for pid in started_by(process, **{variable: 1}):  # torchrun would give it half a minute to end by itself
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    result = wait(process)
    assert result.code != 0
    host = socket.gethostname()
    message = f"rank 0 on {host}: error: rank 1 on {host} did not answer for 3 s: the host is down, the network is cut"
    assert result.err.count(message) == 1


@pytest.mark.parametrize("launcher", ["mpiexec", TORCHRUN, SRUN])
def test_a_rank_that_hangs_in_its_own_work_says_where(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "stuck", tmp_path, cwd=tmp_path)
    assert result.code != 0
    message = f"rank 1 on {socket.gethostname()}: error: waited 1 s for the next batch of /data; rerun the same command"
    assert result.err.count(message) == 1
    assert re.search(r"dist_worker.py\", line \d+, in end_badly", result.err)


@pytest.mark.parametrize("launcher", ["mpiexec", SRUN])
def test_a_step_that_never_ends_names_who_is_in_it(launcher, tmp_path):
    """Rank 1 sleeps in its fourth step, while rank 0 waits for it in the same one's barrier."""
    result = run(launcher, 2, WORKER, "hanging", tmp_path, cwd=tmp_path)
    assert result.code == 1
    message = f"rank 1 on {socket.gethostname()}: error: no rank has finished a step for 2 s: all ranks hung"
    assert message in result.err
    assert re.search(r"time\.sleep\(60\)", result.err)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_stop_together_end_in_order_with_75(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "stopped", tmp_path, cwd=tmp_path)
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()
    if launcher == "torchrun":  # its own end is always 1, but it says what its ranks ended with
        assert result.code == 1 and "exitcode  : 75" in result.err
        return
    assert result.code == 75
    assert result.err == result.out == ""


@pytest.mark.parametrize("launcher", ["mpiexec", SRUN])
def test_rank_0_may_end_long_after_the_others(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "uneven", tmp_path, cwd=tmp_path).succeed()
    assert result.err == "" and (tmp_path / "uneven0").exists()
    assert result.seconds > 5 or launcher == "srun"


@pytest.mark.parametrize("launcher", ["mpiexec", SRUN])
def test_a_rank_that_never_joins_is_named(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "absent", tmp_path, cwd=tmp_path)
    assert result.code == 1
    message = {
        "mpiexec": "Timeout (0:00:04)!",  # in MPI's own start, where Python can say no more than where it is
        "srun": "error: waited 4 s for all 2 ranks to join the store at localhost:",
    }[launcher]
    assert result.err.count(message) == 1
    also = {"mpiexec": "in mpi\n", "srun": ": missing rank 1; present: rank 0 on "}[launcher]
    assert also in result.err


@pytest.mark.parametrize(
    ("task", "message"),
    [("mistaken", ": error: rank 1 alone is wrong\n"), ("crashed", "RuntimeError: rank 1 alone is wrong\n")],
)
def test_an_error_on_one_rank_alone_ends_mpiexec(task, message, tmp_path):
    result = run("mpiexec", 2, WORKER, task, tmp_path, cwd=tmp_path)
    assert result.code == 1
    assert result.err.count(message) == 1
    assert ("Traceback" in result.err) == (task == "crashed")


def test_mpiexec_without_mpi4py_names_what_to_install(tmp_path):
    env = {"PYTHONPATH": without_mpi4py(environment(), "missing")["PYTHONPATH"]}
    result = run("mpiexec", 2, WORKER, "all", tmp_path, cwd=tmp_path, env=env)
    assert result.code == 1
    assert "mpiexec needs mpi4py and an MPI library (No module named 'mpi4py'): pip install mpi4py mpich" in result.err
    assert "torchrun --nproc-per-node N" in result.err
    assert "Traceback" not in result.err


def test_an_mpi4py_of_another_mpi_library_is_noticed(monkeypatch):
    lonely = SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=lonely))
    for name, value in dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALNRANKS="2", MPI_LOCALRANKID="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"started 2 ranks but mpi4py sees 1: .* \(pip install mpi4py mpich\)"):
        distributed.setup_dist()


def test_without_setup_there_is_one_rank():
    assert distributed.get_world_size() == 1
    assert distributed.all_gather_object("x") == ["x"]
    assert distributed.from_rank0(lambda a: a + 1, 1) == 2
    assert [t.tolist() for t in distributed.all_gather_ragged(th.ones(2))] == [[1.0, 1.0]]
