"""Key-value logging to the terminal and to files.

Rank 0 writes the outputs that OPENAI_LOG_FORMAT lists (default "stdout,log,csv,jsonl"; of the commands
"line,log,csv,jsonl"); the other ranks write log-rankNNN.txt only.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import distributed
from ..utils import files
from ..utils.text import as_one
from .outputs import CSVOutputFormat, HumanOutputFormat, make_output_format

TERMINAL_FORMATS = ("stdout", "line")
DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class Logger:
    """Collects values by key and writes them to its outputs as one row."""

    CURRENT: Logger | None = None  # the logger in use; the module's functions write to it
    DEFAULT: Logger | None = None  # the logger that reset() goes back to; None: one that only prints
    configured: Mapping[str, Any] = MappingProxyType({})  # configure()'s arguments, without the folder

    def __init__(self, dir: str | None, output_formats: list[Any], comm: Any = None):
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.level = INFO
        self.values: dict[str, Any] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.deferred: list[Callable[[], Mapping[str, Any]]] = []

    def logkv(self, key: str, val: Any) -> None:
        self.values[key] = val

    def logkv_mean(self, key: str, val: float) -> None:
        count = self.counts[key]
        self.values[key] = self.values.get(key, 0.0) * count / (count + 1) + val / (count + 1)
        self.counts[key] = count + 1

    def defer(self, values: Callable[[], Mapping[str, Any]]) -> None:
        if values not in self.deferred:
            self.deferred.append(values)

    def take_row(self, other: Logger) -> None:
        """Go on with the row that another logger has begun."""
        self.values, self.counts, self.deferred = other.values, other.counts, other.deferred

    def dumpkvs(self) -> dict[str, Any]:
        for values in self.deferred:
            self.values.update({key: value for key, value in values().items() if key not in self.values})
        self.deferred.clear()
        row = dict(self.values) if self.comm is None else self._mean_over_comm()
        if row and self.level < DISABLED:
            for output in self.output_formats:
                output.writekvs(row)
        self.values.clear()
        self.counts.clear()
        return row

    def _mean_over_comm(self) -> dict[str, Any]:
        return mpi_weighted_mean(
            self.comm, {key: (value, self.counts.get(key, 1)) for key, value in self.values.items()}
        )

    def log(self, *args: Any, level: int = INFO) -> None:
        if self.level <= level:
            for output in self.output_formats:
                if hasattr(output, "writeseq"):
                    output.writeseq(args)

    def log_error(self, text: str) -> None:
        if self.level < DISABLED:
            for output in self.output_formats:
                if hasattr(output, "writeerror"):
                    output.writeerror(text)

    def expect(self, done: int, total: int) -> None:
        for output in self.output_formats:
            if hasattr(output, "expect"):
                output.expect(done, total)

    def log_image(self, name: str, image: Any, step: int) -> None:
        if self.level < DISABLED:
            for output in self.output_formats:
                if hasattr(output, "writeimage"):
                    output.writeimage(name, image, step)

    def drop_rows(self, first_step: int) -> int:
        dropped = 0
        for output in self.output_formats:
            if hasattr(output, "drop_rows"):
                count = output.drop_rows(first_step)
                dropped += count if isinstance(output, CSVOutputFormat) else 0
        return dropped

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str | None:
        return self.dir

    def close(self) -> None:
        for output in self.output_formats:
            output.close()


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
    """The means over the ranks of an MPI communicator of {key: (value, count)}, weighted by the counts.

    On rank 0 only: {} on the others. A text is taken from the first rank that has it.
    """
    gathered = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in gathered for key in part):
        pairs = [part[key] for part in gathered if key in part]
        try:
            row[key] = sum(float(value) * count for value, count in pairs) / sum(count for _, count in pairs)
        except ValueError:
            row[key] = pairs[0][0]
    return row


def configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Any = None, log_suffix: str = "",
    held: Held | None = None,
) -> None:  # fmt: skip
    """Log into a folder: `dir`, else OPENAI_LOGDIR, else a new ./runs/<script>-<time>.

    :param format_strs: the outputs; unless given, by OPENAI_LOG_FORMAT on rank 0, OPENAI_LOG_FORMAT_MPI on the others.
    :param comm: an MPI communicator over whose ranks the values are averaged.
    :param held: by `hold`; its messages begin the log's files, and what was logged of a row begins the first row.
    """
    if dir is None:
        dir = os.environ.get("OPENAI_LOGDIR") or distributed.from_rank0(_new_run_dir)
    dir = os.path.abspath(os.path.expanduser(dir))
    files.make_dirs(dir)
    names = format_names(format_strs)
    configured = {"format_strs": names, "comm": comm, "log_suffix": log_suffix}
    if distributed.get_rank() > 0:
        log_suffix += f"-rank{distributed.get_rank():03d}"
    try:
        outputs = [make_output_format(name, dir, log_suffix) for name in names]
    except files.UserError:
        raise
    except ValueError as error:
        raise files.UserError(f"OPENAI_LOG_FORMAT: {error}") from None
    except OSError as error:
        advice = files.remedy(error, ": choose another --out_dir")
        raise files.UserError(f"cannot write {error.filename or dir}: {error.strerror}{advice}") from None
    before = get_current()
    if before is not Logger.DEFAULT:
        before.close()
    Logger.CURRENT = Logger(dir, outputs, comm)
    Logger.CURRENT.configured = configured
    if held is None:
        log(f"logging to {dir}")
    else:
        Logger.CURRENT.take_row(before)
        held.write([output for name, output in zip(names, outputs) if name not in TERMINAL_FORMATS])


def format_names(given: Iterable[str] | None) -> list[str]:
    """The outputs that `configure` makes."""
    if given is None:
        first = distributed.get_rank() == 0
        names = ("OPENAI_LOG_FORMAT", "stdout,log,csv,jsonl") if first else ("OPENAI_LOG_FORMAT_MPI", "log")
        given = os.environ.get(*names).split(",")
    return [name for name in given if name]


class Held:
    """An output that keeps messages for the files of a folder that does not exist yet."""

    def __init__(self) -> None:
        self.messages: list[tuple[Any, ...]] = []

    def writeseq(self, seq: Iterable[Any]) -> None:
        self.messages.append(tuple(seq))

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """A row needs a folder."""

    def close(self) -> None:
        """There is nothing to close."""

    def write(self, outputs: Iterable[Any]) -> None:
        """Write the messages to those of the outputs that take text."""
        for output in outputs:
            for message in self.messages if hasattr(output, "writeseq") else ():
                output.writeseq(message)


def hold(dir: str, format_strs: Iterable[str] | None) -> Held:
    """Print messages until `configure(dir, format_strs, held=...)` makes the folder."""
    held = Held()
    shown = [make_output_format(name, dir) for name in format_names(format_strs) if name in TERMINAL_FORMATS]
    Logger.CURRENT = Logger(dir, [*shown, held])
    log(f"logging to {dir}")
    return held


def configure_anew() -> None:
    """Log into a new folder beside the present one, in the same way: for the next run of this process. Collective.

    The row that has been begun goes on there.
    """
    before = get_current()
    configure(distributed.from_rank0(files.unused, get_dir()), **before.configured)
    get_current().take_row(before)


def _new_run_dir() -> str:
    stem = Path(sys.argv[0] or "python").stem or "python"
    return os.path.join("runs", f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def get_current() -> Logger:
    """The current logger; before configure(), one that only prints."""
    if Logger.CURRENT is None:
        Logger.CURRENT = Logger(None, [HumanOutputFormat(sys.stdout)] if distributed.get_rank() == 0 else [])
    return Logger.CURRENT


def get_dir() -> str:
    """The folder of the log; configures the logger if that has not been done."""
    if get_current().dir is None:
        configure()
    return str(get_current().dir)


def reset() -> None:
    """Close the outputs and forget the configuration."""
    if Logger.CURRENT not in (None, Logger.DEFAULT):
        Logger.CURRENT.close()
    Logger.CURRENT = Logger.DEFAULT


atexit.register(reset)


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """configure() for the length of a with statement."""
    previous, Logger.CURRENT = Logger.CURRENT, None
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        reset()
        Logger.CURRENT = previous


def logkv(key: str, val: Any) -> None:
    """Set the value of a key in the next row."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """Add a value whose mean goes into the next row."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """logkv for each item."""
    for key, value in d.items():
        logkv(key, value)


def defer(values: Callable[[], Mapping[str, Any]]) -> None:
    """Add values() to the next row when that is written: for values that a device is still computing.

    Values of the same key that are logged directly win.
    """
    get_current().defer(values)


def dumpkvs() -> dict[str, Any]:
    """Write the row and start the next one; returns the row."""
    return get_current().dumpkvs()


def drop_rows(first_step: int) -> int:
    """Remove the rows of `first_step` and later, which a resumed run logs again.

    Rows without a step stay. Returns the number of rows removed from the CSV, including an incomplete last row.
    """
    return get_current().drop_rows(first_step)


def log_image(name: str, image: Any, step: int) -> None:
    """Write an image, uint8 [H, W, C], to the outputs that take images."""
    get_current().log_image(name, image, step)


def add_output(output: Any) -> None:
    """Add an output: an object with writekvs(row) and close(), and optionally writeseq(words), writeimage(name, image,
    step), drop_rows(first_step), writeerror(text) and expect(done, total)."""
    get_current().output_formats.append(output)


def getkvs() -> dict[str, Any]:
    """The row collected so far."""
    return get_current().values


def log(*args: Any, level: int = INFO) -> None:
    """Write a message to the outputs that take text."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """A message of level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """A message of level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """A message of level WARN."""
    log("warning:", *_as_one(args), level=WARN)


def error(*args: Any) -> None:
    """A message of level ERROR."""
    log("error:", *_as_one(args), level=ERROR)


def _as_one(args: Iterable[Any]) -> list[str]:
    return [as_one(str(arg)) for arg in args]


def log_error(error: BaseException | None) -> None:
    """Write the error that ends a command into the log's files: whoever ends the process shows it on the terminal."""
    text = distributed.describe_error(error) if error is not None else ""
    if text and Logger.CURRENT is not None:
        Logger.CURRENT.log_error(text)


def expect(done: int, total: int) -> None:
    """From now on rows are of the steps from `done` to `total`, 0 for no end: for outputs that show the time left."""
    get_current().expect(done, total)


def set_level(level: int) -> None:
    """Drop messages below a level."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average values over an MPI communicator."""
    get_current().set_comm(comm)


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that the block takes to the key wait_<scopename>."""
    start = time.perf_counter()
    try:
        yield
    finally:
        values = get_current().values
        key = "wait_" + scopename
        values[key] = values.get(key, 0.0) + time.perf_counter() - start


def profile(n: str):
    """A decorator that applies profile_kv to each call."""

    def decorator(func):
        def wrapped(*args, **kwargs):
            with profile_kv(n):
                return func(*args, **kwargs)

        return wrapped

    return decorator
