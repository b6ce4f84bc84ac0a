"""How ranks find each other: what the launcher says, and what they say where that leads nowhere."""

import os
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist
from script_helpers import environment

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.distributed import launchers

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
    assert launchers.detect_launcher(variables) == launchers.detect_launcher() == launcher
    assert distributed.get_rank() == rank


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
    assert launchers._first_host(nodelist) == first


SOON = 0.5  # seconds


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_rank_waits_for_rank_0_and_then_names_where_it_waited(free_port):
    with pytest.raises(
        UserError, match=rf"rank 1 waited 0 s for rank 0 at 127.0.0.1:{free_port} \(Connection refused\)"
    ):
        launchers._store("127.0.0.1", free_port, 1, 2, SOON)


def test_a_master_address_that_nothing_resolves_is_named(monkeypatch):
    for name, value in {**TORCHRUN, "MASTER_ADDR": "no-such-host.invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match=r"rank 1 waited .* at no-such-host.invalid:29500 .*MASTER_ADDR"):
        launchers.join(SOON)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"rank 0 on .* cannot listen at 127.0.0.1:{port} .*set .*MASTER_PORT"):
            launchers._store("127.0.0.1", port, 0, 2, SOON)


def test_hosts_whose_names_nothing_resolves_ask_for_master_addr():
    with pytest.raises(UserError, match=r"cannot find the host no-such-host.invalid .*: set MASTER_ADDR to an address"):
        launchers._own_address(["here", "no-such-host.invalid"])


def test_missing_ranks_are_named_and_those_who_are_here():
    store = dist.HashStore()
    store.set("host/2", '["nodeb", "127.0.0.1"]')
    me = launchers.Joined(store, 0, 4, 0, 1, "127.0.0.1", 29500)
    with pytest.raises(UserError) as error:
        launchers.rendezvous(me, SOON)
    here = socket.gethostname()
    assert (
        f"join the store at 127.0.0.1:29500: missing ranks 1, 3; present: rank 0 on {here}, rank 2 on nodeb: "
        in str(error.value)
    )


def test_ranks_find_each_other_however_late_one_is():
    store = dist.HashStore()
    rows = {}

    def join(rank):
        time.sleep(0.2 * rank)
        rows[rank] = launchers.rendezvous(launchers.Joined(store, rank, 2, 0, 1, "127.0.0.1", 29500), 60)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows[0] == rows[1] == [(socket.gethostname(), "127.0.0.1")] * 2


def test_gloo_gets_the_interface_of_the_way_to_the_other_hosts_unless_it_is_told_one(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(launchers, "_address_towards", {"10.0.0.2": "10.0.0.1"}.__getitem__)
    monkeypatch.setattr(launchers, "_interface_with", {"10.0.0.1": "eth1", "10.0.0.2": "eth2"}.__getitem__)
    # The master's own host sees itself as 127.0.1.1, and is seen by the other at another address.
    rows = [("nodea", "127.0.1.1"), ("nodea", "127.0.1.1"), ("nodeb", "10.0.0.2")]
    launchers.choose_interface(0, rows)
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth1"
    launchers.choose_interface(2, rows)
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth2"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    launchers.choose_interface(1, rows)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_on_one_host_gloo_is_left_alone(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launchers.choose_interface(0, [("nodea", "127.0.0.1")] * 2)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_interface_of_an_address_is_found():
    assert launchers._interface_with("127.0.0.1").startswith("lo")
    assert launchers._interface_with("192.0.2.1") == ""


@pytest.mark.parametrize(
    ("variables", "waits"),
    [
        ({}, False),  # the shell may end, as after nohup
        (TORCHRUN, False),  # started by hand, one rank in each shell
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}, True),
        (MPICH, True),
        (OPEN_MPI, True),
        (SRUN, True),
    ],
)
def test_a_launcher_that_waits_for_its_ranks_is_known(variables, waits):
    assert launchers.is_child_of_launcher(variables) == waits


def test_a_rank_is_asked_to_stop_when_its_launcher_is_gone(monkeypatch):
    sent = []
    parents = iter([7, 7, 1])
    monkeypatch.setattr(launchers, "PARENT_INTERVAL", 0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "write", lambda handle, text: len(text))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    launchers._wait_for_launcher(7)
    assert sent == [(os.getpid(), signal.SIGTERM)]
