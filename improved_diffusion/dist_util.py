"""Ranks, devices and collectives: the same program under plain python, mpiexec, torchrun and srun."""

from __future__ import annotations

import atexit
import io
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

from . import files, rendezvous, watchdog
from .config import UserError
from .rendezvous import detect_launcher, rank_by_environment
from .watchdog import beat, end_process, working

__all__ = [
    "all_gather_object", "all_gather_ragged", "barrier", "beat", "describe_ranks", "detect_launcher", "dev",
    "end_process", "from_rank0", "get_rank", "get_world_size", "load_state_dict", "run_script", "setup_dist",
    "sum_over_ranks", "sync_params", "to_device", "working",
]  # fmt: skip

# Long, for rank 0 may work while the others wait in a collective: ranks that are gone are the watchdog's to notice.
COLLECTIVE_TIMEOUT = timedelta(hours=24)
STOPPED = 75  # the exit code of a run that was asked to stop, and saved: EX_TEMPFAIL, run it again

_CONNECTIONS = (
    "the hosts must reach each other on every port (see to the firewall); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "name the network interface to use"
)

_device: th.device | None = None
_self_test = ""


def get_rank() -> int:
    """This process's rank; known before setup_dist() too."""
    if dist.is_initialized():
        return dist.get_rank()
    return rank_by_environment()


