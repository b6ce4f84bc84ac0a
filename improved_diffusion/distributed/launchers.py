"""How ranks started by mpiexec, torchrun or srun find each other; plain python is one rank.

The rank is known before torch is imported, which takes seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..config import UserError

PARENT_INTERVAL = 2.0  # seconds between looks at the launcher


@dataclass
class Joined:
    """This process's place among the ranks, and the store that they share."""

    store: Any
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master: str  # the host of the store, by name or address
    port: int


def detect_launcher(env: Mapping[str, str] = os.environ) -> str:
    """What started this process, read from its environment: python, mpiexec, torchrun or srun."""
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        return "torchrun"
    # mpiexec may have started its own helpers by srun, so its variables come first.
    if "OMPI_COMM_WORLD_SIZE" in env or "HYDI_CONTROL_FD" in env or "MPI_LOCALNRANKS" in env:
        return "mpiexec"
    # Set only inside a step that srun started; the batch script has SLURM_NTASKS only.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return "srun"
    # SLURM sets these in its own steps too, such as an interactive shell.
    if "SLURM_STEP_ID" not in env and ("PMI_SIZE" in env or "PMIX_RANK" in env):
        return "mpiexec"
    return "python"


def get_rank() -> int:
    """This process's rank; also known before setup_dist()."""
    group = _group()
    return group.get_rank() if group else rank_by_environment()


def get_world_size() -> int:
    """The number of ranks; 1 before setup_dist()."""
    group = _group()
    return group.get_world_size() if group else 1


def _group() -> Any:
    """torch.distributed where the ranks have joined; None before that, when torch may not be imported yet."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank_by_environment() -> int:
    """The rank that the launcher gave this process; 0 if it gave none."""
    names = {
        "python": (),
        "torchrun": ("RANK",),
        "srun": ("SLURM_PROCID",),
        "mpiexec": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
    }
    return next((int(os.environ[name]) for name in names[detect_launcher()] if name in os.environ), 0)


def is_child_of_launcher(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process and waits for it: not a shell in which ranks are started by hand."""
    launcher = detect_launcher(env)
    return "TORCHELASTIC_RUN_ID" in env if launcher == "torchrun" else launcher in ("mpiexec", "srun")


def stop_with_launcher() -> None:
    """Send this process a SIGTERM when its parent, a launcher, is gone: nobody would stop this rank any more."""
    if is_child_of_launcher():
        threading.Thread(target=_wait_for_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def _wait_for_launcher(parent: int) -> None:
    while os.getppid() == parent:  # on Windows for ever
        time.sleep(PARENT_INTERVAL)
    with suppress(OSError):  # whoever read the output may be gone too
        os.write(2, f"{detect_launcher()} has ended: its ranks stop as after SIGTERM\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def join(timeout: float) -> Joined:
    """Find the store that all ranks share. Raises UserError if it cannot be reached within `timeout` seconds."""
    join_by = {"python": _alone, "mpiexec": _by_mpi, "torchrun": _by_torchrun, "srun": _by_slurm}
    return join_by[detect_launcher()](timeout)


def rendezvous(joined: Joined, timeout: float) -> list[tuple[str, str]]:
    """Wait for all ranks; returns each rank's host name and address. Collective.

    Raises UserError naming the ranks that are missing after `timeout` seconds.
    """
    store, rank, ranks = joined.store, joined.rank, range(joined.world_size)
    if joined.world_size == 1:
        return [(socket.gethostname(), "127.0.0.1")]
    where = f"the store at {joined.master}:{joined.port}"
    keys = [f"host/{rank}" for rank in ranks]
    deadline = time.monotonic() + timeout
    try:
        store.set(keys[rank], json.dumps([socket.gethostname(), _address_towards(joined.master)]))
        # Polls: the store's own wait prints pages for each time-out.
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = [r for r in ranks if not store.check([keys[r]])]
                here = {r: json.loads(store.get(keys[r]))[0] for r in ranks if r not in missing}
                raise UserError(
                    f"waited {timeout:.0f} s for all {joined.world_size} ranks to join {where}: missing "
                    f"{_numbers(missing)}; present: {', '.join(f'rank {r} on {host}' for r, host in here.items())}: "
                    "check the output of the missing ranks and that all were started, or raise --start_timeout"
                )
            time.sleep(0.02)
        rows = [tuple(json.loads(store.get(key))) for key in keys]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"lost {where} while waiting for the {joined.world_size} ranks to join it ({reason}): "
            "the process that held it printed the reason"
        ) from None
    return [(host, address) for host, address in rows]


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def choose_interface(rank: int, rows: list[tuple[str, str]]) -> None:
    """If ranks run on several hosts, set the network interface that gloo uses to one that reaches the others.

    By default gloo uses the address that the host's name resolves to, often 127.0.1.1, which other hosts cannot reach.
    :param rows: each rank's host name and address, as returned by `rendezvous`.
    """
    address = rows[rank][1]
    others = [other for host, other in rows if host != rows[rank][0]]
    if not others or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if _is_loopback(address):  # the master is on this host; other hosts use another address
        address = _address_towards(next((other for other in others if not _is_loopback(other)), others[0]))
    name = "" if _is_loopback(address) else _interface_with(address)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _address_towards(host: str) -> str:
    """The address of this host as another host sees it. Raises UserError for a name that cannot be resolved."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise UserError(
            f"{socket.gethostname()} cannot find the host {host} ({error.strerror}): set MASTER_ADDR to an address of "
            "rank 0's host that all hosts reach"
        ) from None
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, only asks the kernel for the route
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} has no route to the host {host} ({error.strerror}): check its network, or set "
            "MASTER_ADDR to an address of rank 0's host that all hosts reach"
        ) from None


def _interface_with(address: str) -> str:
    """The network interface with this IPv4 address; "" if unknown."""
    if sys.platform != "linux":
        return ""
    import fcntl

    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return ""


def _alone(timeout: float) -> Joined:
    import torch.distributed as dist

    return Joined(dist.HashStore(), 0, 1, 0, 1, "127.0.0.1", 0)


def _by_torchrun(timeout: float) -> Joined:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", 0))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        import torch.distributed as dist

        _wait_for_listener(host, port, rank, timeout)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout)))
    else:
        store = _store(host, port, rank, world_size, timeout)
    local_rank, local_size = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    return Joined(store, rank, world_size, local_rank, local_size, host, port)


def _by_slurm(timeout: float) -> Joined:
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    host = os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"])
    job = int(os.environ.get("SLURM_JOB_ID", 0)) * 31 + int(os.environ.get("SLURM_STEP_ID", 0))
    port = int(os.environ.get("MASTER_PORT", 10000 + job % 20000))  # below the system's own choice of ports
    store = _store(host, port, rank, world_size, timeout)
    local_size = int(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])  # such as 4(x2),3
    return Joined(store, rank, world_size, int(os.environ.get("SLURM_LOCALID", 0)), local_size, host, port)


def _first_host(nodelist: str) -> str:
    """The first host of a SLURM list such as `node[03-05,9],other`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise UserError(f"cannot read SLURM_STEP_NODELIST {nodelist!r}: set MASTER_ADDR to the first host")
    return "".join(part or "" for part in match.groups())


def mpi(timeout: float | None = None) -> Any:
    """mpi4py's MPI. Raises UserError if it, or its MPI library, is missing.

    :param timeout: seconds that MPI's start may take, which waits for all ranks; then this process ends.
    """
    # Python's threads do not run during MPI's start: only this notices that it hangs.
    if timeout and "mpi4py.MPI" not in sys.modules:
        faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpiexec needs mpi4py and an MPI library ({error}): pip install mpi4py mpich, or start the ranks by "
            "torchrun --nproc-per-node N, which needs neither"
        ) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    return MPI


