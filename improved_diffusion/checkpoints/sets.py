"""Checkpoint sets: the files of one step, written together, described by a manifest, verified, kept or removed.

A set is complete once its manifest, written last, exists: {"step": steps done, "files": {name: {"bytes": n, "sha256":
hex}}}. Other code writes no manifests: sets older than the first manifest of a folder need none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..config import UserError, comma_list
from ..utils import files
from . import checkpoint

CONFIG_FILE = "config.json"  # the options of the run, beside its checkpoints
FAILURES_ALLOWED = 2  # saves in a row that may fail before the run stops

MAX_WARNED = 5  # skipped checkpoints that each get a line

_PARTS = re.compile(r"(model|opt|ema_[^/\\]+_)(\d{6,15})\.pt")
_MANIFEST = re.compile(r"manifest(\d{6,15})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SNAPSHOT = "ema_sigma_rel"  # of a power-function average; all are needed to compute averages of other lengths


def manifest_name(step: int) -> str:
    """The file that describes the set of a step."""
    return f"manifest{step:06d}.json"


def step_of(path: str) -> int | None:
    """The step NNNNNN of a model, EMA or optimizer file, None for another name."""
    match = _PARTS.fullmatch(path.replace("\\", "/").rpartition("/")[2])
    return int(match.group(2)) if match else None


# Writing


def require_free(out: str, source: str) -> None:
    """Raise UserError where a file to write is the one that was read, or one of a run's checkpoints."""
    if files.same(source, out):
        raise UserError(f"--out {out} is the file to read: name another one")
    step, folder = step_of(out), files.folder_of(out)
    manifest = None if step is None else read_manifest(folder, step)
    if manifest and out.replace("\\", "/").rpartition("/")[2] in manifest["files"]:
        raise UserError(f"--out {out} belongs to the checkpoints of the run in {folder}: choose another --out")


