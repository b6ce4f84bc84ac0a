"""Files on this machine or behind any URL that blobfile reads: opened, listed, and written so that a crash leaves the
older one whole."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..config import UserError

_ADVICE = ": free some space or choose another --out_dir; files written before are untouched"


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


def same(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths, or two URLs, name the same folder or file."""
    if is_url(path) or is_url(other):
        return str(path).rstrip("/") == str(other).rstrip("/")
    return os.path.realpath(path) == os.path.realpath(other)


def full_path(path: str | os.PathLike) -> str:
    """The path from the root on, a URL as it is: what a description of a file keeps."""
    return str(path) if is_url(path) else os.path.abspath(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file or folder."""
    return _blobfile().exists(str(path)) if is_url(path) else os.path.exists(path)


def is_dir(path: str | os.PathLike) -> bool:
    """Whether there is such a folder."""
    return _blobfile().isdir(str(path)) if is_url(path) else os.path.isdir(path)


@contextmanager
def _storage(what: str, path: str | os.PathLike, advice: str = "") -> Iterator[None]:
    """What goes wrong with a disk or a storage service inside is a UserError: "cannot <what> <path>: ..."."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {what} {path}: {error.strerror or error}{advice}") from None
    except Exception as error:
        if is_url(path) and isinstance(error, getattr(_blobfile(), "Error", ())):
            raise UserError(f"cannot {what} {path}: {error}{advice}") from None
        raise


def list_dir(path: str | os.PathLike) -> list[str]:
    """The names in a folder, sorted. Raises UserError where it cannot be read."""
    with _storage("read", path):
        names = _blobfile().listdir(str(path)) if is_url(path) else os.listdir(path)
        return sorted(name.rstrip("/") for name in names)


def make_dirs(path: str | os.PathLike) -> None:
    """Make a folder and its parents. Raises UserError where that is not allowed."""
    with _storage("make the folder", path, ": choose another --out_dir"):
        _blobfile().makedirs(str(path)) if is_url(path) else os.makedirs(path, exist_ok=True)


def open_read(path: str | os.PathLike) -> IO[bytes]:
    """The file opened for reading bytes. Raises UserError where there is none."""
    with _storage("read", path):
        return _blobfile().BlobFile(str(path), "rb", streaming=False) if is_url(path) else open(path, "rb")


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's contents. Raises UserError where they cannot be read."""
    with _storage("read", path), open_read(path) as f:
        return f.read()


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256, in hexadecimal digits. Raises UserError where it cannot be read."""
    digest = hashlib.sha256()
    with _storage("read", path), open_read(path) as f:
        while part := f.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def remove(path: str | os.PathLike) -> None:
    """Remove a file; one that is not there is no error. Raises UserError where that is not allowed."""
    with _storage("remove", path), suppress(FileNotFoundError):
        _blobfile().remove(str(path)) if is_url(path) else os.unlink(path)


def rename(path: str | os.PathLike, new_path: str | os.PathLike) -> None:
    """Give a file another name in its folder. Raises UserError where that is not allowed."""
    with _storage("rename", path):
        if is_url(path):
            _blobfile().copy(str(path), str(new_path), overwrite=True)
            _blobfile().remove(str(path))
        else:
            os.replace(path, new_path)


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
    try:
        for path, data in contents:
            with _storage("write", path, _ADVICE):
                if is_url(path):
                    with _blobfile().BlobFile(str(path), "wb", streaming=False) as f:  # visible when it is complete
                        f.write(data)
                else:
                    target = Path(path)
                    staged.append((_temporary(target), target))
                    _write_file(staged[-1][0], data, durable)
        for temporary, target in staged:
            with _storage("write", target, _ADVICE):
                os.replace(temporary, target)
        if staged and durable:
            with _storage("write", staged[0][1], _ADVICE):
                _fsync_dir(staged[0][1].parent)
    finally:
        for temporary, _ in staged:
            with suppress(OSError):
                temporary.unlink()  # there is one only where something, Ctrl-C too, came in between


@contextmanager
def open_write(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A local file to write piece by piece, which takes the older one's place when the block ends without an error.

    It is then there even after a power cut. Raises UserError (disk full, no permission), leaving the older one alone.
    """
    target = Path(path)
    temporary = _temporary(target)
    with _storage("write", path, _ADVICE):
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, target)
            _fsync_dir(target.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()  # there is one only where something, Ctrl-C too, came in between


def _temporary(target: Path) -> Path:
    """Where what will be `target` is written until it is whole; `remove_leftovers` knows the form."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _write_file(path: Path, data: bytes | memoryview, durable: bool) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        if durable:
            os.fsync(f.fileno())


def remove_leftovers(directory: str | os.PathLike, prefix: str = "") -> None:
    """Remove what writers that were killed have left half-written in a folder, of files whose names begin so."""
    if is_dir(directory) and not is_url(directory):
        for path in Path(directory).glob(f".{prefix}*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                remove(path)


def lock(directory: str | os.PathLike, name: str = ".lock") -> None:
    """Claim a folder until this process ends; without effect on URLs, where there are no locks.

    :param name: of the file that is locked: claims under different names do not touch each other.
    Raises UserError where another process on this machine, or on the same network file system, holds it.
    """
    if is_url(directory):
        return
    import fcntl

    path = os.path.join(directory, name)
    with _storage("write", path, ": choose another --out_dir"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
