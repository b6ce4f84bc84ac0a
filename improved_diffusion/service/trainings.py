"""Training runs that are started, watched, stopped and resumed from outside: each is a process of its own.

A run is a folder below a root. What its process is stands in a file there, so that whoever looks later finds it again.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import UserError, shown, unknown_name
from ..config.presets import options_for, until_chosen
from ..config.settings import ImageTraining, merge_options, path_options
from ..data.listing import is_run
from ..logs.run_folder import LOCK
from ..utils import files
from .commands import CONSOLE_FILE, Process, begin, check_system, end_of, launch, read_record, tail
from .folders import DataRoot, Root
from .run_files import Rows, how_it_ended, newest_previews, newest_text, read_settings

PROCESS_FILE = "process.json"
DRY_RUN_SECONDS = 600.0
STOP_SECONDS = 120.0
KEPT_ROWS = 32  # runs whose rows are in memory

# The paths that a run may be given from outside, each as a name below a root; no other option that is a path.
OF_DATA, OF_RUNS = ("data_dir", "val_dir", "labels"), ("init_checkpoint",)
_STEPPED = re.compile(r"^(step \d|training: )", re.MULTILINE)
LABELS = ("prefix", "folder")  # the values of `labels` that are no paths
_OWN = {"out_dir", "resume", "resume_checkpoint", "dry_run"}  # what Trainings itself sets
_OPERATORS = {"trackers"}  # sends the run's values out, with the login of whoever started the page
OFFERED = {
    name: f
    for name, f in ImageTraining.options().items()
    if name not in _OWN | _OPERATORS and (name not in path_options() or name in OF_DATA + OF_RUNS)
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run is doing.

    :param state: starting, running, stopping, stopped, finished or failed.
    :param reason: how it ended, where it stopped or failed.
    :param step: the step of the newest row of its log. :param steps: in all; 0: without end, or not known yet.
    :param outside: another program has started it, which alone can stop it.
    """

    name: str
    state: str
    reason: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    peak_gib: float | None = None  # of memory, of a rank's process or GPU
    outside: bool = False

    @property
    def is_running(self) -> bool:
        return self.state in ("starting", "running", "stopping")


