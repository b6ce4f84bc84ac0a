"""The folder of a run."""

from __future__ import annotations

import os

from .. import distributed
from ..config import RunConfig
from . import logger


def run_folder(config: RunConfig, default_name: str) -> str:
    """Where everything is written: --out_dir, else OPENAI_LOGDIR, else ./runs/<default_name>."""
    return config.out_dir or os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", default_name)


def _formats(print_only: bool) -> list[str] | None:
    """The outputs of the log; None for those that the logger chooses."""
    if distributed.get_rank() > 0:
        return [] if print_only else None
    if print_only:
        return ["line"]
    return None if "OPENAI_LOG_FORMAT" in os.environ else ["line", "log", "csv", "jsonl"]


def open_run(config: RunConfig, default_name: str, *, print_only: bool = False) -> str:
    """Join the other ranks and log into the run's folder.

    Returns the folder's absolute path, which is logged, as are the ranks. Collective.
    :param print_only: write no log files.
    """
    distributed.join_ranks(config)
    logger.configure(dir=run_folder(config, default_name), format_strs=_formats(print_only))
    logger.log(distributed.describe_ranks())
    return logger.get_dir()
