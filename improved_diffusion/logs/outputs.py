"""The outputs of the logger: terminal, text, CSV and JSON. A full disk neither loses rows nor ends a run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import IO, Any

from ..config import one_line
from ..utils import files
from ..utils.terminal import complain, encodable
from ..utils.text import printable


class PatientFile:
    """A text file to append to. Entries that cannot be written are kept in memory, in order, and retried.

    Raises OSError if the file cannot be opened at first, and UserError for a link or a pipe; later errors are a
    warning, once per outage.
    """

    LIMIT = 10_000  # entries in memory; then the oldest are dropped
    BATCH = 25  # entries written at once, so that an attempt costs the same however many are waiting

    def __init__(self, filename: str):
        self.path = Path(filename)
        self.unwritten: deque[Any] = deque()
        self.dropped = 0
        self.failing = False
        self.sound_size: int | None = None  # the file's size before an append that has not succeeded yet
        files.require_plain(self.path)
        is_new = not self.path.exists()
        open(self.path, "ab").close()
        if is_new:
            self.path.unlink()  # the file appears with the first entry

    def add(self, entry: Any) -> None:
        """Append an entry after those that are still waiting."""
        if len(self.unwritten) >= self.LIMIT:
            self.unwritten.popleft()
            self.dropped += 1
        self.unwritten.append(entry)
        self._try()

    def _try(self) -> None:
        try:
            while self.unwritten:
                batch = list(islice(self.unwritten, self.BATCH))
                self._store(batch)
                for _ in batch:
                    self.unwritten.popleft()
        except (OSError, files.UserError) as error:
            if not self.failing:
                reason = str(error)
                if isinstance(error, OSError):
                    reason = f"cannot write {self.path}: {error.strerror or error}: free some space"
                complain(f"warning: {reason}; the run continues; unwritten entries are kept in memory and retried")
            self.failing = True
        else:
            self.failing = False

    def _store(self, entries: list[Any]) -> None:
        """Write all entries, or none and raise OSError or UserError."""
        self._append("".join(entries))

    def _append(self, text: str) -> None:
        data = memoryview(text.encode(errors="backslashreplace"))
        self._undo()
        try:
            # Opened each time: a handle may stay dead after an outage of the storage. Unbuffered: a buffer would be
            # written again when the file is closed, after the line was undone.
            with open(self.path, "a+b", buffering=0) as f:
                self.sound_size = f.seek(0, os.SEEK_END)
                if self.sound_size and not _ends_line(f):
                    data = memoryview(b"\n" + data)  # a killed run has left an incomplete line
                while data:
                    data = data[f.write(data) :]
        except OSError:
            with suppress(OSError):
                self._undo()
            raise
        self.sound_size = None

    def _undo(self) -> None:
        """Remove what a failed or interrupted append has written."""
        if self.sound_size is not None:
            with suppress(FileNotFoundError):
                if self.path.stat().st_size > self.sound_size:
                    os.truncate(self.path, self.sound_size)
            self.sound_size = None

    def _read(self) -> str:
        """The file's text; "" if it does not exist. After a power cut it may hold anything."""
        try:
            self.path.stat()  # unlike exists(), raises if the storage is gone
        except FileNotFoundError:
            return ""
        return files.read_bytes(self.path).decode(errors="replace").replace("\0", "")

    def close(self) -> None:
        """Try once more, and report what is lost."""
        if self.unwritten:
            self._try()
        lost = self.dropped + len(self.unwritten)
        if lost:
            complain(f"error: {lost} {'entry' if lost == 1 else 'entries'} of {self.path} could not be written: lost")
        self.unwritten.clear()
        self.dropped = 0


def _ends_line(f: IO[bytes]) -> bool:
    """Whether the last byte of a file that is not empty ends a line."""
    f.seek(-1, os.SEEK_END)
    return f.read(1) == b"\n"


