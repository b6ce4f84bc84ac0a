"""The models that may be used, by name: a request never holds a path."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoints import checkpoint, sets
from ..checkpoints.loading import find_file, kind_of
from ..config import KINDS, NUM_CLASSES, ReadingConfig, UserError, height_width, unknown_name
from ..utils import files

RESCAN_SECONDS = 2.0
DEEPEST = 6  # folders below the root
_CHECKPOINT = re.compile(r"(model|ema_.+_)\d{6,15}\.pt")


@dataclass(frozen=True)
class ModelInfo:
    """What a model is.

    :param kind: image or super_res.
    :param size: (height, width) of its images; `small_size`: of those that a super_res model enlarges.
    :param class_names: by label; () where the classes have no names. `num_classes` is 0 without classes.
    :param averages: the names that a request's `average` may have; () for a single file.
    :param resize_mode, background: how it takes given images.
    :param own_steps: those that a distilled model is for; 0 for a model that is not distilled.
    :param hides_classes: whether it was trained with its class hidden now and then, which guidance_scale needs.
    """

    name: str
    title: str
    kind: str
    size: tuple[int, int]
    channels: int
    class_names: tuple[str, ...]
    num_classes: int
    step: int | None
    averages: tuple[str, ...]
    small_size: tuple[int, int] | None
    diffusion_steps: int
    hides_classes: bool
    resize_mode: str = ReadingConfig.resize_mode
    background: str = ReadingConfig.background
    own_steps: int = 0

    @property
    def class_cond(self) -> bool:
        """Whether the model has classes."""
        return self.num_classes > 0


@dataclass
class _Upload:
    path: str
    title: str
    used: float


class Catalogue:
    """Models below a folder of runs, and those given one by one. For several threads.

    :param runs: a run's name is its path below this folder. Links to folders are not followed.
    :param model_paths: files, named by their stems, and folders of runs.
    Raises UserError for a folder or a file that is not there.
    """

    def __init__(self, runs: str = "", model_paths: Sequence[str] = ()):
        self.runs = runs
        if runs and not os.path.isdir(runs):
            raise UserError(f"--runs {runs} is not a folder")
        for path in model_paths:
            find_file(path)
        self._given = _named((_stem(path), path) for path in model_paths)
        self._lock = threading.RLock()
        self._scanned: tuple[float, dict[str, str]] | None = None
        self._files: dict[tuple[str, str], tuple[object, str]] = {}
        self._described: dict[tuple[str, str], tuple[object, ModelInfo]] = {}
        self._uploads: dict[str, _Upload] = {}

    def names(self) -> list[str]:
        """The names of all models but uploads, which are known to those who uploaded them."""
        return list(self._known())

    def path(self, name: str) -> str:
        """The file or folder of a model. Raises UserError, with the nearest names, for an unknown one."""
        with self._lock:
            if upload := self._uploads.get(name):
                upload.used = time.monotonic()
                return upload.path
        known = self._known()
        if name not in known:
            raise unknown_name("model", str(name), known, "" if known else "there is none yet")
        return known[name]

    def file(self, name: str, average: str = "") -> str:
        """The checkpoint's file: of a run, the newest one of an average, "" for the first.

        Raises UserError where there is none, and where it is a link that leaves the folder of runs.
        """
        path = self.path(name)
        state = _state(path)
        with self._lock:
            known = self._files.get((path, average))
        if known and state is not None and known[0] == state:
            return known[1]
        with _naming(path, name):
            found = find_file(path, average or None)
        if self.runs and name not in self._given and name not in self._uploads and not _is_below(found, self.runs):
            raise UserError(f"{name}: its checkpoint is a link to a file outside of the folder of runs")
        with self._lock:
            self._files[path, average] = (state, found)
        return found

    def name_of(self, file: str) -> str:
        """The name of the model that a file found by `file` belongs to; "" for an unknown one."""
        with self._lock:
            paths = {path for (path, _), (_, found) in self._files.items() if found == file}
            uploads = {name: each.path for name, each in self._uploads.items()}
        return next((name for name, path in {**self._known(), **uploads}.items() if path in paths), "")

    def describe(self, name: str) -> ModelInfo:
        """What a model is, by its file's description; its weights are not read. Raises UserError where it has none."""
        path, file = self.path(name), self.file(name)
        state = (_state(path), _state(file))
        with self._lock:
            known = self._described.get((name, file))
        if known and known[0] == state:
            return known[1]
        title = self._uploads[name].title if name in self._uploads else name
        with _naming(path, title):
            info = _describe(name, title, path, file)
        with self._lock:
            self._described = {key: value for key, value in self._described.items() if key[0] != name}
            self._described[name, file] = (state, info)
        return info

    def add_upload(self, path: str, title: str) -> str:
        """The random name of a file that a user uploaded, which the catalogue removes when it was idle.

        Raises UserError for a file that is no model, or holds anything but tensors; the file stays.
        """
        name = f"upload-{secrets.token_urlsafe(12)}"
        _describe(name, title, path, path)
        with self._lock:
            self._uploads[name] = _Upload(path, title, time.monotonic())
        return name

    def drop_uploads(self, idle_seconds: float = 0) -> None:
        """Remove the uploads that were not used for so long, and their files."""
        with self._lock:
            old = [name for name, each in self._uploads.items() if time.monotonic() - each.used >= idle_seconds]
            for name in old:
                self.remove_upload(name)

    def remove_upload(self, name: str) -> None:
        """Remove an upload and its file; nothing where there is none of that name."""
        with self._lock, contextlib.suppress(OSError, KeyError):
            os.remove(self._uploads.pop(name).path)

    def _known(self) -> dict[str, str]:
        """The path of each model, by name."""
        if not self.runs:
            return self._given
        with self._lock:
            if self._scanned is None or time.monotonic() - self._scanned[0] > RESCAN_SECONDS:
                names = [*self._given.items(), *sorted(_runs(self.runs))]
                self._scanned = (time.monotonic(), _named(names))
            return self._scanned[1]


