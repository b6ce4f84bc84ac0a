"""The folder of a run."""

from __future__ import annotations

import os

from .. import distributed
from ..config import RunConfig
from . import logger


def run_folder(config: RunConfig, default_name: str) -> str:
    """Where everything is written: --out_dir, else OPENAI_LOGDIR, else ./runs/<default_name>."""
    return config.out_dir or os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", default_name)


def open_run(config: RunConfig, default_name: str, *, print_only: bool = False) -> str:
    """Join the other ranks and log into the run's folder.

    Returns the folder's absolute path, which is logged, as are the ranks. Collective.
    :param print_only: write no log files.
    """
    distributed.join_ranks(config)
    formats = ["stdout"] if distributed.get_rank() == 0 else []
    logger.configure(dir=run_folder(config, default_name), format_strs=formats if print_only else None)
    logger.log(distributed.describe_ranks())
    return logger.get_dir()
