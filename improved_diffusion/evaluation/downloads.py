"""Files of options that may be URLs."""

from __future__ import annotations

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from ..utils import downloads, files


def fetch(spec: str, flag: str, sha256: str = "") -> str:
    """The local path of a file or URL; URLs are downloaded once. Collective.

    :param flag: the option, for messages.
    :param sha256: the checksum of the URL's file, if it is known.
    Raises UserError for a file that does not exist, a failed download, and a cached file that has changed.
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
        return str(downloads.cached(url, sha256, report))
    finally:
        if bar is not None:
            bar.close()
