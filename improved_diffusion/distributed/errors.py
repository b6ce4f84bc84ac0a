"""How a process of a command ends: messages, exit codes, and the other ranks."""

from __future__ import annotations

import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch as th

from ..config import UserError
from . import launchers, watchdog
from .collectives import get_rank, get_world_size
from .launchers import detect_launcher

STOPPED = 75  # the exit code of a run that was asked to stop, and saved: EX_TEMPFAIL, run it again


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake ends in one message and exit code 1, Ctrl-C in 130, and a rank that fails
    takes the others down. SystemExit(75) on all ranks, a run that was asked to stop, ends each in order with that."""
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, STOPPED):
            raise
        end_by_exception(type(error), error, error.__traceback__)


def end_by_exception(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Report the error and end this process, and under mpiexec the others.

    An error with the `exit_code` STOPPED comes on all ranks alike: each ends in order, with that code.
    """
    if getattr(error, "exit_code", None) == STOPPED:
        raise SystemExit(STOPPED)
    _report(kind, error, tb)
    # Not sys.exit: a collective's threads, or a worker that is stuck, must not keep a failed process alive.
    watchdog.end_process(_exit_code(error))


def abort(code: int) -> None:
    # Without this, MPI's own clean-up at exit would wait for the other ranks for ever.
    if "mpi4py.MPI" in sys.modules and get_world_size() > 1:
        launchers.mpi().COMM_WORLD.Abort(code)


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
