"""Local files, and URLs that blobfile supports. A write replaces a file in one step: a crash leaves the old file."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from ..config import UserError, repeated, shown
from ..config.messages import shorten
from ..config.values import MAX_DIGITS
from . import hub
from .stop_signals import cleaning_up

if TYPE_CHECKING:
    from filelock import FileLock

_URL_FORMS = ("gs://", "az://", "https://ACCOUNT.blob.core.windows.net/")  # that blobfile reads
_KNOWN_URL = re.compile(r"gs://|az://|https://\w+\.blob\.core\.windows\.net/")
MAX_TEXT_BYTES = 2**26  # of a JSON, YAML or CSV file that is read whole
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_OTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP)  # a folder, a file as a folder, a link to itself
_ADVICE = ": free some space or choose another --out_dir; files written before are untouched"


def is_url(path: str | os.PathLike) -> bool:
    """Whether blobfile handles the path."""
    return "://" in str(path)


def _blobfile(path: str | os.PathLike) -> Any:
    """The package that reads and writes URLs. Raises UserError for a URL that it does not know."""
    if name := hub.name_in_url(str(path)):
        raise UserError(f"{path} is a page of the Hugging Face Hub: give {name} for the model there")
    if not _KNOWN_URL.match(str(path)):
        raise UserError(
            f"{path} is a URL that cannot be read: give a local path, without any ://, or a URL that begins with "
            f"{', '.join(_URL_FORMS)}"
        )
    try:
        import blobfile
    except ImportError:
        raise UserError("paths with :// need the package blobfile: pip install blobfile") from None
    return blobfile


def join(directory: str | os.PathLike, name: str) -> str:
    """The path of `name` in a directory."""
    return str(directory).rstrip("/") + "/" + name if is_url(directory) else os.path.join(directory, name)


def folder_of(path: str | os.PathLike) -> str:
    """The folder that a file is in; "." for a bare name."""
    folder = str(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)
    return str(folder) or "."


def same(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths, or two URLs, name the same folder or file."""
    if is_url(path) or is_url(other):
        return str(path).rstrip("/") == str(other).rstrip("/")
    return os.path.realpath(path) == os.path.realpath(other)


def full_path(path: str | os.PathLike) -> str:
    """The absolute path; a URL is returned unchanged."""
    return str(path) if is_url(path) else os.path.abspath(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether the file or folder exists."""
    with _storage("read", path):
        return _blobfile(path).exists(str(path)) if is_url(path) else os.path.exists(path)


def unused(path: str | os.PathLike) -> str:
    """The path with the first of -2, -3, ... at its end that does not exist."""
    candidates = (f"{str(path).rstrip('/')}-{number}" for number in itertools.count(2))
    return next(candidate for candidate in candidates if not exists(candidate))


def is_dir(path: str | os.PathLike) -> bool:
    """Whether the path is an existing folder."""
    with _storage("read", path):
        return _blobfile(path).isdir(str(path)) if is_url(path) else os.path.isdir(path)


@contextmanager
def _storage(what: str, path: str | os.PathLike, advice: str = "") -> Iterator[None]:
    """Turn an error of the disk or the storage service into UserError "cannot <what> <path>: ..."."""
    try:
        yield
    except OSError as error:
        if advice:
            advice = remedy(error, advice)
        raise UserError(f"cannot {what} {path}: {error.strerror or error}{advice}") from None
    except MemoryError:
        raise UserError(f"cannot {what} {path}: it needs more memory than there is") from None
    except Exception as error:
        if is_url(path) and isinstance(error, getattr(_blobfile(path), "Error", ())):
            raise UserError(f"cannot {what} {path}: {error}{advice}") from None
        raise


def remedy(error: OSError, usual: str) -> str:
    """What to do about a file that cannot be written: the usual, unless something of another kind is in its place."""
    return ": remove what is in its place, or choose another --out_dir" if error.errno in _OTHER_KIND else usual


def list_dir(path: str | os.PathLike) -> list[str]:
    """The sorted names in a folder. Raises UserError if it cannot be read."""
    with _storage("read", path):
        names = _blobfile(path).listdir(str(path)) if is_url(path) else os.listdir(path)
        return sorted(name.rstrip("/") for name in names)


def make_dirs(path: str | os.PathLike) -> None:
    """Create a folder and its parents. Raises UserError if that fails."""
    with _storage("make the folder", path, ": choose another --out_dir"):
        _blobfile(path).makedirs(str(path)) if is_url(path) else os.makedirs(path, exist_ok=True)


def open_read(path: str | os.PathLike) -> IO[bytes]:
    """Open a plain file for reading bytes. Raises UserError if it does not exist, or is a folder, a pipe or a device,
    which may have no end."""
    with _storage("read", path):
        if is_url(path):
            return _blobfile(path).BlobFile(str(path), "rb", streaming=False)
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(kind) else 'a pipe or a device'}, not a file")
        return open(path, "rb")


def require_plain(path: str | os.PathLike) -> None:
    """Raise UserError for a local path that is neither free nor a plain file of its own folder.

    A copied folder may hold links, and pipes: what is appended there would go elsewhere, or wait without end.
    """
    with _storage("write", path), suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind):
            what = "a link" if stat.S_ISLNK(kind) else "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
            raise UserError(
                f"cannot write {path}: it is {what}, not a plain file: remove it or choose another --out_dir"
            )


def read_bytes(path: str | os.PathLike, limit: int | None = None) -> bytes:
    """The contents of a file. Raises UserError if it cannot be read, or has more than `limit` bytes."""
    with _storage("read", path), open_read(path) as f:
        data = f.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise UserError(f"{path} has more than {limit:,} bytes: it is not the file that is expected here")
    return data


def read_start(path: str | os.PathLike, count: int) -> bytes:
    """The first bytes of a file, fewer where it is shorter. Raises UserError as `open_read` does."""
    with _storage("read", path), open_read(path) as f:
        return f.read(count)


def read_json(path: str | os.PathLike, limit: int = MAX_TEXT_BYTES) -> Any:
    """The value in a JSON file. Raises UserError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text of `name`.

    Raises UserError for text that is not JSON, for numbers that are not finite or too long, for a name that stands
    twice in an object, and for strings that are not Unicode, which could not be written again.
    """
    try:
        value = json.loads(
            text, parse_constant=_not_finite, parse_float=_finite, parse_int=_whole, object_pairs_hook=_no_name_twice
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except RecursionError:
        raise UserError(f"{name} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{name} is not readable JSON: {error}") from None
    return value


def read_record(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object in a file: plain values by name, see `is_plain`.

    Raises UserError, with the remedy, where the file holds anything else.
    """
    text = read_bytes(path, MAX_TEXT_BYTES)
    with suppress(UserError):
        content = parse_json(text, str(path))
        if isinstance(content, dict) and all(map(is_plain, content.values())):
            return content
    raise UserError(f"{path} is damaged: {remedy}")


def is_plain(value: Any) -> bool:
    """Whether a JSON value is a text, a number, true, false or null, or a list of those."""
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (str, int, float)) for item in items)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError(f"{shown(repeated(name for name, _ in pairs))} stands there twice")
    return named


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, but at most {MAX_DIGITS} are read")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _not_finite(digits)


