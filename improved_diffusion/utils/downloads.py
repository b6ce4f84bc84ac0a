"""Files behind URLs, downloaded once into a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config import UserError, one_line
from . import files

TIMEOUT_SECONDS = 60  # without a byte from the server
SLOWEST = 2**10  # bytes a second, on average: a server may not send for ever
MAX_BYTES = 2**33  # of a file
CHUNK_BYTES = 2**18
LONGEST_NAME = 100  # of a cached file, in characters

# Called with the bytes that have arrived since the last call, and those of the whole file, None if unknown.
Report = Callable[[int, "int | None"], None]
# Whether a file is of the kind that is expected.
Check = Callable[[Path], bool]


def cache_dir() -> Path:
    """The folder of downloaded files: $XDG_CACHE_HOME/improved_diffusion, or ~/.cache/improved_diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improved_diffusion"


def cache_path(url: str) -> Path:
    """Where the cache keeps the file of a URL: files of one name from two places are two."""
    name = url.rpartition("/")[2][-LONGEST_NAME:]
    return cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def cached(url: str, sha256: str = "", report: Report | None = None, check: Check | None = None) -> Path:
    """The local file of a URL, downloaded unless the cache has it.

    :param sha256: the file's checksum in hexadecimal, if it is known; else that of the first download is kept beside
        the file and holds from then on.
    :param check: whether a file is of the kind that is expected. One that is not is never kept, and a cached one is
        downloaded again: a network with a login page answers every URL with that page.
    Raises UserError if the download fails, naming where to put the file by hand, and for a file with another checksum.
    """
    target = cache_path(url)
    note = target.with_name(target.name + ".sha256")
    if check is not None and target.is_file() and not check(target):
        files.remove(target)
        files.remove(note)
    if not target.exists():
        files.make_dirs(target.parent)
        download(url, target, sha256, report, check)
    found = files.sha256(target)
    expected = sha256 or (files.read_bytes(note, 100).decode(errors="replace").strip() if note.exists() else found)
    if found != expected:
        raise UserError(
            f"{target} is not the file of {url} (its checksum differs): remove it, and {note.name} beside it"
        )
    if not note.exists():
        files.write_bytes(note, found.encode())
    return target


def download(
    url: str, target: Path, sha256: str = "", report: Report | None = None, check: Check | None = None
) -> None:
    """Download a file to `target`, which appears only if the download is complete, has the given checksum, and is of
    the kind that is expected.

    Written to the disk as it arrives. Raises UserError, and keeps nothing, otherwise.
    """
    digest = hashlib.sha256()
    with files.open_write(target) as f:
        for part in _parts(url, target, report):
            digest.update(part)
            f.write(part)
        f.flush()
        what = "is not the expected file"
        if check is not None and not check(Path(f.name)):
            with open(f.name, "rb") as written:
                begin = one_line(written.read(30).decode(errors="replace"))
            raise UserError(
                f"{url} {what}: it begins with {begin!r}, as the login page of a network may; nothing was kept: log "
                f"in and try again, or fetch the file elsewhere and put it at {target}"
            )
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(
                f"{url} {what}: its SHA-256 is {digest.hexdigest()}, not {sha256}: nothing was kept; "
                f"put the right file at {target}"
            )


def _parts(url: str, target: Path, report: Report | None) -> Iterator[bytes]:
    """The contents of a URL in pieces. Raises UserError if they cannot be read to their end."""
    done, start = 0, time.monotonic()
    try:
        source, total = _open(url)
        with source:
            _check_size(total or 0)
            while part := source.read1(CHUNK_BYTES):
                done += len(part)
                _check_size(done)
                seconds = time.monotonic() - start
                if seconds > TIMEOUT_SECONDS and done < SLOWEST * seconds:
                    raise OSError(f"{done} bytes in {seconds:.0f} seconds")
                if report is not None:
                    report(len(part), total)
                yield part
        if total and done != total:
            raise OSError(f"received {done} of {total} bytes")
    except (OSError, UserError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        why = " ".join(str(error).split())
        raise UserError(f"cannot download {url} ({why}): fetch it elsewhere and put it at {target}") from None


def _open(url: str) -> tuple[Any, int | None]:
    """(what reads the URL, the size of its file, None if unknown)."""
    if not url.lower().startswith(("http://", "https://")):
        return files.open_read(url), None
    # Not urllib's own opener, which follows redirections to ftp://.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    source = opener.open(url, timeout=TIMEOUT_SECONDS)
    return source, int(source.headers.get("Content-Length") or 0) or None


def _check_size(count: int) -> None:
    if not 0 <= count <= MAX_BYTES:
        raise OSError(f"{count:,} bytes, but at most {MAX_BYTES:,} are expected")