def _by_mpi(timeout: float) -> Joined:
    comm = mpi(timeout).COMM_WORLD
    rank, world_size = comm.Get_rank(), comm.Get_size()
    expected = int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", world_size)))
    if world_size != expected:
        raise UserError(
            f"mpiexec started {expected} ranks but mpi4py sees {world_size}: mpi4py uses another MPI library than "
            "this mpiexec: install both from one place (pip install mpi4py mpich)"
        )
    local = comm.Split_type(mpi().COMM_TYPE_SHARED)
    hosts = comm.allgather(socket.gethostname())
    # The store chooses a free port itself, so that no other process can take it in between. If rank 0 cannot find its
    # address, it sends that error to the others, which would otherwise wait.
    store: Any = None
    address: Any = None
    if rank == 0:
        try:
            host = os.environ.get("MASTER_ADDR") or _own_address(hosts)
            store = _store("0.0.0.0", 0, rank, world_size, timeout)
            address = (host, store.port)
        except UserError as error:
            address = error
    address = comm.bcast(address)
    if isinstance(address, UserError):
        raise address
    host, port = address
    if store is None:
        store = _store(host, port, rank, world_size, timeout)
    return Joined(store, rank, world_size, local.Get_rank(), local.Get_size(), host, port)


def _own_address(hosts: list[str]) -> str:
    """The address under which the other hosts reach this one, the first of `hosts`."""
    others = [host for host in hosts if host != hosts[0]]
    return _address_towards(others[0]) if others else "127.0.0.1"


def _store(host: str, port: int, rank: int, world_size: int, timeout: float) -> Any:
    import torch.distributed as dist

    if rank:
        _wait_for_listener(host, port, rank, timeout)
    try:
        return dist.TCPStore(
            host, port, world_size, is_master=rank == 0, wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
    except RuntimeError as error:
        does = "listen at" if rank == 0 else "join the store at"
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot {does} {host}:{port} ({str(error).splitlines()[0]}): set "
            "MASTER_ADDR to an address of rank 0's host, and MASTER_PORT to a port that is free there"
        ) from None


def _wait_for_listener(host: str, port: int, rank: int, timeout: float) -> None:
    """Wait until the store listens: its own attempts print pages for each failure."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(left, 10))):
                return
        except OSError as error:  # also a name that is not known yet
            if left <= 0:
                raise UserError(
                    f"rank {rank} waited {timeout:.0f} s for rank 0 at {host}:{port} "
                    f"({error.strerror or error}): check that rank 0 was started, that MASTER_ADDR and MASTER_PORT "
                    "name its host, and that no firewall blocks the connection"
                ) from None
        time.sleep(min(0.2, max(0, left)))
