"""Files on this machine or behind any URL that blobfile reads: opened, listed, and written so that a crash leaves the
older one whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
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


def remove(path: str | os.PathLike) -> None:
    """Remove a file; one that is not there is no error. Raises UserError where that is not allowed."""
    try:
        if exists(path):
            _blobfile().remove(str(path)) if is_url(path) else os.unlink(path)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}") from None


def write_bytes(path: str | os.PathLike, data: bytes | memoryview, durable: bool = True) -> None:
    """Write a file so that at any moment either the older one or the new one is there, whole.

    :param durable: even after a power cut; slower.
    Raises UserError (disk full, no permission), leaving the older file as it was.
    """
    write_together([(path, data)], durable)


def write_together(contents: Iterable[tuple[str | os.PathLike, bytes | memoryview]], durable: bool = True) -> None:
    """Write files of one folder like `write_bytes`, none of them visible before all are written whole.

    Behind a URL each becomes visible as soon as it is complete.
    """
    staged: list[tuple[Path, Path]] = []
    path: str | os.PathLike = ""
    try:
        for path, data in contents:
            if is_url(path):
                _write_blob(str(path), data)
                continue
            target = Path(path)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            staged.append((temporary, target))
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                if durable:
                    os.fsync(f.fileno())
        for temporary, target in staged:
            os.replace(temporary, target)
        if staged and durable:
            _fsync_dir(staged[0][1].parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}: free some space or choose another --out_dir; "
            "files written before are untouched"
        ) from None
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)  # there is one only where something, Ctrl-C too, came in between


def _write_blob(path: str, data: bytes | memoryview) -> None:
    blobfile = _blobfile()
    try:
        with blobfile.BlobFile(path, "wb", streaming=False) as f:  # becomes visible when it is complete
            f.write(data)
    except blobfile.Error as error:
        raise UserError(f"cannot write {path}: {error}: check the storage and your access to it") from None


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Remove what writers that were killed have left half-written in a folder."""
    if is_dir(directory) and not is_url(directory):
        for path in Path(directory).glob(".*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def lock(directory: str | os.PathLike) -> None:
    """Claim a folder until this process ends; without effect on URLs, where there are no locks.

    Raises UserError where another process on this machine, or on the same network file system, holds it.
    """
    if is_url(directory):
        return
    import fcntl

    handle = os.open(os.path.join(directory, ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Of the process, unlike flock: the workers that read images do not inherit it, and cannot outlive it with it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another run is writing into {directory}: wait until it has ended, or choose another --out_dir"
        ) from None
    except OSError:
        os.close(handle)  # a file system without locks


def _fsync_dir(path: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