@contextlib.contextmanager
def _naming(path: str, name: str) -> Iterator[None]:
    """Say the name of a model in errors, rather than its path, which is not for users."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from None


def _named(found: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> dict[str, str]:
    """(name, path) by unique names: the second of a name ends in -2."""
    named: dict[str, str] = {}
    for name, path in found:
        unique, number = name, 2
        while unique in named:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = path
    return named


def _stem(path: str) -> str:
    name = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def _runs(root: str) -> Iterator[tuple[str, str]]:
    """(name, path) of each folder with checkpoints at or below `root`; nothing below such a folder is searched."""
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # removed meanwhile, or not ours to read
            continue
        if any(_CHECKPOINT.fullmatch(entry.name) for entry in entries):
            relative = os.path.relpath(folder, root).replace(os.sep, "/")
            yield (_stem(root) if relative == "." else relative), folder
        elif depth < DEEPEST:
            waiting += [(e.path, depth + 1) for e in entries if e.is_dir(follow_symlinks=False)]


def _state(path: str) -> object:
    """What changes with a file or a folder; None where that is not known."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _is_below(path: str, root: str) -> bool:
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def _describe(name: str, title: str, path: str, file: str) -> ModelInfo:
    _, metadata = checkpoint.read_outline(file)
    config = metadata.get("config", {})
    if not config:
        raise UserError(
            f"{title} does not say what model it is: write a file that does with improved-diffusion export and the "
            "flags of its training"
        )
    kind = kind_of(config)
    if kind == "classifier":
        raise UserError(f"{title} is {': '.join(KINDS[kind])}")
    names = tuple(metadata.get("class_names") or ())
    has_classes = config.get("class_cond", False)
    size = config["large_size" if kind == "super_res" else "image_size"]
    return ModelInfo(
        name, title, kind, height_width(size), config.get("channels", 3), names,
        (len(names) or config.get("num_classes") or NUM_CLASSES) if has_classes else 0,
        metadata.get("step"), _averages(path, file),
        height_width(config["small_size"]) if kind == "super_res" else None,
        config.get("diffusion_steps", 1000), bool(config.get("label_drop")),
        config.get("resize_mode", ReadingConfig.resize_mode), config.get("background", ReadingConfig.background),
        metadata["distilled"]["steps"] if "distilled" in metadata else 0,
    )  # fmt: skip


def _averages(path: str, file: str) -> tuple[str, ...]:
    step = sets.step_of(file)
    if not files.is_dir(path) or step is None:
        return ()
    raw = ["raw"] if files.exists(files.join(path, checkpoint.model_name(step))) else []
    return (*sets.average_labels(path, step), *raw)