class KVWriter:
    """An output that takes rows of values."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        raise NotImplementedError


class SeqWriter:
    """An output that takes messages."""

    def writeseq(self, seq: Iterable[Any]) -> None:
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Tables and messages, to a file or a terminal. Control characters are escaped."""

    def __init__(self, target: str | Any):
        self.file: Any = target
        self.lines = PatientFile(target) if isinstance(target, str) else None
        self.failing = False

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        cells = {
            one_line(key): f"{value:<8.3g}" if hasattr(value, "__float__") else one_line(value)
            for key, value in sorted(kvs.items())
        }
        if not cells:
            return
        left, right = max(map(len, cells)), max(map(len, cells.values()))
        rule = "-" * (left + right + 7)
        rows = [f"| {key:<{left}} | {value:<{right}} |" for key, value in cells.items()]
        self.writeseq(["\n".join([rule, *rows, rule])])

    def writeseq(self, seq: Iterable[Any]) -> None:
        text = printable(" ".join(map(str, seq))) + "\n"
        if self.lines is not None:
            self.lines.add(text)
            return
        try:
            self._print(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not self.failing:
                reason = getattr(error, "strerror", None) or error
                complain(f"warning: cannot write to the standard output: {reason}; the run continues")
            self.failing = True
        else:
            self.failing = False

    def writeerror(self, text: str) -> None:
        """Write the error that ends a command to a file; the terminal gets it from whoever ends the process."""
        if self.lines is not None:
            self.writeseq([text])

    def _print(self, text: str) -> None:
        if self.file is None:  # stdout was closed when Python started
            return
        text = encodable(text, self.file)
        if self.file.isatty() and "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=self.file):
                self.file.write(text)
        else:
            self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()


_IN_LINE = {"loss": "loss {:.4g}", "lr": "lr {:.3g}", "images_per_second": "{:.4g} images/s"}


class LineOutputFormat(HumanOutputFormat):
    """Messages, and a line for each row: the values that tell how training goes. For a terminal."""

    def __init__(self, target: str | Any):
        super().__init__(target)
        self.done, self.total = 0, 0
        self.since = time.monotonic()

    def expect(self, done: int, total: int) -> None:
        """From now on rows are of the steps from `done` to `total`; 0: without end."""
        self.done, self.total = done, total
        self.since = time.monotonic()

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in kvs.items() if hasattr(value, "__float__")}
        step = values.pop("step", None)
        usual = [key for key in _IN_LINE if key in values]
        others = sorted(values.keys() - _IN_LINE.keys())
        if usual:  # else it is a row of something else than training
            others = [key for key in others if self._matters(key, values[key])]
        parts = [] if step is None else [f"step {int(step):,}"]
        parts += [_IN_LINE[key].format(values[key]) for key in usual]
        parts += [f"{key} {values[key]:.4g}" for key in others]
        if self.total and step is not None:
            parts.append(self._time_left(int(step) + 1))
        if parts:
            self.writeseq([one_line(", ".join(parts))])

    @staticmethod
    def _matters(key: str, value: float) -> bool:
        """Whether a value of a training step is shown beside the usual ones."""
        return (key.startswith("val_") and not key.endswith("_se")) or (key == "skipped_steps" and value > 0)

    def _time_left(self, done: int) -> str:
        seconds = (time.monotonic() - self.since) / max(done - self.done, 1) * max(self.total - done, 0)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{done / self.total:.0%}, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def _plain(value: Any) -> Any:
    """The value for strict JSON: integers stay integers, a number that is not finite becomes null."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


class JSONOutputFormat(PatientFile, KVWriter):
    """A line of strict JSON for each dump."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.add(json.dumps(_plain(dict(sorted(kvs.items()))), allow_nan=False) + "\n")

    def drop_rows(self, first_step: int) -> int:
        """Remove the rows of `first_step` and later, and incomplete rows. Returns how many."""
        lines = io.StringIO(self._read()).readlines()
        kept = [line for line in lines if line.endswith("\n") and _is_before(first_step, line)]
        if len(kept) < len(lines):
            files.write_bytes(self.path, "".join(kept).encode())
        return len(lines) - len(kept)