def _not_finite(number: str) -> NoReturn:
    raise ValueError(f"{shorten(number)} is not a finite number")


def parse_csv(text: str, name: str) -> list[list[str]]:
    """The rows of a CSV text of `name`. Raises UserError for a field that is too long, as after damage."""
    try:
        return list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{name} is not readable CSV ({error}): move it elsewhere") from None


def size(path: str | os.PathLike) -> int:
    """The size of a file in bytes. Raises UserError as `open_read` does."""
    with _storage("read", path), open_read(path) as f:
        return f.seek(0, os.SEEK_END)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    with _storage("read", path), open_read(path) as f:
        while part := f.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def remove(path: str | os.PathLike) -> None:
    """Remove a file if it exists. Raises UserError if that fails."""
    with _storage("remove", path), suppress(FileNotFoundError):
        _blobfile(path).remove(str(path)) if is_url(path) else os.unlink(path)


def rename(path: str | os.PathLike, new_path: str | os.PathLike) -> None:
    """Rename a file within its folder. Raises UserError if that fails."""
    with _storage("rename", path):
        if is_url(path):
            _blobfile(path).copy(str(path), str(new_path), overwrite=True)
            _blobfile(path).remove(str(path))
        else:
            os.replace(path, new_path)


def write_bytes(path: str | os.PathLike, data: bytes | memoryview, durable: bool = True, advice: str = _ADVICE) -> None:
    """Write a file in one step: at any moment the path holds the complete old file or the complete new one.

    :param durable: also after a power cut; slower.
    :param advice: what to do where it cannot be written, for the message.
    Raises UserError (disk full, no permission); the old file is then unchanged.
    """
    write_together([(path, data)], durable, advice)


def write_together(
    contents: Iterable[tuple[str | os.PathLike, bytes | memoryview]], durable: bool = True, advice: str = _ADVICE
) -> None:
    """Write files like `write_bytes`, in folders that exist; none is visible before all are written.

    Under a URL each file becomes visible as soon as it is complete.
    """
    with _removed_at_end() as temporaries:
        staged: list[tuple[Path, Path]] = []
        for path, data in contents:
            with _storage("write", path, advice):
                if is_url(path):
                    with _blobfile(path).BlobFile(str(path), "wb", streaming=False) as f:  # visible once complete
                        f.write(data)
                else:
                    target = Path(path)
                    staged.append((_temporary(target), target))
                    temporaries.append(staged[-1][0])
                    _write_file(staged[-1][0], data, durable)
        for temporary, target in staged:
            with _storage("write", target, advice):
                os.replace(temporary, target)
        for folder in {target.parent for _, target in staged} if durable else ():
            with _storage("write", folder, advice):
                _fsync_dir(folder)


