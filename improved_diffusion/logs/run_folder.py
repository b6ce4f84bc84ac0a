"""The folder of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable

from .. import distributed
from ..config import RunConfig, UserError
from ..utils import files
from . import logger

LOCK = ".lock"


def run_folder(config: RunConfig, default_name: str) -> str:
    """Where everything is written: --out_dir, else OPENAI_LOGDIR, else ./runs/<default_name>."""
    return config.out_dir or os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", default_name)


def _formats() -> list[str] | None:
    """The outputs of the log; None for those that the logger chooses."""
    chosen = distributed.get_rank() > 0 or "OPENAI_LOG_FORMAT" in os.environ
    return None if chosen else ["line", "log", "csv", "jsonl"]


def open_run(config: RunConfig, default_name: str) -> str:
    """Join the other ranks and log into the run's folder.

    Returns the folder's absolute path, which is logged, as are the ranks. Collective.
    """
    distributed.join_ranks(config)
    logger.configure(dir=run_folder(config, default_name), format_strs=_formats())
    logger.log(distributed.describe_ranks())
    return logger.get_dir()


class RunFolder:
    """The folder of a run whose inputs are checked first: a mistake leaves no folder behind.

    Until `open`, nothing is written; messages are printed, and kept for the log. Collective.
    """

    def __init__(self, config: RunConfig, default_name: str):
        distributed.join_ranks(config)
        self.path = os.path.abspath(os.path.expanduser(run_folder(config, default_name)))
        _check_place(self.path)
        self.held = logger.hold(self.path, _formats())
        logger.log(distributed.describe_ranks())

    def open(self) -> None:
        """Make the folder, and log into it from now on."""
        logger.configure(self.path, _formats(), held=self.held)


def _check_place(folder: str) -> None:
    """Raise UserError where the folder cannot be made, or not be written into."""
    place = folder
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"cannot make the folder {folder}: {place} is not a folder: choose another --out_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {place}: permission denied: choose another --out_dir")


class Claims:
    """A with statement in which folders are this process's alone."""

    def __init__(self) -> None:
        self.held: dict[str, files.Claim] = {}
        self.locks: dict[str, int | None] = {}  # the lock files' inodes

    def claim(self, folders: Iterable[str], make: bool = True) -> None:
        """Claim folders, and remove what killed writers have left in them. Without `make` only those that exist."""
        for folder in folders:
            if folder not in self.held and (make or files.is_dir(folder)):
                self._claim(folder)
                files.remove_leftovers(folder)

    def _claim(self, folder: str) -> None:
        files.make_dirs(folder)
        self.held[folder] = files.lock(folder, LOCK)
        self.locks[folder] = _inode(folder)

    def renew(self) -> list[str]:
        """Make and claim again the folders that were removed, which are returned.

        Raises UserError where another run has taken one.
        """
        gone = [folder for folder, inode in self.locks.items() if inode is not None and _inode(folder) != inode]
        for folder in gone:
            self.held[folder].release()
            self._claim(folder)
        return gone

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exc: object) -> None:
        for claim in self.held.values():
            claim.release()


def _inode(folder: str) -> int | None:
    """That of the folder's lock file, which tells one that was made anew; None without such a file."""
    try:
        return os.stat(os.path.join(folder, LOCK)).st_ino
    except OSError:
        return None
