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
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

from . import files
from .config import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)

_device: th.device | None = None


def detect_launcher(env: Mapping[str, str] = os.environ) -> str:
    """What started this process, by its environment: python, mpiexec, torchrun or srun."""
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        return "torchrun"
    # mpiexec may have started its own helpers by srun, so its variables come first.
    if "OMPI_COMM_WORLD_SIZE" in env or "HYDI_CONTROL_FD" in env or "MPI_LOCALNRANKS" in env:
        return "mpiexec"
    # Only a step that srun started has this; the batch script itself has SLURM_NTASKS alone.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return "srun"
    # SLURM gives its own steps these too, such as an interactive shell.
    if "SLURM_STEP_ID" not in env and ("PMI_SIZE" in env or "PMIX_RANK" in env):
        return "mpiexec"
    return "python"


def get_rank() -> int:
    """This process's rank; known before setup_dist() too."""
    if dist.is_initialized():
        return dist.get_rank()
    names = {
        "python": (),
        "torchrun": ("RANK",),
        "srun": ("SLURM_PROCID",),
        "mpiexec": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
    }
    return next((int(os.environ[name]) for name in names[detect_launcher()] if name in os.environ), 0)


def get_world_size() -> int:
    """The number of ranks; 1 before setup_dist()."""
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_dist() -> None:
    """Join the other ranks: gloo on CPUs, nccl between GPUs. A process started alone is rank 0 of 1.

    Raises UserError where ranks share a GPU, and where mpiexec is used without mpi4py or an MPI library.
    """
    global _device
    if dist.is_initialized():
        return
    launcher = detect_launcher()
    store, rank, world_size, local_rank, local_size = {
        "python": _join_alone, "mpiexec": _join_by_mpi, "torchrun": _join_by_torchrun, "srun": _join_by_slurm,
    }[launcher]()  # fmt: skip
    backend = "gloo"
    if th.cuda.is_available():
        # A scheduler may show each rank its own GPU only; where it shows all, the local rank chooses.
        _device = th.device("cuda", local_rank % th.cuda.device_count())
        th.cuda.set_device(_device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        _device = th.device("cpu")
        if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            th.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))  # ranks on one host share its cores
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    if launcher != "python":
        sys.excepthook = _end_by_exception
    atexit.register(_leave)
    _check_devices()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_alone():
    return dist.HashStore(), 0, 1, 0, 1


def _join_by_torchrun():
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
    return store, rank, world_size, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _join_by_slurm():
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    host = os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"])
    job = int(os.environ.get("SLURM_JOB_ID", 0)) * 31 + int(os.environ.get("SLURM_STEP_ID", 0))
    port = int(os.environ.get("MASTER_PORT", 10000 + job % 20000))  # below the ports that connections get by chance
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=COLLECTIVE_TIMEOUT)
    local_size = int(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])  # such as 4(x2),3
    return store, rank, world_size, int(os.environ.get("SLURM_LOCALID", 0)), local_size


def _first_host(nodelist: str) -> str:
    """The first host of a SLURM list such as `node[03-05,9],other`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise UserError(f"cannot read SLURM_STEP_NODELIST {nodelist!r}: set MASTER_ADDR to the first host")
    return "".join(part or "" for part in match.groups())


def _mpi():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpiexec needs mpi4py and an MPI library ({error}): pip install mpi4py mpich, or start the ranks by "
            "torchrun --nproc-per-node N, which needs neither"
        ) from None
    return MPI


def _join_by_mpi():
    comm = _mpi().COMM_WORLD
    rank, world_size = comm.Get_rank(), comm.Get_size()
    expected = int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", world_size)))
    if world_size != expected:
        raise UserError(
            f"mpiexec started {expected} ranks but mpi4py sees {world_size}: mpi4py uses another MPI library than "
            "this mpiexec; install both from one place (pip install mpi4py mpich)"
        )
    local = comm.Split_type(_mpi().COMM_TYPE_SHARED)
    hosts = comm.allgather(socket.gethostname())
    # The store chooses a free port itself, so that no other process can take it in between.
    store = None
    address = None
    if rank == 0:
        store = dist.TCPStore(
            "0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT
        )
        address = (os.environ.get("MASTER_ADDR") or _own_address(hosts), store.port)
    host, port = comm.bcast(address)
    if store is None:
        store = dist.TCPStore(host, port, world_size, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    return store, rank, world_size, local.Get_rank(), local.Get_size()


def _own_address(hosts: list[str]) -> str:
    """The address under which the given hosts, of which this is the first, reach this one."""
    others = [host for host in hosts if host != hosts[0]]
    if not others:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((others[0], 9))  # sends nothing: it only asks the kernel for the route
        return probe.getsockname()[0]


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
    """A line for each rank: rank -> host -> device. Collective."""
    rows = all_gather_object((socket.gethostname(), _device_name()))
    return "\n".join(f"rank {rank} -> {host} -> {device}" for rank, (host, device) in enumerate(rows))


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
    takes the others down."""
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            raise
        _end_by_exception(type(error), error, error.__traceback__)


def _end_by_exception(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Report the error and end this process, and under mpiexec the others."""
    _report_and_abort(kind, error, tb)
    sys.stdout.flush()
    # Not sys.exit: a collective's threads, or a worker that is stuck, must not keep a failed process alive.
    os._exit(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _report_and_abort(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Print what happened, once if all ranks fail alike, and end the other ranks."""
    rank = get_rank()
    many = get_world_size() > 1 or detect_launcher() != "python"
    if many and rank:
        time.sleep(2)  # if rank 0 fails alike, its message is enough: it ends this process meanwhile
    who = f"rank {rank} on {socket.gethostname()}: " if many else ""
    lost_peer = isinstance(error, RuntimeError) and re.search(
        r"Connection (closed|reset|refused)|remote process exited|[Tt]imed out", str(error)
    )
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
    elif many and lost_peer:
        print(
            f"{who}error: lost contact with another rank: its own message says why; one that was killed, as for want "
            f"of memory, leaves none ({str(error).strip()})",
            file=sys.stderr,
        )
    elif not isinstance(error, SystemExit):
        traceback.print_exception(kind, error, tb)
    sys.stderr.flush()
    if detect_launcher() == "mpiexec" and "mpi4py.MPI" in sys.modules and get_world_size() > 1:
        time.sleep(0.5)  # the abort would overtake what was printed, and mpiexec would throw that away
        # Without this, MPI's own clean-up at exit would wait for the other ranks for ever.
        _mpi().COMM_WORLD.Abort(_exit_code(error))