def get_world_size() -> int:
    """The number of ranks; 1 before setup_dist()."""
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_dist() -> None:
    """Join the other ranks: gloo on CPUs, nccl between GPUs. A process started alone is rank 0 of 1.

    From here on a rank that dies, freezes or is cut off ends the others within a minute, with a message.
    Raises UserError where ranks are missing, cannot connect, or share a GPU, and where mpiexec is used without mpi4py
    or an MPI library.
    """
    global _device, _self_test
    if dist.is_initialized():
        return
    launcher = detect_launcher()
    if launcher != "python":
        sys.excepthook = _end_by_exception
        watchdog.identify(f"rank {get_rank()} on {socket.gethostname()}: ", _abort if launcher == "mpiexec" else None)
    limit_s = rendezvous.START_TIMEOUT + 15  # the steps of the start have their own limits, with better messages
    with working("the other ranks to start: look at what they printed, and see that all were started", limit_s):
        joined = rendezvous.join()
        rows = rendezvous.meet(joined)
        hosts = [host for host, _ in rows]
        rendezvous.choose_interface(joined.rank, rows)
    backend = _choose_device(joined)
    with working(f"the ranks' connections to each other: {_CONNECTIONS}", limit_s):
        try:
            dist.init_process_group(
                backend, store=joined.store, rank=joined.rank, world_size=joined.world_size, timeout=COLLECTIVE_TIMEOUT
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the ranks cannot connect to each other ({reason}): {_CONNECTIONS}") from None
    _check_devices()
    if joined.world_size > 1:
        watchdog.start(joined.rank, hosts)
        with working(f"the first collectives: {_CONNECTIONS}", limit_s):
            _self_test = _test_collectives(len(set(hosts)))
    atexit.register(_leave)


def _choose_device(joined: rendezvous.Joined) -> str:
    """Set this rank's device; the backend for it."""
    global _device
    if th.cuda.is_available():
        # A scheduler may show each rank its own GPU only; where it shows all, the local rank chooses.
        _device = th.device("cuda", joined.local_rank % th.cuda.device_count())
        th.cuda.set_device(_device)
        return "cpu:gloo,cuda:nccl"
    _device = th.device("cpu")
    if joined.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Ranks on one host share its cores.
        th.set_num_threads(max(1, (os.cpu_count() or 1) // joined.local_size))
    return "gloo"


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


def dev() -> th.device:
    """The device of this rank."""
    if _device is not None:
        return _device
    return th.device("cuda" if th.cuda.is_available() else "cpu")


def _device_name() -> str:
    if dev().type != "cuda":
        return str(dev())
    return f"{dev()} ({th.cuda.get_device_name(dev())})"


def _check_devices() -> None:
    """All ranks have GPUs, each its own, or none has: nccl would fail, or hang, without saying so."""
    gpu = None
    if dev().type == "cuda":
        properties = th.cuda.get_device_properties(dev())
        # torch 2.4 has no uuid
        gpu = str(getattr(properties, "uuid", (os.environ.get("CUDA_VISIBLE_DEVICES"), dev().index)))
    keys = all_gather_object((socket.gethostname(), gpu))
    without = [rank for rank, (_, found) in enumerate(keys) if found is None]
    if without and len(without) < len(keys):
        raise UserError(
            f"rank {without[0]} on {keys[without[0]][0]} finds no GPU where others do: mend its driver, leave the host "
            'out, or run all on CPUs with CUDA_VISIBLE_DEVICES=""'
        )
    taken: dict[tuple[str, str | None], int] = {}
    for rank, key in enumerate(keys):
        if key in taken and key[1] is not None:
            raise UserError(
                f"ranks {taken[key]} and {rank} on {key[0]} would share a GPU: start at most one rank per visible GPU "
                f'(this one sees {th.cuda.device_count()}) on each host, or on CPUs with CUDA_VISIBLE_DEVICES=""'
            )
        taken[key] = rank


def describe_ranks() -> str:
    """A line for each rank, rank -> host -> device, and for more than one how long a collective takes. Collective."""
    rows = all_gather_object((socket.gethostname(), _device_name()))
    lines = [f"rank {rank} -> {host} -> {device}" for rank, (host, device) in enumerate(rows)]
    return "\n".join([*lines, _self_test] if _self_test else lines)


def to_device(tensor: th.Tensor, device: th.device) -> th.Tensor:
    """The CPU tensor on a device, without waiting for what the device has still to do."""
    if th.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_gather_object(obj: Any) -> list[Any]:
    """Every rank's object, in rank order. Collective."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def all_gather_ragged(tensor: th.Tensor) -> list[th.Tensor]:
    """Every rank's CPU tensor [n, ...], n its own, in rank order. Collective."""
    if get_world_size() == 1:
        return [tensor]
    sizes = all_gather_object(len(tensor))
    padded = th.zeros(max(sizes), *tensor.shape[1:], dtype=tensor.dtype)
    padded[: len(tensor)] = tensor
    gathered = [th.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes)]


def from_rank0(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) called on rank 0 alone; every rank gets its result, or raises its UserError. Collective."""
    if get_world_size() == 1:
        return function(*args)
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=th.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_over_ranks(tensor: th.Tensor) -> th.Tensor:
    """The sum of the ranks' tensors, in place. Collective."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if get_world_size() > 1:
        # A CPU tensor, so that gloo serves it: nccl's barrier would first have to guess a GPU.
        dist.all_reduce(th.zeros(1))


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """torch.load of a file that rank 0 reads and hands to all, so that only its host must have it. Collective.

    Nothing in the file is executed (`weights_only`). Raises UserError for a missing, cut or hostile file.
    """
    data = from_rank0(files.read_bytes, path)
    try:
        return th.load(io.BytesIO(data), **{**kwargs, "weights_only": True})
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds objects other than tensors, which could run code when loaded; they were not loaded"
        raise UserError(
            f"cannot load {path} ({len(data)} bytes): {reason}: damaged, or not a checkpoint; use another file"
        ) from None


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Give every rank rank 0's values. Collective."""
    for p in params:
        with th.no_grad():
            dist.broadcast(p, 0)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake ends in one message and exit code 1, Ctrl-C in 130, and a rank that fails
    takes the others down. SystemExit(75) on all ranks, a run that was asked to stop, ends each in order with that."""
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, STOPPED):
            raise
        _end_by_exception(type(error), error, error.__traceback__)


def _end_by_exception(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Report the error and end this process, and under mpiexec the others."""
    _report(kind, error, tb)
    # Not sys.exit: a collective's threads, or a worker that is stuck, must not keep a failed process alive.
    watchdog.end_process(_exit_code(error))


def _abort(code: int) -> None:
    # Without this, MPI's own clean-up at exit would wait for the other ranks for ever.
    if "mpi4py.MPI" in sys.modules and get_world_size() > 1:
        rendezvous.mpi().COMM_WORLD.Abort(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _report(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Print what happened, once if all ranks fail alike."""
    rank = get_rank()
    many = get_world_size() > 1 or detect_launcher() != "python"
    lost_peer = bool(
        many
        and isinstance(error, RuntimeError)
        and re.search(r"Connection (closed|reset|refused)|remote process exited|[Tt]imed out", str(error))
    )
    reason = watchdog.report_by_main(lost_peer)
    if many and rank:
        time.sleep(2)  # if rank 0 fails alike, its message is enough: it ends this process meanwhile
    who = f"rank {rank} on {socket.gethostname()}: " if many else ""
    if isinstance(error, UserError):
        print(f"{who}error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        if rank == 0:  # it alone knows what has been saved
            print(f"{who}interrupted{': ' + str(error) if str(error) else ''}", file=sys.stderr)
    elif isinstance(error, th.cuda.OutOfMemoryError):
        print(
            f"{who}error: the GPU's memory is full: lower --batch_size or --microbatch, or use --use_checkpoint or "
            f"--precision bf16 ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
    elif lost_peer:
        unknown = (
            "lost contact with another rank: its own message says why; one that was killed, as for want of memory, "
            f"leaves none ({str(error).strip()})"
        )
        print(f"{who}error: {reason or unknown}", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(kind, error, tb)
    sys.stderr.flush()
