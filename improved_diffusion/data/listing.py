"""Which files of a folder or a zip are images to learn from. What is left out is counted, to be logged.

An image is a file of a format in `utils.images.FORMATS`: by the suffix of its name, or by its first bytes where the
suffix is missing or unknown. Hidden files, what file managers leave behind, and the folders that this project's own
commands write are no data.
"""

from __future__ import annotations

import io
import mimetypes
import os
import re
import stat
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from ..config import UserError
from ..utils import files, images

MAX_DEPTH = 100  # of folders in folders
HEAD_BYTES = 4096  # of a file, to recognise its format
# Left by Windows, macOS and Synology beside the files of a folder. Names with a leading dot are hidden too.
HIDDEN = frozenset({
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "ehthumbs.db", "desktop.ini",
})  # fmt: skip
# Of each set, a folder that holds all is the output of a command of this project, or of the published ones.
RUN_FILES = (
    {"log.txt", "progress.csv"}, {"log.txt", "config.json"}, {"samples.json", "samples"}, {"report.json", "report.md"},
    {"sweep.json", "sweep.md"}, {"compare.md", "compare.png"}, {"nll.json", "per_image.npz"},
)  # fmt: skip
_RUN_NAMES = frozenset().union(*RUN_FILES)
_MANIFEST = re.compile(r"manifest\d{6,}\.json")  # of a checkpoint, beside config.json
# Suffixes whose files are not opened to see whether they are images: backups, incomplete downloads, archives, raw
# photos (which contain a small preview), and every type that Python knows not to be an image.
_OTHER = frozenset({
    ".bak", ".old", ".orig", ".part", ".partial", ".crdownload", ".download", ".tmp", ".swp", ".lock", ".newer",
    ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tgz", ".npy", ".npz", ".pt", ".pth", ".pt2", ".safetensors", ".ckpt",
    ".pkl", ".parquet", ".arrow", ".tfrecord", ".lmdb", ".mdb", ".idx", ".yaml", ".yml", ".toml", ".cfg", ".ini",
    ".log", ".md", ".jsonl", ".caption", ".raw", ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf",
    ".sr2", ".orf", ".rw2", ".pef", ".srw", ".raf", ".3fr", ".iiq", ".dcr", ".kdc", ".mrw", ".x3f",
})  # fmt: skip
# Recognised by their first bytes alone; BMP and PPM by a header that can be read too. The rest of FORMATS has no
# signature that tells it from other files, and goes by its suffix.
_SIGNED = ("AVIF", "GIF", "ICNS", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "TIFF", "WEBP")
_BY_HEADER = ("BMP", "PPM")

HIDDEN_KIND = "hidden"
RUN_KIND = "folder of a run"
LINK_KIND = "broken link"
OTHER_KIND = "pipe or device"
UNREADABLE_KIND = "unreadable folder"
_NAMED = {RUN_KIND, UNREADABLE_KIND}  # kinds of which the first is named
_SHOWN_KINDS = 8


class LeftOut:
    """How many files of each kind, such as ".txt", are left out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """Count the file or folder `name` under a kind."""
        self.counts[kind] += 1
        self.first.setdefault(kind, name)

    def add_file(self, name: str) -> None:
        """Count a file under its suffix."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(suffix if re.fullmatch(r"\.\w{1,15}", suffix) else "without a known suffix", name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        parts = [
            f"{count:,} {kind}" + (f" ({self.first[kind]})" if kind in _NAMED else "")
            for kind, count in self.counts.most_common(_SHOWN_KINDS)
        ]
        others = sum(self.counts.values()) - sum(count for _, count in self.counts.most_common(_SHOWN_KINDS))
        return ", ".join([*parts, f"{others:,} more"] if others else parts)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by the system beside the files of others."""
    return name.startswith(".") or name.lower() in HIDDEN


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with these names in it is the output of a run."""
    names = set(names)
    if any(marks <= names for marks in RUN_FILES):
        return True
    return "config.json" in names and any(map(_MANIFEST.fullmatch, names))


def may_be_image(name: str) -> bool:
    """Whether only the content tells if a file of this name is an image: the suffix is missing or unknown."""
    suffix = os.path.splitext(name)[1].lower()
    if name.endswith("~") or suffix in _OTHER:
        return False
    kind = _types().get(suffix)
    return kind is None or kind.startswith("image/") or kind == "application/octet-stream"


@lru_cache(maxsize=1)
def _types() -> dict[str, str]:
    """Suffix -> MIME type, of Python's own table: that of the machine would make data depend on it."""
    return mimetypes.MimeTypes().types_map[True]


