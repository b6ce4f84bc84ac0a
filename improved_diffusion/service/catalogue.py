"""A stand-in of the catalogue."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass

from ..api import load
from ..config import UserError, height_width


@dataclass(frozen=True)
class ModelInfo:
    name: str
    kind: str
    size: tuple[int, int]
    channels: int
    class_names: tuple[str, ...] | None
    step: int | None
    averages: tuple[str, ...]
    small_size: tuple[int, int] | None = None


class Catalogue:
    def __init__(self, runs="", model_paths=()):
        self.runs, self.paths, self._known = (
            runs,
            {os.path.splitext(os.path.basename(p.rstrip("/")))[0]: p for p in model_paths},
            {},
        )
        self._uploads = {}

    def _all(self):
        found = dict(self.paths)
        for root, _, names in os.walk(self.runs):
            if any(n.startswith("model") and n.endswith(".pt") for n in names):
                found[os.path.relpath(root, self.runs)] = root
        return found

    def names(self):
        return sorted(self._all())

    def path(self, name):
        found = {**self._all(), **self._uploads}
        if name not in found:
            raise UserError(f"no model {name}")
        return found[name]

    def describe(self, name):
        if name not in self._known:
            m = load(self.path(name))
            s = m.settings.model
            self._known[name] = ModelInfo(
                name,
                s.kind,
                height_width(s.size),
                s.channels,
                m.class_names and tuple(m.class_names),
                m.step,
                ("0.99", "raw") if os.path.isdir(self.path(name)) else (),
                height_width(s.small_size) if s.kind == "super_res" else None,
            )
        return self._known[name]

    def add_upload(self, path, title):
        name = f"{title}-{uuid.uuid4().hex[:6]}"
        copy = os.path.join(tempfile.mkdtemp(), os.path.basename(path))
        shutil.copy(path, copy)
        load(copy)
        self._uploads[name] = copy
        return name
