"""Commands of this package in processes of their own, which outlive the one that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..utils import files

CONSOLE_FILE = "console.txt"
LONGEST_RECORD = 2**20  # bytes
POLL = 0.05  # seconds
LONGEST_TAIL = 2**16  # bytes


@dataclass(frozen=True)
class Process:
    """A running or ended process. :param started: when, as the system says; it tells a later one of the same pid."""

    pid: int
    started: str

    def is_running(self) -> bool:
        """Whether it runs still; one that has ended and was not waited for does not."""
        state, started = _state_of(self.pid)
        return started == self.started and state not in ("", "Z", "X")

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.is_running():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process, and those that it has started, at once."""
        if self.is_running():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads a session of its own
            self.wait(10)

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended. Returns whether it has."""
        until = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > until:
                return False
            time.sleep(POLL)
        return True


def launch(words: Sequence[str], output: str) -> Process:
    """Start a command of `improved-diffusion` in a session of its own; what it prints goes to the file `output`.

    No shell sees the words. Raises UserError where the file cannot be written.
    """
    files.require_plain(output)
    files.write_bytes(output, b"", durable=False)
    with open(output, "ab") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", __package__.partition(".")[0], *words],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
        )  # fmt: skip
    started = Process(process.pid, _state_of(process.pid)[1])
    # Whoever starts a process has to take note of its end, else it stays in the system's table.
    threading.Thread(target=process.wait, name=f"end of {process.pid}", daemon=True).start()
    return started


@dataclass(frozen=True)
class Record:
    """A process and the options that were given for it. The file in its folder finds it again later."""

    process: Process
    options: dict[str, Any]


def begin(words: Sequence[str], folder: str, name: str, options: Mapping[str, Any]) -> None:
    """`launch` a command, with its output in CONSOLE_FILE in the folder and its Record in the file `name` there.

    Options that are empty are left out of the record.
    """
    process = launch(words, os.path.join(folder, CONSOLE_FILE))
    record = Record(process, {name: value for name, value in options.items() if value not in ("", None)})
    try:
        files.write_bytes(os.path.join(folder, name), json.dumps(asdict(record), indent=1).encode())
    except UserError:
        process.kill()  # nobody would find it again
        raise


def read_record(folder: str, name: str) -> Record | None:
    """The record that `begin` has written; None where there is none, or a damaged one."""
    path = os.path.join(folder, name)
    try:
        files.require_plain(path)
        content = files.read_json(path, LONGEST_RECORD)
        process, options = content["process"], content["options"]
        if type(process["pid"]) is int and type(process["started"]) is str and isinstance(options, dict):
            return Record(Process(process["pid"], process["started"]), options)
    except (UserError, KeyError, TypeError):
        pass
    return None


def _state_of(pid: int) -> tuple[str, str]:
    """(the letter of a process's state, when it started); two empty texts where there is none."""
    if os.path.exists("/proc/self/stat"):
        try:
            text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
        except OSError:
            return "", ""
        fields = text.rpartition(")")[2].split()  # the name before may hold blanks
        return fields[0], f"{_boot()} {fields[19]}"
    found = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = found.stdout.strip().partition(" ")
    return state[:1], started.strip()


def _boot() -> str:
    """What is another after each start of the machine, from which the times in /proc count."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def tail(path: str, limit: int = LONGEST_TAIL) -> str:
    """The whole lines at the end of a text file that may be growing, at most `limit` bytes of them.

    "" where there is no plain file. The last line may be half written.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as f:  # neither a link nor a pipe
            size = f.seek(0, os.SEEK_END)
            f.seek(max(size - limit, 0))
            text = f.read(limit).decode(errors="replace")
    except OSError:
        return ""
    return text if size <= limit else text.partition("\n")[2]


def end_of(text: str) -> str:
    """The message with which a command ended in an error: its last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith("error: ")]
    return (found or lines or ["it ended without a message"])[-1].removeprefix("error: ")


def check_system() -> None:
    """Raise UserError where processes cannot be started in sessions of their own."""
    if not hasattr(os, "killpg"):
        raise UserError("training and evaluation from the page need Linux or macOS: use the commands")
