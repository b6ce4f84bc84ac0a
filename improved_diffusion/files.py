"""Files on this machine or behind any URL that blobfile reads: opened, listed, and written so that a crash leaves the
older one whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from .config import UserError


def is_url(path: str | os.PathLike) -> bool:
    """Whether the path is blobfile's to handle."""
    return "://" in str(path)


def _blobfile():
    try:
        import blobfile
    except ImportError:
        raise UserError("paths with :// need the package blobfile: pip install blobfile") from None
    return blobfile


def join(directory: str | os.PathLike, name: str) -> str:
    """The path of `name` in a directory."""
    return str(directory).rstrip("/") + "/" + name if is_url(directory) else os.path.join(directory, name)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file or folder."""
    return _blobfile().exists(str(path)) if is_url(path) else os.path.exists(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether there is such a folder."""
    return _blobfile().isdir(str(path)) if is_url(path) else os.path.isdir(path)


def list_dir(path: str | os.PathLike) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(name.rstrip("/") for name in (_blobfile().listdir(str(path)) if is_url(path) else os.listdir(path)))


def make_dirs(path: str | os.PathLike) -> None:
    """Make a folder and its parents. Raises UserError where that is not allowed."""
    try:
        _blobfile().makedirs(str(path)) if is_url(path) else os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}: choose another --out_dir") from None


def open_read(path: str | os.PathLike) -> IO[bytes]:
    """The file opened for reading bytes. Raises UserError where there is none."""
    try:
        if not is_url(path):
            return open(path, "rb")
        blobfile = _blobfile()
        try:
            return blobfile.BlobFile(str(path), "rb", streaming=False)
        except blobfile.Error as error:
            raise UserError(f"cannot read {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's contents."""
    with open_read(path) as f:
        return f.read()


def write_bytes(path: str | os.PathLike, data: bytes, durable: bool = True) -> None:
    """Write a file so that at any moment either the older one or the new one is there, whole.

    :param durable: even after a power cut; slower.
    Raises UserError (disk full, no permission), leaving the older file as it was.
    """
    if is_url(path):
        with _blobfile().BlobFile(str(path), "wb", streaming=False) as f:  # becomes visible when it is complete
            f.write(data)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
        if durable:
            _fsync_dir(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}: free some space or choose another --out_dir; "
            "files written before are untouched"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)  # there is one only where something, Ctrl-C too, came in between


def _fsync_dir(path: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
