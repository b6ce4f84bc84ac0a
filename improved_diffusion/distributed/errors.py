"""How a command ends: messages, exit codes, and what happens to the other ranks. Also before torch is imported."""

from __future__ import annotations

import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from ..config import UserError
from ..utils.stop_signals import STOPPED
from ..utils.terminal import close_streams, complain, open_streams
from . import launchers, watchdog
from .launchers import detect_launcher, get_rank, get_world_size


def run_script(main: Callable[[], None]) -> None:
    """Run the main function of a script and end the process as a command should.

    A UserError becomes one message and exit code 1, Ctrl-C exit code 130. A rank that fails ends the others. SystemExit
    (75) on all ranks, of a run that was asked to stop, ends each rank normally with that code.
    """
    open_streams()
    try:
        main()
        close_streams()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, STOPPED):
            close_streams()
            raise
        end_by_exception(type(error), error, error.__traceback__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that an accelerator's memory is full."""
    th = sys.modules.get("torch")  # which raises it
    return (th is not None and isinstance(error, th.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    )


def describe_error(error: BaseException) -> str:
    """What a message says of the error that ends a command; "" where there is nothing to say."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{': ' + str(error) if str(error) else ''}"
    if is_out_of_memory(error):
        return (
            "error: the GPU's memory is full: lower --batch_size or --microbatch, or use --use_checkpoint or "
            f"--precision bf16 ({str(error).splitlines()[0]})"
        )
    return "" if isinstance(error, SystemExit) else "".join(traceback.format_exception(error)).rstrip()


def end_by_exception(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Report the error and end this process; under mpiexec also the others."""
    _report(kind, error, tb)
    # Not sys.exit: threads of a collective or a stuck worker must not keep a failed process alive.
    watchdog.end_process(_exit_code(error))


def abort(code: int) -> None:
    """End all ranks' processes under mpiexec."""
    # Without this, MPI's clean-up at exit would wait for the other ranks forever.
    if "mpi4py.MPI" in sys.modules and get_world_size() > 1:
        launchers.mpi().COMM_WORLD.Abort(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _report(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Print what happened; only once if all ranks fail with the same error."""
    rank = get_rank()
    many = get_world_size() > 1 or detect_launcher() != "python"
    lost_peer = bool(
        many
        and isinstance(error, RuntimeError)
        and re.search(r"Connection (closed|reset|refused)|remote process exited|[Tt]imed out", str(error))
    )
    reason = watchdog.report_by_main(lost_peer)
    if many and rank:
        time.sleep(2)  # if rank 0 fails with the same error, it ends this process meanwhile
    who = f"rank {rank} on {socket.gethostname()}: " if many else ""
    if lost_peer:
        unknown = (
            "lost contact with another rank: its own message says why; a rank that was killed, for example by the "
            f"out-of-memory killer, leaves none ({str(error).strip()})"
        )
        complain(f"{who}error: {reason or unknown}")
    elif isinstance(error, KeyboardInterrupt) and rank:
        pass  # only rank 0 knows what has been saved
    elif text := describe_error(error):
        complain(text if text.startswith("Traceback") else who + text)