def _is_before(first_step: int, line: str) -> bool:
    try:
        return not _is_from(first_step, files.parse_json(line, "a row").get("step"))
    except (ValueError, AttributeError):  # damaged
        return False


def _is_from(first_step: int, step: Any) -> bool:
    """Whether a row's step, None or "" where it has none, is `first_step` or later."""
    try:
        return float(step) >= first_step
    except (TypeError, ValueError):
        return False


class CSVOutputFormat(PatientFile, KVWriter):
    """A row for each dump. Earlier rows of a resumed run are kept and get new columns when these appear."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.add({one_line(key): printable(value) if isinstance(value, str) else value for key, value in kvs.items()})

    def _store(self, entries: list[Any]) -> None:
        keys = self._header()
        new = sorted({key for row in entries for key in row} - set(keys))
        if new:
            rows = self._table()[1]
            self._rewrite(keys + new, rows + entries, durable=False)
        else:
            self._append(_csv_text(keys, entries))

    def _header(self) -> list[str]:
        """The columns that the file has now: it may have been moved away since the last row."""
        self._undo()
        try:
            with self.path.open(newline="", encoding="utf-8", errors="replace") as f:
                line = f.readline()
        except FileNotFoundError:
            return []
        return files.parse_csv(line, str(self.path))[0] if line.endswith("\n") else []

    def _table(self) -> tuple[list[str], list[dict[str, str]], bool]:
        """(columns, rows, whether an incomplete last line was left out)."""
        text = self._read()
        records = files.parse_csv(text, str(self.path))
        torn = bool(records) and not text.endswith("\n")
        if torn:
            records.pop()
        keys = records[0] if records else []
        return keys, [dict(zip(keys, record)) for record in records[1:]], torn

    def _rewrite(self, keys: list[str], rows: Iterable[Mapping[str, Any]], durable: bool = True) -> None:
        text = _csv_text(keys, [dict(zip(keys, keys)), *rows]) if keys else ""
        files.write_bytes(self.path, text.encode(errors="backslashreplace"), durable)

    def drop_rows(self, first_step: int) -> int:
        """Remove the rows of `first_step` and later, and an incomplete last line. Returns how many."""
        keys, rows, torn = self._table()
        kept = [row for row in rows if not _is_from(first_step, row.get("step"))]
        if torn or len(kept) < len(rows):
            self._rewrite(keys, kept)
        return len(rows) - len(kept) + torn


def _csv_text(keys: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys, restval="").writerows(rows)
    return text.getvalue()


class TensorBoardOutputFormat(KVWriter):
    """TensorBoard event files in the folder `dir`. A row without a `step` counts on from the one before.

    Raises UserError where the package tensorboard is missing.
    """

    def __init__(self, dir: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise files.UserError(
                'the log format "tensorboard" needs the package tensorboard: pip install it'
            ) from None
        self.writer = SummaryWriter(dir)
        self.step = 0

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.step = int(kvs.get("step", self.step + 1))
        for key, value in kvs.items():
            if hasattr(value, "__float__"):
                self.writer.add_scalar(key, float(value), self.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


FORMATS: dict[str, Callable[[str, str], Any]] = {
    "stdout": lambda folder, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda folder, suffix: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.json")),
    "csv": lambda folder, suffix: CSVOutputFormat(os.path.join(folder, f"progress{suffix}.csv")),
    "jsonl": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.jsonl")),
    "line": lambda folder, suffix: LineOutputFormat(sys.stdout),
    "tensorboard": lambda folder, suffix: TensorBoardOutputFormat(os.path.join(folder, f"tb{suffix}")),
}


def make_output_format(format: str, ev_dir: str, log_suffix: str = ""):
    """The output called `format`: one of FORMATS. Raises ValueError for another name."""
    if format not in FORMATS:
        raise ValueError(f"unknown log format {format!r}: choose from {', '.join(FORMATS)}")
    return FORMATS[format](ev_dir, log_suffix)