def write_set(directory: str, step: int, done: int, parts: Iterable[tuple[str, Any]]) -> None:
    """Write a set and then its manifest, with one part at a time in memory. Raises UserError; old sets are unchanged.

    :param step: the number in the files' names.
    :param done: the training steps done.
    :param parts: (file name, what torch.save writes into it).
    """
    files.make_dirs(directory)
    table: dict[str, dict[str, Any]] = {}

    def contents() -> Iterator[tuple[str, memoryview]]:
        for name, part in parts:
            data = checkpoint.to_bytes(part)
            table[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            yield files.join(directory, name), data

    files.write_together(contents())
    manifest = {"step": done, "files": table}
    files.write_bytes(files.join(directory, manifest_name(step)), json.dumps(manifest, indent=1).encode())


def _manifest_steps(names: Iterable[str]) -> list[int]:
    return sorted(int(match.group(1)) for match in map(_MANIFEST.fullmatch, names) if match)


def prune(directory: str, newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Remove the sets up to step `newest`, except the last `keep_last` and those at multiples of `keep_every`.

    Returns the removed steps. Snapshots of power-function averages stay. A `keep_last` of 0 keeps all. Sets without a
    manifest are never removed.
    """
    if not keep_last:
        return []
    steps = [step for step in _manifest_steps(files.list_dir(directory)) if step <= newest]
    removed = [step for step in steps[:-keep_last] if not (keep_every and step % keep_every == 0)]
    for step in removed:
        manifest = read_manifest(directory, step) or {"files": {}}
        for name in manifest["files"]:
            if step_of(name) == step and "/" not in name and not name.startswith(_SNAPSHOT):
                files.remove(files.join(directory, name))
        # Last, so that after an interruption the next call finds what is left; until then the set is incomplete.
        files.remove(files.join(directory, manifest_name(step)))
    return removed


def rename_newer(directory: str, step: int) -> list[str]:
    """Rename the sets after a step to *.newer, for a run that resumes at it: --resume auto must not find them later.

    Later snapshots of power-function averages are renamed too. Returns the names of the manifests.
    """
    names = files.list_dir(directory) if files.is_dir(directory) else []
    later = [number for number in _manifest_steps(names) if number > step]
    found = [name for name in names if name.startswith(_SNAPSHOT) and (step_of(name) or 0) > step]
    for number in later:
        manifest = read_manifest(directory, number) or {"files": {}}
        found += [name for name in manifest["files"] if step_of(name) == number and name in names]
    # The manifests first: without them the sets are incomplete.
    for name in dict.fromkeys([*map(manifest_name, later), *found]):
        files.rename(files.join(directory, name), files.join(directory, f"{name}.newer"))
    return [manifest_name(number) for number in later]


class SetWriter:
    """Writes sets in the background, one at a time: training waits only for the copy to host memory.

    `collect` warns of a failed save, and raises UserError after more than FAILURES_ALLOWED failures in a row.
    """

    def __init__(
        self,
        directory: str,
        log: Callable[[str], None],
        warn: Callable[[str], None],
        keep_last: int = 0,
        keep_every: int = 0,
    ):
        self.directory, self.log, self.warn = directory, log, warn
        self.keep_last, self.keep_every = keep_last, keep_every
        self.prepare: Callable[[], str] = lambda: ""  # called before each save; returns a warning, or ""
        self.start = 0  # steps done before this run
        self.saved: list[tuple[int, str]] = []  # (steps done, model file) of the two newest sets
        self.failures = 0
        self.beside: dict[str, Any] = {}  # file name -> content, written before the next set
        self.taken: dict[str, Any] = {}  # the ones being written now
        self.own: set[str] = set()  # the ones that this run has written before
        self.partial: set[str] = set()  # the files of sets that could not be completed
        self.abandoned = False
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.remarks: dict[str, None] = {}  # problems that did not prevent the save

    @property
    def last_saved(self) -> str | None:
        """The model file of the newest set."""
        return self.saved[-1][1] if self.saved else None

    def last_before(self, steps: int) -> str | None:
        """The model file of the newest set with fewer steps done; older sets than the last two do not count."""
        return next((path for done, path in reversed(self.saved) if done < steps), None)

    def submit(self, step: int, done: int, parts: Sequence[tuple[str, Any]]) -> None:
        """Start to write a set, after the previous one is written."""
        self.wait()
        # Taken at once, so that `write_beside` may add newer files meanwhile; unwritten files are put back.
        self.taken, self.beside = self.beside, {}
        self.abandoned = False

        def run() -> None:
            self.failure = None
            self.remarks.clear()
            try:
                self._write(step, done, parts)
            except BaseException as error:  # raised by the main thread
                self.failure = error

        self.thread = threading.Thread(target=run, name="checkpoint writer", daemon=True)
        self.thread.start()

    def write_beside(self, name: str, part: Any) -> None:
        """Write another file before the next set: the set is complete only if the file is written."""
        self.beside[name] = part

    def _write(self, step: int, done: int, parts: Sequence[tuple[str, Any]]) -> None:
        self._remark(self.prepare())
        files.make_dirs(self.directory)
        for name, part in self.taken.items():
            if name not in self.own:
                self._keep_newer(files.join(self.directory, name))
            checkpoint.save(part, files.join(self.directory, name))
            self.own.add(name)
        # The newest set's weights are proven by the steps after it: until then the set before it stays.
        self._prune(step, self.keep_last)
        mine = {name for name, _ in parts}
        self.partial.update(name for name in mine if not files.exists(files.join(self.directory, name)))
        write_set(self.directory, step, done, self._unless_abandoned(parts))
        self.partial -= mine
        path = files.join(self.directory, checkpoint.model_name(step))
        self.saved = [*(entry for entry in self.saved[-1:] if entry[1] != path), (done, path)]
        self._prune(step, max(self.keep_last, 2))
        self._remove_partial()

    def _keep_newer(self, path: str) -> None:
        """Keep as *.newer a file that is not from before this run's start, as `rename_newer` keeps the sets."""
        if files.exists(path) and (step := checkpoint.described_step(path)) not in range(self.start + 1):
            newer = f"{path}.newer"
            kept = files.unused(newer) if files.exists(newer) else newer
            files.rename(path, kept)
            after = "unknown" if step is None else step
            self._remark(f"{path} was there (step {after}), not from before this run's start: it is kept as {kept}")

    def _unless_abandoned(self, parts: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for part in parts:
            if self.abandoned:
                raise UserError("the save was abandoned")
            yield part

    def _prune(self, newest: int, keep_last: int) -> None:
        if not self.keep_last:
            return
        try:
            prune(self.directory, newest, keep_last, self.keep_every)
        except UserError as error:
            self._remark(f"old checkpoints were not removed: {error}")

    def _remove_partial(self) -> None:
        """Remove what failed saves have left, unless a set of the same step is there."""
        try:
            for name in sorted(self.partial):
                if not files.exists(files.join(self.directory, manifest_name(step_of(name) or 0))):
                    files.remove(files.join(self.directory, name))
            self.partial.clear()
        except UserError as error:
            self._remark(f"files of a failed save were not removed: {error}")

    def _remark(self, text: str) -> None:
        if text:
            self.remarks[text] = None

    def collect(self) -> None:
        """Report the saves that have ended since the last call.

        Raises UserError after too many failures in a row.
        """
        if self.thread is None or self.thread.is_alive():
            return
        failure = self._result()
        if failure and self.has_given_up:
            raise UserError(f"{self.failures} saves in a row have failed: {failure}")
        if failure:
            self.warn(f"saving failed and will be retried at the next interval: {failure}")

    def wait(self) -> None:
        """Wait for the save in progress, then `collect`."""
        if self.thread is not None:
            self.thread.join()
        self.collect()

    @property
    def has_given_up(self) -> bool:
        """Whether too many saves in a row have failed."""
        return self.failures > FAILURES_ALLOWED

    def finish(self, prune: bool = True) -> None:
        """Wait for the last save. Raises UserError if it failed.

        :param prune: the run has ended well: only the sets to keep are left.
        """
        if self.thread is not None and (failure := self._result()):
            raise UserError(failure)
        if prune and self.saved and (step := step_of(self.saved[-1][1])) is not None:
            self._prune(step, self.keep_last)
            self._warn_of_remarks()

    def close(self) -> None:
        """Give up the save in progress, if there is one: after this nothing writes into the folder."""
        self.abandoned = True
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _result(self) -> str | None:
        """Wait for the save in progress. Returns why it failed, or None."""
        assert self.thread is not None
        self.thread.join()
        self.thread = None
        if isinstance(self.failure, UserError):
            self.failures += 1
            self.beside = {**self.taken, **self.beside}
            return f"{self.failure}; last good checkpoint: {self.last_saved or 'none'}"
        if self.failure is not None:
            raise self.failure
        self.failures = 0
        self.log(f"saved {self.last_saved}")
        self._warn_of_remarks()
        return None

    def _warn_of_remarks(self) -> None:
        for text in self.remarks:
            self.warn(text)
        self.remarks.clear()


# Finding


def read_manifest(directory: str, step: int) -> dict[str, Any] | None:
    """The manifest of a step; None if it is missing or damaged, such as one that lists files of another step."""
    try:
        content = files.read_json(files.join(directory, manifest_name(step)))
    except UserError:
        return None
    if not isinstance(content, dict) or not _is_count(content.get("step")):
        return None
    table = content.get("files")
    return content if isinstance(table, dict) and all(_is_entry(step, *item) for item in table.items()) else None


def _is_entry(step: int, name: str, entry: Any) -> bool:
    """Whether a manifest may list this: a plain file name of the step's set, its size and its checksum."""
    return (
        _PARTS.fullmatch(name) is not None
        and step_of(name) == step
        and isinstance(entry, dict)
        and _is_count(entry.get("bytes"))
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def complete_sets(directory: str, labels: Iterable[str]) -> list[int]:
    """The steps, in ascending order, whose model, given moving averages and optimizer are in the folder.

    From the first manifest on, each set needs one: a set without it is incomplete.
    """
    return [step for step, missing in _missing_parts(directory, labels) if not missing]


def _missing_parts(directory: str, labels: Iterable[str]) -> list[tuple[int, list[str]]]:
    """Each step with a model or a manifest, in ascending order, and the names of the files that its set lacks."""
    if not files.is_dir(directory):
        return []
    names, wanted = set(files.list_dir(directory)), list(labels)
    described = _manifest_steps(names)
    first = min(described, default=math.inf)

    def required(step: int) -> list[str]:
        averages = [checkpoint.ema_name(label, step) for label in wanted]
        parts = [checkpoint.model_name(step), *averages, checkpoint.optimizer_name(step)]
        return [*parts, manifest_name(step)] if step >= first else parts

    steps = sorted({*checkpoint.model_steps(directory), *described})
    return [(step, [name for name in required(step) if name not in names]) for step in steps]


def problem_of(directory: str, step: int) -> str | None:
    """What is wrong with the files of a set, by its manifest; None if nothing is, or if there is no manifest."""
    manifest = read_manifest(directory, step)
    if manifest is None:
        name = manifest_name(step)
        is_there = files.is_dir(directory) and name in files.list_dir(directory)
        return f"{files.join(directory, name)} is damaged" if is_there else None
    problems = (_problem_of_file(files.join(directory, name), entry) for name, entry in manifest["files"].items())
    return next((problem for problem in problems if problem), None)


def _problem_of_file(path: str, entry: Mapping[str, Any]) -> str | None:
    if not files.exists(path):
        return f"{path} is missing"
    try:
        size = files.size(path)
        if size != entry["bytes"]:
            return f"{path} has {size} bytes, not the {entry['bytes']} that were written"
        if files.sha256(path) != entry["sha256"]:
            return f"{path} has changed since it was written (its checksum differs)"
    except UserError as error:
        return str(error)
    return None


def newest_whole_set(directory: str, labels: Sequence[str], warn: Callable[[str], None]) -> int | None:
    """The step of the newest set with unchanged files. Warns of each newer set that is damaged or incomplete."""
    skipped, found = [], None
    for step, missing in reversed(_missing_parts(directory, labels)):
        if missing:
            gaps = ", ".join(f"{files.join(directory, name)} is missing" for name in missing)
            skipped.append(f"the incomplete checkpoint of step {step}: {gaps}")
        elif problem := problem_of(directory, step):
            skipped.append(f"the damaged checkpoint of step {step}: {problem}")
        else:
            found = step
            break
    for text in skipped[:MAX_WARNED]:
        warn(f"skipped {text}")
    if len(skipped) > MAX_WARNED:
        warn(f"skipped {len(skipped) - MAX_WARNED} more checkpoints before those, damaged or incomplete")
    return found


def average_labels(directory: str, step: int) -> list[str]:
    """The labels of the moving averages of a step, in the order of the run's options."""
    pattern = re.compile(rf"ema_(.+)_{step:06d}\.pt")
    found = [match.group(1) for match in map(pattern.fullmatch, files.list_dir(directory)) if match]
    order = labels_of_run(directory)
    return sorted(found, key=lambda label: (order.index(label) if label in order else len(order), label))


def labels_of_run(directory: str) -> list[str]:
    """The labels of the moving averages of the run that wrote a folder, by its config.json; none where it has none.

    Raises UserError for a damaged config.json.
    """
    path = files.join(directory, CONFIG_FILE)
    if not files.exists(path):
        return []
    try:
        config = files.read_json(path)["config"]
        return ema_labels(config["ema_rate"], config.get("ema_sigma_rel", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f": {error}" if isinstance(error, UserError) else ""
        raise UserError(f"{path} is damaged{reason}: remove it, or name a checkpoint's file") from None


def ema_labels(rates: str, widths: str) -> list[str]:
    """The labels of the averages of --ema_rate and --ema_sigma_rel."""
    return [*map(str, comma_list(rates, float)), *(f"sigma_rel{width}" for width in comma_list(widths, float))]