@dataclass
class Trainings:
    """The training runs below a folder.

    :param runs: the folder, which is made.
    :param data: the folder below which the training images are.
    :param most: runs at a time, of those started here.
    """

    runs: str | os.PathLike
    data: str | os.PathLike
    most: int = 1
    _rows: dict[str, Rows] = field(default_factory=dict, repr=False)
    _stopping: dict[str, Process] = field(default_factory=dict, repr=False)
    _starting: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        check_system()
        files.make_dirs(os.path.expanduser(self.runs))
        self.root, self.data_root = Root(self.runs), DataRoot(self.data)

    # What there is

    def names(self) -> list[str]:
        """The runs' names, the one that was written last first."""
        found = []
        with suppress(OSError), os.scandir(self.root.path) as entries:
            for entry in entries:
                with suppress(OSError):
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) and _is_run(entry.path):
                        found.append((-entry.stat().st_mtime, entry.name))
        return [name for _, name in sorted(found)]

    def folder(self, name: str) -> str:
        """The folder of a run. Raises UserError where there is no run of that name."""
        path = os.path.join(self.root.path, name)
        plain = name == os.path.basename(name) and not name.startswith(".") and not os.path.islink(path)
        if not (name and plain and os.path.isdir(path) and _is_run(path)):
            raise unknown_name("run", name, self.names()) if self.names() else UserError("there are no runs yet")
        return path

    def status(self, name: str) -> Status:
        """How a run is doing."""
        folder = self.folder(name)
        record = read_record(folder, PROCESS_FILE)
        with self._reading:
            rows = self._rows_of(folder)
            last = dict(rows.last)
        settings = read_settings(folder) or (record.options if record else {})
        steps = next(filter(None, (_count(settings.get(key)) for key in ("max_steps", "lr_anneal_steps"))), 0)
        status = _numbers(Status(name=name, state="running", steps=steps), last)
        if record and record.process.is_running():
            if self._stopping.get(name) == record.process:
                return replace(status, state="stopping")
            # The rows may be from before a resumption: what this start has printed tells.
            return replace(status, state="running" if _STEPPED.search(tail(_console(folder))) else "starting")
        if _is_locked(folder):
            return replace(status, outside=True)
        state, reason = how_it_ended(newest_text(folder, CONSOLE_FILE))
        return replace(status, state=state, reason=reason, seconds_left=None)

    def curve(self, name: str, column: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column of the log."""
        folder = self.folder(name)
        with self._reading:
            return self._rows_of(folder).curve(column)

    def columns(self, name: str) -> list[str]:
        """The names of the columns that have a curve."""
        folder = self.folder(name)
        with self._reading:
            return sorted(self._rows_of(folder).columns)

    def previews(self, name: str, count: int = 4) -> list[str]:
        """The names of the newest previews, see run_files.newest_previews."""
        return newest_previews(self.folder(name), count)

    def log(self, name: str, limit: int = 2**13) -> str:
        """The last lines that the run has printed."""
        folder = self.folder(name)
        return tail(_console(folder), limit) or tail(os.path.join(folder, "log.txt"), limit)

    def running(self) -> list[str]:
        """The names of the runs that were started here and go on."""
        records = ((name, read_record(os.path.join(self.root.path, name), PROCESS_FILE)) for name in self.names())
        return [name for name, record in records if record and record.process.is_running()]

    def _rows_of(self, folder: str) -> Rows:
        rows = self._rows.pop(folder, None) or Rows(folder)
        self._rows[folder] = rows  # the last one is the one used last
        while len(self._rows) > KEPT_ROWS:
            del self._rows[next(iter(self._rows))]
        rows.read()
        return rows

    # What can be done

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """The words of the command that trains with these options, without --out_dir.

        :param options: of ImageTraining, and `preset`; `data_dir`, `val_dir`, a file as `labels` and `init_checkpoint`
            are names below the roots.
        Raises UserError for what cannot work as far as the options tell, and for options that are not OFFERED.
        """
        given = {name: value for name, value in options.items() if value not in ("", None)}
        preset = str(given.pop("preset", ""))
        for name in given.keys() - OFFERED.keys():
            if name in ImageTraining.options():
                raise UserError(f"--{name} cannot be given here: use the command")
            raise unknown_name("option", name, OFFERED)
        if "data_dir" not in given:
            raise UserError("--data_dir is missing: choose a folder of images, a .zip or an .npz")
        given |= self._paths(given)
        values = merge_options([options_for(preset, ImageTraining) if preset else {}, given])
        ImageTraining.of(merge_options([until_chosen(preset), values]))
        return ["train", *([f"--preset={preset}"] if preset else []), *(f"--{k}={v}" for k, v in given.items())]

    def _paths(self, given: Mapping[str, Any]) -> dict[str, str]:
        """The paths of the options that are names below the roots."""
        found = {}
        for names, root in ((OF_DATA, self.data_root), (OF_RUNS, self.root)):
            for name in names:
                if name in given and not (name == "labels" and given[name] in LABELS):
                    found[name] = root.path_of(str(given[name]), f"--{name}")
        return found

    def dry_run(self, options: Mapping[str, Any]) -> str:
        """What a run with these options will need, as `--dry_run` says: a table, and warnings.

        Raises UserError for what cannot work.
        """
        words = self.check(options)
        with self._preparing():
            self._require_free_place()
            return self._dry_run(words)

    def start(self, name: str, options: Mapping[str, Any]) -> str:
        """Start a run after a dry run, whose table is returned.

        Raises UserError for what cannot work, and for a name that a run has already.
        """
        words = self.check(options)
        self.root.new_folder(name)
        with self._preparing():
            self._require_free_place()
            table = self._dry_run(words)
            folder = self.root.new_folder(name)  # another program may have taken the name in the meantime
            files.make_dirs(folder)
            self._launch(folder, words, options)
        return table

    def resume(self, name: str, max_steps: int = 0) -> None:
        """Continue a run from its newest checkpoint, or from the start where there is none.

        :param max_steps: another end; 0: the same.
        """
        status, folder = self.status(name), self.folder(name)
        if status.is_running:
            raise UserError(f"{name} is running")
        record = read_record(folder, PROCESS_FILE)
        options = dict(record.options if record else self._options_of(folder, name))
        if max_steps:
            options["max_steps"] = max_steps
        words = self.check(options)
        with self._preparing():
            self._require_free_place()
            self._launch(folder, words, options)

    def stop(self, name: str, seconds: float = STOP_SECONDS) -> Status:
        """Have a run save a checkpoint and end. Returns its status once it has, or after so many seconds."""
        folder = self.folder(name)
        record = read_record(folder, PROCESS_FILE)
        if record is None or not record.process.is_running():
            if _is_locked(folder):
                raise UserError(f"{name} was started by another program: stop it there, with Ctrl-C or SIGTERM")
            raise UserError(f"{name} is not running")
        if self._stopping.get(name) != record.process:  # a second signal changes nothing
            self._stopping[name] = record.process
            record.process.send(signal.SIGTERM)
        record.process.wait(seconds)
        return self.status(name)

    def _launch(self, folder: str, words: list[str], options: Mapping[str, Any]) -> None:
        if _is_locked(folder):
            raise UserError(f"{os.path.basename(folder)} is being written by another program")
        # Always with --resume auto: the same command starts a run and continues it.
        begin([*words, f"--out_dir={folder}", "--resume=auto"], folder, PROCESS_FILE, options)

    def _dry_run(self, words: list[str]) -> str:
        folder = os.path.join(self.root.path, f".dry_run_{os.getpid()}")  # is not made, but its disk is looked at
        with tempfile.TemporaryDirectory() as place:
            console = os.path.join(place, CONSOLE_FILE)
            process = launch([*words, f"--out_dir={folder}", "--dry_run=True"], console)
            ended = process.wait(DRY_RUN_SECONDS)
            process.kill()
            text = tail(console).replace(folder, self.root.path)
        if not ended:
            raise UserError(f"the dry run took more than {DRY_RUN_SECONDS:.0f} seconds: choose a smaller network")
        table = text.partition("\ndry run:\n")[2]
        if not table:
            raise UserError(end_of(text))
        warnings = [line for line in text.splitlines() if line.startswith(("warning: ", "preset auto: "))]
        return "\n".join([*(line[2:] for line in table.splitlines() if line.startswith("  ")), *warnings])

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """One run is prepared at a time: two would measure each other."""
        if not self._starting.acquire(blocking=False):
            raise UserError("another run is being prepared: try again in a minute")
        try:
            yield
        finally:
            self._starting.release()

    def _require_free_place(self) -> None:
        running = self.running()
        if len(running) >= self.most:
            raise UserError(f"{', '.join(running)} is running: stop it first, or wait for its end")

    def _options_of(self, folder: str, name: str) -> dict[str, Any]:
        """The options to resume a run that was started elsewhere: those that are not given come from its checkpoint."""
        config = read_settings(folder)
        if "num_channels" not in config or "large_size" in config or "classifier_width" in config:
            raise UserError(f"{name} is not a run of an image model that can be resumed here: use its command")
        data_dir = str(config.get("data_dir", ""))
        if files.is_url(data_dir) or not data_dir or not self.data_root.holds(data_dir):
            raise UserError(f"{name} was trained on {shown(data_dir)}, which is not below the folder of the data here")
        return {"data_dir": self.data_root.name_of(data_dir)}


def _is_run(folder: str) -> bool:
    names = os.listdir(folder)
    return PROCESS_FILE in names or (is_run(names) and "config.json" in names)


def _console(folder: str) -> str:
    return os.path.join(folder, CONSOLE_FILE)


def _is_locked(folder: str) -> bool:
    """Whether a run, of any program on this machine, is writing into the folder."""
    import fcntl

    try:
        with open(os.path.join(folder, LOCK), "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _count(value: Any) -> int:
    """A positive number of steps, however it was given; 0 for anything else."""
    with suppress(ValueError, TypeError, OverflowError):
        return max(int(float(value)), 0)
    return 0


def _numbers(status: Status, row: Mapping[str, float]) -> Status:
    """The status with what the newest row of the log says."""
    if not row:
        return status
    step, speed = int(row["step"]), row.get("images_per_second")
    batch = row["samples"] / (step + 1) if "samples" in row else 0  # images a step
    left = (status.steps - step - 1) * batch / speed if status.steps and batch and speed else None
    return replace(
        status, step=step, loss=row.get("loss"), images_per_second=speed, peak_gib=row.get("peak_gib"),
        seconds_left=left and max(left, 0.0),
    )  # fmt: skip
