"""Files behind URLs, downloaded once into a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import UserError
from . import files

TIMEOUT_SECONDS = 60  # without a byte from the server
CHUNK_BYTES = 2**18

# Called with the bytes that have arrived since the last call, and those of the whole file, None if unknown.
Report = Callable[[int, "int | None"], None]


def cache_dir() -> Path:
    """The folder of downloaded files: $XDG_CACHE_HOME/improved_diffusion, or ~/.cache/improved_diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improved_diffusion"


def cache_path(url: str) -> Path:
    """Where the cache keeps the file of a URL: files of one name from two places are two."""
    return cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rpartition('/')[2]}"


def cached(url: str, sha256: str = "", report: Report | None = None) -> Path:
    """The local file of a URL, downloaded unless the cache has it.

    :param sha256: the file's checksum in hexadecimal, if it is known; else that of the first download is kept beside
        the file and holds from then on.
    Raises UserError if the download fails, naming where to put the file by hand, and for a file with another checksum.
    """
    target = cache_path(url)
    note = target.with_name(target.name + ".sha256")
    if not target.exists():
        files.make_dirs(target.parent)
        download(url, target, sha256, report)
    found = files.sha256(target)
    expected = sha256 or (files.read_bytes(note).decode(errors="replace").strip() if note.exists() else found)
    if found != expected:
        raise UserError(
            f"{target} is not the file of {url} (its checksum differs): remove it, and {note.name} beside it"
        )
    if not note.exists():
        files.write_bytes(note, found.encode())
    return target


def download(url: str, target: Path, sha256: str = "", report: Report | None = None) -> None:
    """Download a file to `target`, which appears only if the download is complete and has the given checksum.

    Written to the disk as it arrives. Raises UserError, and keeps nothing, otherwise.
    """
    digest = hashlib.sha256()
    with files.open_write(target) as f:
        for part in _parts(url, target, report):
            digest.update(part)
            f.write(part)
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(
                f"{url} is not the expected file: its SHA-256 is {digest.hexdigest()}, not {sha256}: nothing was kept; "
                f"put the right file at {target}"
            )


def _parts(url: str, target: Path, report: Report | None) -> Iterator[bytes]:
    """The contents of a URL in pieces. Raises UserError if they cannot be read to their end."""
    done, total = 0, None
    try:
        if url.startswith(("http://", "https://")):
            source = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
            total = int(source.headers.get("Content-Length") or 0) or None
        else:
            source = files.open_read(url)
        with source:
            while part := source.read(CHUNK_BYTES):
                done += len(part)
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
