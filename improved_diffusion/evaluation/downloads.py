"""Feature programs, which may be behind URLs."""

from __future__ import annotations

import zipfile
from pathlib import Path

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from ..utils import downloads, files

ZIP_MAGIC = b"PK"


def fetch(spec: str, flag: str, sha256: str = "") -> str:
    """The local path of a program, given as a file or a URL; URLs are downloaded once. Collective.

    :param flag: the option, for messages.
    :param sha256: the checksum of the URL's file, if it is known.
    Raises UserError for a file that does not exist, a failed download, one of something else than a program, and a
    cached file that has changed.
    """
    if not files.is_url(spec):
        if not files.exists(spec):
            raise UserError(f"{flag} {spec} does not exist")
        if files.is_dir(spec):
            raise UserError(f"{flag} {spec} is a folder: name a file")
        return spec
    # By rank 0 first, then on hosts that do not share its disk.
    distributed.from_rank0(_fetch, spec, sha256)
    return _fetch(spec, sha256)


def _is_program(path: Path) -> bool:
    """Whether a file is a whole zip archive, as both kinds of programs are, rather than a web page or a part of one."""
    with open(path, "rb") as f:
        return f.read(len(ZIP_MAGIC)) == ZIP_MAGIC and zipfile.is_zipfile(f)


def _fetch(url: str, sha256: str) -> str:
    bar: Progress | None = None

    def report(received: int, total: int | None) -> None:
        nonlocal bar
        if bar is None:
            bar = Progress("downloading", total, "byte")
        bar.update(received)

    target = downloads.cache_path(url)
    if not target.exists():
        logger.log(f"downloading {url} to {target}")
    try:
        return str(downloads.cached(url, sha256, report, _is_program))
    finally:
        if bar is not None:
            bar.close()