@contextmanager
def _removed_at_end() -> Iterator[list[Path]]:
    """A list of temporary files and folders. Those still there are removed when the block ends, also by an error,
    Ctrl-C or a signal that ends the process."""
    temporaries: list[Path] = []

    def remove_all() -> None:
        for path in temporaries:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()

    with cleaning_up(remove_all):
        try:
            yield temporaries
        finally:
            remove_all()


@contextmanager
def open_write(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Write a local file piece by piece. It replaces the old file when the block ends without an error.

    The new file then survives a power cut. Raises UserError (disk full, no permission); the old file is unchanged.
    """
    target = Path(path)
    temporary = _temporary(target)
    with _storage("write", path, _ADVICE), _removed_at_end() as temporaries:
        temporaries.append(temporary)
        with _create(temporary) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
        _fsync_dir(target.parent)


@contextmanager
def staging(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder in which a block writes a local file, and files that belong to it, under their own names.

    They move to the place of `path`, the file itself last, when the block ends without an error. Raises UserError (a
    URL, a folder, disk full, no permission), if it can before the block; what is there is then unchanged.
    """
    if is_url(path):
        raise UserError(f"{path} is a URL: write to a local path, and copy the file from there")
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    _require_replaceable(target)
    make_dirs(target.parent)
    with _storage("write", path, ": free some space or choose another --out"), _removed_at_end() as temporaries:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        temporaries.append(folder)
        yield folder
        others = sorted(each for each in folder.iterdir() if each.name != target.name)
        if others:  # a crash must not leave the old file with new ones
            target.unlink(missing_ok=True)
        for staged in [*others, folder / target.name]:
            with open(staged, "rb") as f:
                os.fsync(f.fileno())
            os.replace(staged, target.parent / staged.name)
        _fsync_dir(target.parent)


def _temporary(target: Path) -> Path:
    """The temporary name under which `target` is written; `remove_leftovers` finds it. Raises UserError as
    `_require_replaceable` does."""
    _require_replaceable(target)
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _require_replaceable(target: Path) -> None:
    """Raise UserError for a pipe or a device, such as /dev/null, which a file would otherwise take the place of."""
    with suppress(OSError):  # free, or said when it is written
        kind = target.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(f"cannot write {target}: it is a pipe or a device, not a plain file: choose another name")


def _create(path: Path) -> IO[bytes]:
    """A new file; a link of that name, which a copied folder may hold, is replaced and not followed."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def _write_file(path: Path, data: bytes | memoryview, durable: bool) -> None:
    with _create(path) as f:
        f.write(data)
        f.flush()
        if durable:
            os.fsync(f.fileno())


def remove_leftovers(directory: str | os.PathLike, prefix: str = "") -> None:
    """Remove incomplete files, left by killed writers, whose final names begin with `prefix`."""
    if is_dir(directory) and not is_url(directory):
        for path in Path(directory).glob(f".{prefix}*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                remove(path)


class Claim:
    """A folder claimed by `lock`. The end of a `with` statement, or `release`, gives it up."""

    def __init__(self, held: FileLock | None) -> None:
        self._held = held

    def release(self) -> None:
        """Give up this claim. The folder is free once every claim of this process is released. Again has no effect."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


# One object per lock file, which counts its claims. Kept here, so that a claim lasts even where nobody keeps it.
_locks: dict[str, FileLock] = {}


def lock(directory: str | os.PathLike, name: str = ".lock", on_wait: Callable[[], None] | None = None) -> Claim:
    """Claim a folder for this process until `release`, or until the process ends, however it ends.

    This process may claim it again. Forked processes do not share the claim. URLs, and file systems without locks,
    cannot be claimed: the result is then without effect.
    :param name: the lock file's name; claims under different names are independent.
    :param on_wait: called once where another process on this machine, or on the same network file system, holds it,
        before its end is waited for.
    Raises UserError instead of waiting where there is no `on_wait`.
    """
    if is_url(directory):
        return Claim(None)
    from filelock import FileLock, Timeout

    path = os.path.join(os.path.realpath(directory), name)
    require_plain(path)
    held = _locks.setdefault(path, FileLock(path, timeout=0, thread_local=False))
    with _storage("write", path, ": choose another --out_dir"):
        if held.is_locked and not os.path.exists(path):
            held.release(force=True)  # somebody has removed the folder, and with it this process's earlier claims
        try:
            held.acquire()
        except Timeout:
            if on_wait is None:
                raise UserError(
                    f"another run is writing into {directory}: wait until it has ended, or choose another --out_dir"
                ) from None
            on_wait()
            held.acquire(timeout=-1, poll_interval=0.2)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Claim(None)
            raise
    return Claim(held)


def _fsync_dir(path: Path) -> None:
    """Make a rename survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
