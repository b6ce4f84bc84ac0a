"""The process group: the same program under plain python, mpiexec, torchrun and srun."""

from __future__ import annotations

import atexit
import socket
import sys
import time
from datetime import timedelta

import torch as th
import torch.distributed as dist

from ..config import UserError
from . import launchers, watchdog
from .collectives import all_gather_object, barrier, get_rank, get_world_size
from .devices import check_devices, choose_device, dev, device_name
from .errors import abort, end_by_exception
from .launchers import detect_launcher
from .watchdog import working

# Long, for rank 0 may work while the others wait in a collective: ranks that are gone are the watchdog's to notice.
COLLECTIVE_TIMEOUT = timedelta(hours=24)

_CONNECTIONS = (
    "the hosts must reach each other on every port (see to the firewall); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "name the network interface to use"
)
_self_test = ""


def setup_dist() -> None:
    """Join the other ranks: gloo on CPUs, nccl between GPUs. A process started alone is rank 0 of 1.

    From here on a rank that dies, freezes or is cut off ends the others within a minute, with a message.
    Raises UserError where ranks are missing, cannot connect, or share a GPU, and where mpiexec is used without mpi4py
    or an MPI library.
    """
    global _self_test
    if dist.is_initialized():
        return
    launcher = detect_launcher()
    if launcher != "python":
        sys.excepthook = end_by_exception
        watchdog.identify(f"rank {get_rank()} on {socket.gethostname()}: ", abort if launcher == "mpiexec" else None)
    limit_s = launchers.START_TIMEOUT + 15  # the steps of the start have their own limits, with better messages
    with working("the other ranks to start: look at what they printed, and see that all were started", limit_s):
        joined = launchers.join()
        rows = launchers.meet(joined)
        hosts = [host for host, _ in rows]
        launchers.choose_interface(joined.rank, rows)
    backend = choose_device(joined)
    with working(f"the ranks' connections to each other: {_CONNECTIONS}", limit_s):
        try:
            dist.init_process_group(
                backend, store=joined.store, rank=joined.rank, world_size=joined.world_size, timeout=COLLECTIVE_TIMEOUT
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the ranks cannot connect to each other ({reason}): {_CONNECTIONS}") from None
    check_devices()
    if joined.world_size > 1:
        watchdog.start(joined.rank, hosts)
        with working(f"the first collectives: {_CONNECTIONS}", limit_s):
            _self_test = _test_collectives(len(set(hosts)))
    atexit.register(_leave)


def _test_collectives(hosts: int) -> str:
    """What the collectives give is right on this rank's kinds of device; a line that says how long they take."""
    rank, ranks = get_rank(), get_world_size()
    times = []
    for device in {th.device("cpu"): 0, dev(): 0}:
        for _ in range(2):  # the first one also makes the connections
            values = th.full((1 << 20,), rank + 1.0, device=device)
            barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            total = values.sum().item() / len(values)  # waits for the device
            seconds = time.perf_counter() - started
        number = th.full((1,), float(rank), device=device)
        dist.broadcast(number, ranks - 1)
        if total != ranks * (ranks + 1) / 2 or number.item() != ranks - 1:
            raise UserError(
                f"a test of the collectives on {device} went wrong: the sum of 1..{ranks} came as {total:g}, rank "
                f"{ranks - 1}'s number as {number.item():g}: see that all ranks run the same version of torch"
            )
        times.append(f"{1e3 * seconds:.1f} ms on {device.type}")
    names = f"{ranks} ranks on {hosts} host{'s' if hosts > 1 else ''}"
    return f"collectives: {names}, all-reduce of 4 MiB in {', '.join(times)}"


def _leave() -> None:
    watchdog.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_ranks() -> str:
    """A line for each rank, rank -> host -> device, and for more than one how long a collective takes. Collective."""
    rows = all_gather_object((socket.gethostname(), device_name()))
    lines = [f"rank {rank} -> {host} -> {device}" for rank, (host, device) in enumerate(rows)]
    return "\n".join([*lines, _self_test] if _self_test else lines)
