"""The process group: the same program under plain python, mpiexec, torchrun and srun."""

from __future__ import annotations

import atexit
import socket
import sys
import time
from collections import Counter
from datetime import timedelta

import torch as th
import torch.distributed as dist

from ..config import RunConfig, UserError
from ..utils.text import counted, listed
from . import launchers, watchdog
from .collectives import all_gather_object, barrier
from .devices import check_devices, choose_device, dev, device_name
from .errors import abort, end_by_exception
from .launchers import detect_launcher, get_rank, get_world_size
from .watchdog import working

_CONNECTIONS = (
    "the hosts must reach each other on every port (check the firewall); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "name the network interface to use"
)
MOST_HOSTS_NAMED = 8
_self_test = ""


def setup_dist(
    *,
    start_timeout: float = RunConfig.start_timeout,
    collective_timeout: float = RunConfig.collective_timeout,
    hang_timeout: float = RunConfig.hang_timeout,
) -> None:
    """Join the other ranks: gloo on CPUs, nccl between GPUs. A process started alone is rank 0 of 1.

    From then on, a rank that dies, freezes or is disconnected ends the others within a minute, with a message; a rank
    whose launcher is killed gets a SIGTERM. Once the ranks have joined, further calls have no effect.
    :param start_timeout: seconds that a rank waits at the start for the others.
    :param collective_timeout: hours that a collective may take. Long, because rank 0 may work while the others wait in
        one; lost ranks are noticed earlier.
    :param hang_timeout: seconds that loading a batch, or a training step on all ranks, may take.
    Raises UserError if ranks are missing, cannot connect or share a GPU, and for mpiexec without mpi4py or an MPI
    library.
    """
    global _self_test
    if dist.is_initialized():
        return
    launcher = detect_launcher()
    if launcher != "python":
        sys.excepthook = end_by_exception
        watchdog.identify(f"rank {get_rank()} on {socket.gethostname()}: ", abort if launcher == "mpiexec" else None)
    launchers.stop_with_launcher()
    watchdog.set_limit(hang_timeout)
    limit_s = start_timeout + 15  # the steps of the start have their own limits, with better messages
    with working("the other ranks to start: check their output and that all were started", limit_s):
        joined = launchers.join(start_timeout)
        rows = launchers.rendezvous(joined, start_timeout)
        hosts = [host for host, _ in rows]
        launchers.choose_interface(joined.rank, rows)
    backend = choose_device(joined)
    with working(f"the ranks' connections to each other: {_CONNECTIONS}", limit_s):
        try:
            dist.init_process_group(
                backend,
                store=joined.store,
                rank=joined.rank,
                world_size=joined.world_size,
                timeout=timedelta(hours=collective_timeout),
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


def join_ranks(config: RunConfig) -> None:
    """`setup_dist` with the limits of the run's options; a later run of this process may have another hang_timeout.

    Collective.
    """
    watchdog.set_limit(config.hang_timeout)
    setup_dist(
        start_timeout=config.start_timeout,
        collective_timeout=config.collective_timeout,
        hang_timeout=config.hang_timeout,
    )


def _test_collectives(hosts: int) -> str:
    """Check the results of collectives on this rank's devices; returns a line with their times.

    Raises UserError for a wrong result.
    """
    rank, ranks = get_rank(), get_world_size()
    times = []
    for device in {th.device("cpu"): 0, dev(): 0}:
        for _ in range(2):  # the first also opens the connections
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
                f"the test of collectives on {device} failed: the sum of 1..{ranks} is {total:g}, the number of rank "
                f"{ranks - 1} is {number.item():g}: check that all ranks run the same version of torch"
            )
        times.append(f"{1e3 * seconds:.1f} ms on {device.type}")
    names = f"{ranks} ranks on {hosts} host{'s' if hosts > 1 else ''}"
    return f"collectives: {names}, all-reduce of 4 MiB in {', '.join(times)}"


def _leave() -> None:
    watchdog.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_ranks() -> str:
    """A line on the processes, their hosts and devices; for several also one with the time of a collective.

    Collective.
    """
    devices: dict[str, Counter[str]] = {}
    ranks = all_gather_object((socket.gethostname(), device_name()))
    for host, device in ranks:
        devices.setdefault(host, Counter())[device] += 1
    on_host = {
        host: ", ".join(f"{n} x {device}" if n > 1 else device for device, n in found.items())
        for host, found in devices.items()
    }
    processes = counted(len(ranks), "process", "processes")
    if len(on_host) == 1:
        ((host, found),) = on_host.items()
        line = f"{processes} on {host}: {found}"
    else:
        hosts = listed([f"{host} ({found})" for host, found in on_host.items()], MOST_HOSTS_NAMED)
        line = f"{processes} on {len(on_host):,} hosts: {hosts}"
    return f"{line}\n{_self_test}" if _self_test else line