def is_image_head(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file are those of an image."""
    images.formats()  # registers them
    for name in (*_SIGNED, *_BY_HEADER):
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        # Pillow returns a text where it knows a format but cannot decode it.
        if accept is not None and accept(head[:16]) is True:
            return name in _SIGNED or _header_opens(head, name)
    return False


def _header_opens(head: bytes, name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(head), formats=[name])
    except Image.DecompressionBombError:
        return True  # an image, of which reading says that it is too large
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def is_image_file(path: str) -> bool:
    """Whether a local file is an image, by its suffix or its content. Raises OSError where it cannot be read."""
    if images.is_image_name(path):
        return True
    if not may_be_image(os.path.basename(path)):
        return False
    with open(path, "rb", buffering=0) as f:
        return is_image_head(f.read(HEAD_BYTES))


# Folders


class _Entry(NamedTuple):
    name: str
    path: str
    kind: str  # "folder", "file", or why it is neither


def list_folder(root: str) -> tuple[list[str], LeftOut]:
    """(the paths of the images below a folder, what is left out), depth first, each folder's entries in sorted order.

    Below a URL, files go by their suffix alone: to open each would take a request. Links are followed, but not back
    to a folder above. Raises UserError where `root` cannot be read.
    """
    left_out = LeftOut()
    walk = _walk_url if files.is_url(root) else _walk
    return list(walk(root, (), left_out)), left_out


def _walk(folder: str, above: tuple[str, ...], left_out: LeftOut) -> Iterator[str]:
    """:param above: the real paths of the folders above; links back to them are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted((_Entry(entry.name, entry.path, _kind(entry)) for entry in found), key=_by_name)
    except OSError as error:
        if not above:
            raise UserError(f"cannot read {folder}: {error.strerror or error}") from None
        left_out.add(UNREADABLE_KIND, f"{folder}: {error.strerror or error}")
        return
    if above and is_run(entry.name for entry in entries):
        left_out.add(RUN_KIND, folder)
        return
    above = (*above, real)
    for entry in entries:
        if is_hidden(entry.name):
            left_out.add(HIDDEN_KIND, entry.path)
        elif entry.kind == "folder" and len(above) < MAX_DEPTH:
            yield from _walk(entry.path, above, left_out)
        elif entry.kind == "folder":
            left_out.add(f"folder below {MAX_DEPTH} others", entry.path)
        elif entry.kind != "file":
            left_out.add(entry.kind, entry.path)
        elif _is_readable_image(entry.path):
            yield entry.path
        else:
            left_out.add_file(entry.name)


def _by_name(entry: _Entry) -> str:
    return entry.name


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link in circles
        return LINK_KIND
    return LINK_KIND if entry.is_symlink() else OTHER_KIND


def _is_readable_image(path: str) -> bool:
    try:
        return is_image_file(path)
    except OSError:  # nothing in its name says that it is an image
        return False


def _walk_url(folder: str, above: tuple[str, ...], left_out: LeftOut) -> Iterator[str]:
    names = files.list_dir(folder)
    if above and is_run(names):
        left_out.add(RUN_KIND, folder)
        return
    above = (*above, folder)
    for name in names:
        path = files.join(folder, name)
        if is_hidden(name):
            left_out.add(HIDDEN_KIND, path)
        elif images.is_image_name(name):
            yield path
        elif len(above) < MAX_DEPTH and files.is_dir(path):
            yield from _walk_url(path, above, left_out)
        else:
            left_out.add_file(name)


# Zips


def parts_of(member: str) -> list[str]:
    """The folders and the name of a zip's member; a drive, "." and ".." and empty names count for nothing."""
    parts = re.sub(r"^[A-Za-z]:", "", member).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".", "..")]


def list_zip(archive: zipfile.ZipFile) -> tuple[list[str], LeftOut]:
    """(the members of a zip that are images, what is left out), sorted as the entries of folders are.

    A name may occur twice if a file was added again: the last one counts, as in unpacking.
    """
    left_out, found = LeftOut(), []
    members = {info.filename: info for info in archive.infolist()}
    runs = _runs_in(members)
    for folder in sorted(runs):
        left_out.add(RUN_KIND, "/".join(folder))
    for name, info in members.items():
        parts = parts_of(name)
        if info.is_dir() or (runs and any(tuple(parts[:i]) in runs for i in range(1, len(parts)))):
            continue
        if any(map(is_hidden, parts)):
            left_out.add(HIDDEN_KIND, name)
        elif stat.S_ISLNK(info.external_attr >> 16):
            left_out.add("link", name)
        elif images.is_image_name(name) or (parts and may_be_image(parts[-1]) and _is_image_member(archive, info)):
            found.append(name)
        else:
            left_out.add_file(name)
    return sorted(found, key=lambda name: name.split("/")), left_out


def _runs_in(members: Iterable[str]) -> set[tuple[str, ...]]:
    """The folders of runs, but for the zip itself, which was named by its user."""
    entries: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for member in members:
        parts = parts_of(member)
        for i, part in enumerate(parts):
            if i and (part in _RUN_NAMES or _MANIFEST.fullmatch(part)):
                entries[tuple(parts[:i])].add(part)
    return {folder for folder, names in entries.items() if is_run(names)}


def _is_image_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as f:
            return is_image_head(f.read(HEAD_BYTES))
    except Exception:  # zipfile raises many kinds for damaged members
        return False
