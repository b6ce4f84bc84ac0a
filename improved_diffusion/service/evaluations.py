"""Evaluations that are started, watched and cancelled from outside: each is a process of its own; and their reports."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image

from ..config import UserError, unknown_name
from ..config.settings import Scoring, path_options
from ..evaluation.comparison import comparison
from ..evaluation.report import DISTANCES_FILE, GRID_FILE, JSON_FILE, NEIGHBOURS_FILE, Report
from ..sampling.writer import PNG_DIR, REQUEST_FILE
from ..utils import files
from .commands import CONSOLE_FILE, begin, check_system, end_of, read_record, tail
from .folders import MOST_LISTED, DataRoot, Root
from .run_files import read_picture

EVALUATION_FILE = "evaluation.json"
MOST_COMPARED = 6  # reports side by side
PICTURES = {
    GRID_FILE: "samples", NEIGHBOURS_FILE: "nearest training images",
    DISTANCES_FILE: "distances to the training images",
}  # fmt: skip

# The paths that an evaluation may be given from outside, as names below the roots; no other option that is a path.
OF_DATA, OF_RUNS = ("reference", "held_out", "train_dir"), ("samples", "model_path")
_OWN = {"features", "logits", "trust_features"}  # the operator's
_GROUPS = ("evaluation", "features", "reading", "sample", "sampler")  # models describe their networks themselves
_FURTHER = ("guidance_scale", "guidance_interval", "guidance_rescale", "seed")
_NAMES = (*(f.name for group in _GROUPS for f in fields(Scoring.groups()[group])), *_FURTHER)
OFFERED = {
    name: Scoring.options()[name]
    for name in dict.fromkeys(_NAMES)
    if name not in _OWN and (name not in path_options() or name in OF_DATA + OF_RUNS)
}


@dataclass(frozen=True)
class Progress:
    """How an evaluation is doing. :param state: running, finished or failed. :param text: its last line."""

    state: str
    text: str


@dataclass
class Evaluations:
    """The evaluations below a folder of runs.

    :param data: the folder below which the real images are.
    :param features: the feature network: a file, or `inception`. :param trust_features: whether a file may run.
    :param most: evaluations at a time.
    """

    runs: str | os.PathLike
    data: str | os.PathLike
    features: str = ""
    trust_features: bool = False
    most: int = 1
    _starting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        check_system()
        files.make_dirs(os.path.expanduser(self.runs))
        self.root, self.data_root = Root(self.runs), DataRoot(self.data)

    # What there is

    def samples(self) -> list[str]:
        """The names of the folders with samples."""
        return self._folders_with(REQUEST_FILE, PNG_DIR)

    def models(self) -> list[str]:
        """The names of the runs with checkpoints."""
        return self._folders_with("config.json", "log.txt")

    def reports(self) -> list[str]:
        """The names of the folders with a report."""
        return self._folders_with(JSON_FILE)

    def _folders_with(self, *wanted: str) -> list[str]:
        found = [
            self.root.name_of(folder)
            for folder, entries in self.root.walk(depth=2)
            if folder != self.root.path and {*wanted} <= {entry.name for entry in entries}
        ]
        return sorted(found)[:MOST_LISTED]

    def report(self, name: str) -> Report:
        """A report. Raises UserError where there is none of that name, or a damaged one."""
        return Report.read(self._report_folder(name))

    def pictures(self, name: str) -> list[tuple[Image.Image, str]]:
        """(picture, what it shows) of a report."""
        folder = self._report_folder(name)
        found = ((read_picture(os.path.join(folder, file)), text) for file, text in PICTURES.items())
        return [(picture, text) for picture, text in found if picture is not None]

    def compare(self, names: Sequence[str]) -> str:
        """Several reports side by side, as Markdown; the best values bold."""
        if len(names) > MOST_COMPARED:
            raise UserError(f"{len(names)} reports: choose at most {MOST_COMPARED}")
        folders = [self._report_folder(name) for name in names]
        reports = [Report.read(folder) for folder in folders]
        return comparison(reports, names, mark_best=True)

    def _report_folder(self, name: str) -> str:
        folder = self.root.path_of(name, "the report")
        if not os.path.isdir(folder) or os.path.islink(os.path.join(folder, JSON_FILE)):
            raise unknown_name("report", name, self.reports())
        return folder

    # What can be done

    def check(self, options: Mapping[str, Any]) -> list[str]:
        """The words of the command that evaluates with these options, without --out_dir.

        :param options: of Scoring; paths are names below the roots.
        Raises UserError for what cannot work as far as the options tell, and for options that are not OFFERED.
        """
        given = {name: value for name, value in options.items() if value not in ("", None)}
        for name in given.keys() - OFFERED.keys():
            if name in Scoring.options():
                raise UserError(f"--{name} cannot be given here: use the command")
            raise unknown_name("option", name, OFFERED)
        if not self.features:
            raise UserError(
                "there is no feature network: start this program with --features FILE, or --features inception"
            )
        if ("samples" in given) == ("model_path" in given):
            raise UserError("--samples, to evaluate those, or --model_path, to draw them first: choose one of the two")
        if "reference" not in given:
            raise UserError("--reference is missing: choose a folder of real images, a .zip or an .npz")
        for names, root in ((OF_DATA, self.data_root), (OF_RUNS, self.root)):
            given |= {name: root.path_of(str(given[name]), f"--{name}") for name in names if name in given}
        if "samples" in given and "resize" not in given:
            given |= _size_of(given["samples"])
        Scoring.of(given)
        trust = ["--trust_features=True"] if self.trust_features else []
        return ["evaluate", f"--features={self.features}", *trust, *(f"--{k}={v}" for k, v in given.items())]

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        """Start an evaluation; its report will be in a new folder of this name, or in that of one that has failed."""
        words = self.check(options)
        with self._starting:
            running = self.running()
            if len(running) >= self.most:
                raise UserError(f"{', '.join(running)} is being evaluated: cancel it first, or wait for its end")
            if name in self.started() and self.progress(name).state == "failed":
                shutil.rmtree(self._folder(name))
            folder = self.root.new_folder(name)
            files.make_dirs(folder)
            begin([*words, f"--out_dir={folder}"], folder, EVALUATION_FILE, options)

    def started(self) -> list[str]:
        """The names of the evaluations that were started here, the last one first."""
        found = []
        with suppress(OSError), os.scandir(self.root.path) as entries:
            for entry in entries:
                path = os.path.join(entry.path, EVALUATION_FILE)
                if entry.is_dir(follow_symlinks=False) and os.path.isfile(path):
                    found.append((-os.stat(path).st_mtime, entry.name))
        return [name for _, name in sorted(found)]

    def running(self) -> list[str]:
        """The names of those that go on."""
        return [name for name in self.started() if self.progress(name).state == "running"]

    def progress(self, name: str) -> Progress:
        """How an evaluation is doing."""
        folder = self._folder(name)
        record, text = read_record(folder, EVALUATION_FILE), tail(os.path.join(folder, CONSOLE_FILE))
        if record and record.process.is_running():
            lines = [line for line in text.splitlines() if line.strip()]
            return Progress("running", lines[-1] if lines else "starting")
        if os.path.exists(os.path.join(folder, JSON_FILE)):
            return Progress("finished", "")
        return Progress("failed", end_of(text))

    def cancel(self, name: str) -> None:
        """End an evaluation at once, and remove its folder."""
        folder = self._folder(name)
        record = read_record(folder, EVALUATION_FILE)
        if record is None or not record.process.is_running():
            raise UserError(f"{name} is not running")
        record.process.kill()
        if not os.path.exists(os.path.join(folder, JSON_FILE)):
            shutil.rmtree(folder)

    def _folder(self, name: str) -> str:
        if name not in self.started():
            raise unknown_name("evaluation", name, self.started())
        return os.path.join(self.root.path, name)


def _size_of(samples: str) -> dict[str, Any]:
    """--resize for real images, as large as samples of ours are; {} where nothing beside the samples says so."""
    try:
        request = files.read_record(os.path.join(samples, REQUEST_FILE), "")
    except UserError:
        return {}
    return {"resize": request["image_size"]} if "image_size" in request else {}
