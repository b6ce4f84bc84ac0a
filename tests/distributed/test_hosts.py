"""Training on two hosts: the same as on one, and an end, with a message, when the network between them fails."""

import fcntl
from pathlib import Path

import dist_worker
import pytest
import torch as th
from hosts import NAMES, TwoHosts
from script_helpers import SCRIPTS, TINY_IMAGE, call, run, wait, wait_for, write_images

from improved_diffusion.logs.run_folder import LOCK

WORKER = Path(dist_worker.__file__)
TRAIN = SCRIPTS / "image_train.py"


@pytest.fixture
def hosts(tmp_path):
    with TwoHosts(tmp_path) as two:
        yield two


def training(folder, *more):
    if not (folder / "data").exists():
        write_images(folder / "data", 8)
    return [*TINY_IMAGE, "--data_dir", "data", "--batch_size", 2, "--save_interval", 5, "--log_interval", 1000, *more]


def is_free(lock_file):
    with open(lock_file, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The model after six steps of two ranks on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    run("mpiexec", 2, "image_train", *training(folder, "--max_steps", 6, "--out_dir", "run"), cwd=folder).succeed()
    return th.load(folder / "run/model000005.pt")


@pytest.mark.parametrize(
    ("launcher", "options"), [pytest.param("mpiexec", {}, marks=pytest.mark.slow), ("torchrun", {"backend": "c10d"})]
)
def test_two_hosts_learn_bit_for_bit_what_two_ranks_on_one_learn(launcher, options, hosts, one_host, tmp_path):
    args = training(tmp_path, "--max_steps", 6, "--out_dir", "run")
    results = [wait(p).succeed() for p in getattr(hosts, launcher)(TRAIN, *args, cwd=tmp_path, **options)]
    log = "".join(result.out for result in results)
    for host in NAMES:  # torchrun's c10d gives out the ranks as it likes
        assert f"{host} (cpu)" in log
    assert "collectives: 2 ranks on 2 hosts, all-reduce of 4 MiB in " in log
    learned = th.load(tmp_path / "run/model000005.pt")
    # Two summands have one sum, in whatever order they come.
    for name, expected in one_host.items():
        assert th.equal(learned[name], expected), name


@pytest.mark.parametrize(
    ("launcher", "ranks_after"), [("mpiexec", 1), pytest.param("torchrun", 2, marks=pytest.mark.slow)]
)
def test_a_cut_link_ends_both_sides_and_one_host_goes_on(launcher, ranks_after, hosts, tmp_path):
    args = training(tmp_path, "--out_dir", "run")
    processes = getattr(hosts, launcher)(WORKER, "script", TRAIN, *args, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run/manifest000005.json").exists(), "checkpoint", processes[0])
    hosts.cut()
    results = [wait(process) for process in processes]
    # mpiexec's own process holds the output of both hosts: of the one that is cut off nothing reaches it.
    for result, (here, there) in zip(results, [(0, 1), (1, 0)]):
        assert result.code == 1
        message = (
            f"rank {here} on {NAMES[here]}: error: rank {there} on {NAMES[there]} did not answer for 8 s: the host"
        )
        assert result.err.count(message) == 1
        assert result.err.count("error: ") == 1
    wait_for(lambda: not any(map(hosts.pids, hosts.namespaces.values())), "end of all processes")
    # A process whose first thread has ended is in no namespace any more, though its other threads keep its files open.
    wait_for(lambda: is_free(tmp_path / "run" / LOCK), "end of the claim on the run's folder")
    newest = max(int(path.name[8:14]) for path in (tmp_path / "run").glob("manifest*.json"))
    args += ["--resume", "auto", "--max_steps", newest + 3]
    if ranks_after == 1:
        again = call("image_train", *args, "--num_workers", 0, cwd=tmp_path)
    else:
        again = run(launcher, ranks_after, "image_train", *args, cwd=tmp_path)
    assert f"resumed after {newest + 1} steps" in again.succeed().out


def test_a_host_that_never_starts_its_rank_is_named(hosts, tmp_path):
    processes = hosts.torchrun(WORKER, "absent", tmp_path, cwd=tmp_path)
    err = wait(processes[0]).err
    assert "rank 0 on nodea: error: waited 4 s for all 2 ranks to join the store at nodea:29400: missing rank 1" in err
    assert "present: rank 0 on nodea: check the output of the missing" in err
    hosts.kill(hosts.namespaces["nodeb"])
    wait(processes[1])
