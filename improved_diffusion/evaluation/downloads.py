"""Files from the network: downloaded once, kept with their checksum."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from ..utils import files

TIMEOUT_SECONDS = 60  # without a byte from a server
CHUNK_BYTES = 2**18


def cache_dir() -> Path:
    """Where files from URLs are kept: $XDG_CACHE_HOME/improved_diffusion, or ~/.cache/improved_diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improved_diffusion"


def fetch(spec: str, flag: str) -> str:
    """The local path of a file or URL; what is behind a URL is downloaded once, and kept with its SHA-256. Collective.

    Raises UserError where there is no such file, where a URL cannot be reached (naming where to put the file by hand),
    and where a kept file is no longer what was downloaded.
    """
    if not files.is_url(spec):
        if not files.exists(spec):
            raise UserError(f"{flag} {spec} does not exist")
        if files.is_dir(spec):
            raise UserError(f"{flag} {spec} is a folder: name a file")
        return spec
    # On rank 0 first, then on every host that does not see its disk.
    distributed.from_rank0(_fetch, spec)
    return _fetch(spec)


def _fetch(url: str) -> str:
    # Files of one name from two places must not be taken for each other.
    target = cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rpartition('/')[2]}"
    note = target.with_name(target.name + ".sha256")
    if not target.exists():
        files.make_dirs(target.parent)
        files.write_bytes(target, _download(url, target))
    sha256 = files.sha256(target)
    if not note.exists():  # it was put there by hand
        files.write_bytes(note, sha256.encode())
    elif files.read_bytes(note).decode(errors="replace").strip() != sha256:
        raise UserError(f"{target} is not what came from {url}: remove it, and {note.name} beside it")
    return str(target)


def _download(url: str, target: Path) -> bytes:
    logger.log(f"downloading {url} to {target}")
    try:
        if not url.startswith(("http://", "https://")):
            return files.read_bytes(url)
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            length = int(response.headers.get("Content-Length") or 0)
            bar = Progress("downloading", length or None, "byte")
            parts = []
            while part := response.read(CHUNK_BYTES):
                parts.append(part)
                bar.update(len(part))
            bar.close()
        data = b"".join(parts)
        if length and len(data) != length:
            raise OSError(f"{len(data)} of {length} bytes came")
        return data
    except (OSError, UserError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer, and holds the connection
        why = " ".join(str(error).split())
        raise UserError(f"cannot download {url} ({why}): fetch it elsewhere and put it at {target}") from None
