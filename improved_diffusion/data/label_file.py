"""A file of labels: the class of each image, by its path."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..config import UserError, shown
from ..utils import files
from ..utils.text import one_line

KEYWORDS = ("prefix", "folder")  # of --labels; anything else is a file
Label = int | str  # a class's number or its name
# The names that the columns of a table have, the best first.
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "filepath", "image", "image_id", "img", "name", "id")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "y", "text")
_COLUMNS = (_FILE_COLUMNS, _LABEL_COLUMNS)
_TABLES = (".csv", ".tsv")
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")


class LabelFile:
    """The labels in a JSON, JSONL, CSV or TSV file, by the images' paths.

    JSON: an object or a list of pairs, at the top or under "labels". JSONL: an object such as {"file": ..., "label":
    ...} in each line. CSV and TSV: columns such as file and label, or two without a heading. Raises UserError for
    anything else, and for a file without a label or with two.
    """

    def __init__(self, path: str):
        self.path = path
        _check_label_file(path)
        self.labels: dict[str, Label] = {}
        for name, label in _pairs(path):
            self._add(_plain(name), self._checked(name, label))

    def _add(self, name: str, label: Label) -> None:
        before = self.labels.setdefault(name, label)
        if before != label:
            raise UserError(
                f"--labels {self.path} has two labels for {one_line(name)}, {shown(before)} and {shown(label)}: "
                "keep one of them"
            )

    def _checked(self, name: str, label: Any) -> Label:
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            what = repr(label) if not isinstance(label, (dict, list)) else f"a {type(label).__name__}"
            raise UserError(
                f"--labels {self.path}: the label of {one_line(name)} must be a name or an integer, not {what}"
            )
        if isinstance(label, str) and not label.strip():
            raise UserError(f"--labels {self.path}: {one_line(name)} has no label")
        return label

    def of(self, names: Sequence[str]) -> list[Label]:
        """The label of each image. A path without its suffix will do, where it has one label only."""
        found = [self.labels.get(name) for name in names]
        if None in found:
            stems = self._by_stem()
            found = [stems.get(_stem(name)) if label is None else label for name, label in zip(names, found)]
        missing = [name for name, label in zip(names, found) if label is None]
        if missing:
            first = (
                f"; its first is for {one_line(next(iter(self.labels)))} (paths are those below --data_dir)"
                if self.labels
                else ""
            )
            raise UserError(
                f"--labels {self.path} has no label for {one_line(missing[0])} and {len(missing) - 1} more of "
                f"{len(names)} images{first}"
            )
        return found  # type: ignore[return-value]

    def _by_stem(self) -> dict[str, Label | None]:
        stems: dict[str, Label | None] = {}
        for name, label in self.labels.items():
            stem = _stem(name)
            stems[stem] = label if stems.get(stem, label) == label else None
        return stems


def _plain(name: str) -> str:
    """A path without "./" and backslashes."""
    return re.sub(r"^(\./+)+", "", name.replace("\\", "/"))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _check_label_file(path: str) -> None:
    if files.is_dir(path):
        raise UserError(f"--labels {path} is a folder: name a file, or give --labels folder")
    if files.exists(path):
        return
    close = difflib.get_close_matches(path.lower(), KEYWORDS, n=1)
    hint = f": did you mean {close[0]}?" if close else f", and is none of {', '.join(KEYWORDS)}"
    raise UserError(f"--labels {path} does not exist{hint}")


def _pairs(path: str) -> Iterable[tuple[str, Any]]:
    """The files' names and labels, as they stand in a file of labels."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _SPREADSHEETS:
        raise UserError(f"--labels {path} is a spreadsheet: save it as CSV UTF-8")
    if suffix == ".jsonl":
        return _json_lines(path)
    return _table(path) if suffix in _TABLES else _json_pairs(path)


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = files.parse_json(line, f"--labels {path}, line {number},")
        keys = list(row) if isinstance(row, dict) else []
        file, label = _columns(keys)
        if min(file, label) < 0 or not isinstance(row[keys[file]], str):
            raise UserError(
                f'--labels {path}, line {number}: expected an object such as {{"file": "001.png", "label": "cat"}}'
            )
        yield row[keys[file]], row[keys[label]]


def _json_pairs(path: str) -> Iterable[tuple[str, Any]]:
    content = files.read_json(path)
    if isinstance(content, dict) and "labels" in content:
        content = content["labels"]
    pairs = list(content.items()) if isinstance(content, dict) else content
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise UserError(f'--labels {path}: expected JSON such as {{"cat/001.png": "cat"}} or [["001.png", 3]]')
    return pairs


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)


def _table(path: str) -> list[tuple[str, Any]]:
    rows = _rows(path)
    heading = rows[0] if rows else []
    file, label = _columns(heading)
    if min(file, label) >= 0:
        del rows[0]
    elif len(heading) == 2:
        file, label = 0, 1
    else:
        held = ", ".join(heading[:8]) or "nothing"
        raise UserError(f"--labels {path}: expected the columns file and label, found {held}")
    for number, row in enumerate(rows):
        if len(row) <= max(file, label) or not row[label].strip():
            raise UserError(f"--labels {path}: row {number + 1}, {' '.join(row).strip()}, has no label")
    found = [(row[file].strip(), row[label].strip()) for row in rows]
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", label) for _, label in found)
    return [(name, int(label)) for name, label in found] if whole else found


def _columns(heading: Iterable[str]) -> tuple[int, int]:
    """Which columns are the files and the labels, by their names; -1 where there is none."""
    names = [name.strip().lower() for name in heading]
    file, label = (next((names.index(name) for name in known if name in names), -1) for known in _COLUMNS)
    return file, label


def _rows(path: str) -> list[list[str]]:
    """The rows of a table that are not empty. Its first line shows what separates the cells."""
    text = _text(path)
    heading = text.partition("\n")[0]
    delimiter = next((mark for mark in "\t,;" if mark in heading), ",")
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise UserError(f"--labels {path} is not a readable table: {error}") from None


def _text(path: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 as Excel's "Unicode text"."""
    data = files.read_bytes(path, files.MAX_TEXT_BYTES)
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {path} is not UTF-8 text ({error}): save it as CSV UTF-8") from None
