"""Ranks: what starts them, what they give each other, and how they end together."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import dist_worker
import pytest
import torch as th
from script_helpers import environment, run, without_mpi4py

from improved_diffusion import dist_util, logger
from improved_diffusion.config import UserError
from improved_diffusion.resample import LossSecondMomentResampler

WORKER = Path(dist_worker.__file__)
LAUNCHERS = ("mpiexec", "torchrun", "srun")

TORCHRUN = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500", LOCAL_RANK="1")
SRUN = dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_NTASKS="2", SLURM_LOCALID="1", SLURM_JOB_ID="7")
MPICH = dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALNRANKS="2", MPI_LOCALRANKID="1")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", PMIX_RANK="1")


@pytest.mark.parametrize(
    ("variables", "launcher", "rank"),
    [
        ({}, "python", 0),
        (TORCHRUN, "torchrun", 1),
        (MPICH, "mpiexec", 1),
        (OPEN_MPI, "mpiexec", 1),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec", 1),
        ({"PMIX_RANK": "1"}, "mpiexec", 1),
        (SRUN, "srun", 1),
        # Plain python inside a batch job, or in a step of one task, has no other ranks to join.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "python", 0),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "python", 0),
        # A launcher that is itself started by another one: the inner one counts.
        ({**SRUN, **TORCHRUN, "RANK": "3", "WORLD_SIZE": "4"}, "torchrun", 3),
        ({**SRUN, **OPEN_MPI, "SLURM_PROCID": "0"}, "mpiexec", 1),
        ({**SRUN, **MPICH, "SLURM_PROCID": "0"}, "mpiexec", 1),
        # srun gives its tasks these too where SLURM was built with PMI.
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2"}, "srun", 1),
        ({**SRUN, "PMIX_RANK": "1"}, "srun", 1),
        # RANK alone is anybody's variable.
        ({"RANK": "3"}, "python", 0),
    ],
)
def test_launcher_and_rank_are_read_off_the_environment(variables, launcher, rank, monkeypatch):
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist_util.detect_launcher(variables) == dist_util.detect_launcher() == launcher
    assert dist_util.get_rank() == rank


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("localhost", "localhost"),
        ("node7,node9", "node7"),
        ("node[03-05,9],other", "node03"),
        ("gpu-[1,4]", "gpu-1"),
        ("rack2-node[12-13]-ib", "rack2-node12-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist, first):
    assert dist_util._first_host(nodelist) == first


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """microbatch -> (parameters, norm of the gradient) after six steps on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    yield {microbatch: dist_worker.six_steps(folder / str(microbatch), microbatch) for microbatch in (-1, 1, 2)}
    logger.reset()


@pytest.fixture(scope="module", params=LAUNCHERS)
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
        assert r["described"].splitlines()[1].startswith("rank 1 -> ")
        assert r["described"].endswith(r["device"])


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


def test_loss_second_moment_learns_the_same_on_ranks_with_different_counts(ranks):
    expected = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4), history_per_term=3)
    expected.update_with_all_losses([0, 1, 2, 0], [1.0, 2.0, 3.0, 11.0])
    for r in ranks:
        for name, value in expected.state_dict().items():
            assert th.equal(r["history"][name], value), name


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_takes_the_job_down_with_a_message(launcher, tmp_path):
    result = run(launcher, 2, WORKER, "killed", tmp_path, cwd=tmp_path, timeout=60)
    assert result.code != 0
    if launcher == "mpiexec":  # it ends the other ranks itself, before they notice
        assert "Killed (signal 9)" in result.out + result.err
    else:
        assert "rank 0 on" in result.err and "lost contact with another rank" in result.err


@pytest.mark.parametrize(
    ("task", "message"),
    [("mistaken", ": error: rank 1 alone is wrong\n"), ("crashed", "RuntimeError: rank 1 alone is wrong\n")],
)
def test_an_error_on_one_rank_alone_ends_mpiexec(task, message, tmp_path):
    result = run("mpiexec", 2, WORKER, task, tmp_path, cwd=tmp_path, timeout=60)
    assert result.code == 1
    assert result.err.count(message) == 1
    assert ("Traceback" in result.err) == (task == "crashed")


def test_mpiexec_without_mpi4py_names_what_to_install(tmp_path):
    env = {"PYTHONPATH": without_mpi4py(environment(), "missing")["PYTHONPATH"]}
    result = run("mpiexec", 2, WORKER, "all", tmp_path, cwd=tmp_path, env=env, timeout=60)
    assert result.code == 1
    assert "mpiexec needs mpi4py and an MPI library (No module named 'mpi4py'): pip install mpi4py mpich" in result.err
    assert "torchrun --nproc-per-node N" in result.err
    assert "Traceback" not in result.err


def test_an_mpi4py_of_another_mpi_library_is_noticed(monkeypatch):
    lonely = SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=lonely))
    for name, value in MPICH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"started 2 ranks but mpi4py sees 1: .* \(pip install mpi4py mpich\)"):
        dist_util.setup_dist()


def test_without_setup_there_is_one_rank():
    assert dist_util.get_world_size() == 1
    assert dist_util.all_gather_object("x") == ["x"]
    assert dist_util.from_rank0(lambda a: a + 1, 1) == 2
    assert [t.tolist() for t in dist_util.all_gather_ragged(th.ones(2))] == [[1.0, 1.0]]
