"""Which checkpoint a run goes on from."""

from __future__ import annotations

import argparse
import json

from ..checkpoints import checkpoint, sets
from ..config import UserError, comma_list
from ..logs import logger
from ..utils import files
from .loop import get_blob_logdir


def _find_resume(options: argparse.Namespace) -> str:
    """The modelNNNNNN.pt to go on from, "" to start afresh."""
    wanted = options.resume or options.resume_checkpoint
    folder = get_blob_logdir()
    if not wanted:
        if _holds_a_run(folder) and not options.dry_run:
            raise UserError(
                f"{folder} holds checkpoints of an earlier run: give --resume auto to go on, or another --out_dir"
            )
        return ""
    if wanted == "auto":
        return _newest(options, folder) or _none_to_resume(options, folder)
    if files.is_dir(wanted):
        newest = _newest(options, wanted)
        if not newest:
            raise UserError(
                f"--resume {wanted}: no complete checkpoint (model, ema and opt files of one step) in that folder"
            )
        return newest
    step = sets.step_of(wanted)
    if step is None:
        raise UserError(
            f"--resume {wanted}: name a modelNNNNNN.pt or another file of its set (ema_*, opt), or a folder; to start "
            "at step 0 from the weights of any other file, use --init_checkpoint"
        )
    folder = wanted.replace("\\", "/").rpartition("/")[0] or "."
    problem = sets.problem_of(folder, step)
    if problem:
        raise UserError(f"--resume {wanted}: {problem}; --resume {folder} takes the newest checkpoint that is whole")
    return files.join(folder, checkpoint.model_name(step))


def _newest(options: argparse.Namespace, folder: str) -> str:
    """The model's file of the newest whole set in a folder, "" where there is none."""
    step = sets.newest_whole_set(folder, _wanted_labels(options, folder), logger.warn)
    return "" if step is None else files.join(folder, checkpoint.model_name(step))


def _none_to_resume(options: argparse.Namespace, folder: str) -> str:
    """Start afresh, unless that would overwrite the rest of a run."""
    if _holds_a_run(folder):
        newest = checkpoint.model_name(checkpoint.model_steps(folder)[-1])
        parts = ", ".join(["model", *(f"ema_{label}" for label in _wanted_labels(options, folder)), "opt", "manifest"])
        raise UserError(
            f"--resume auto: {folder} holds {newest}, but of no step all of {parts}, whole: bring the missing files "
            "back or choose another --out_dir; to start at step 0 from weights alone, use --init_checkpoint"
        )
    logger.log(f"--resume auto: no complete checkpoint in {folder}, so training starts at step 0")
    return ""


def _holds_a_run(folder: str) -> bool:
    """Whether a new run would overwrite another's checkpoints; what a first save left that was cut off does not."""
    return any(checkpoint.model_steps(folder)) or bool(sets.complete_sets(folder, []))


def _ema_labels(rates: str, widths: str) -> list[str]:
    return [*map(str, comma_list(rates, float)), *(f"sigma_rel{width}" for width in comma_list(widths, float))]


def _wanted_labels(options: argparse.Namespace, folder: str) -> list[str]:
    """The labels of the averages to resume: as given, else those that the run which wrote into the folder keeps."""
    path = files.join(folder, sets.CONFIG_FILE)
    if {"ema_rate", "ema_sigma_rel"} & options.given:
        return _ema_labels(options.ema_rate, options.ema_sigma_rel)
    if not files.exists(path):
        return []
    try:
        config = json.loads(files.read_bytes(path))["config"]
        return _ema_labels(config["ema_rate"], config.get("ema_sigma_rel", ""))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it, or name the checkpoint with --resume PATH") from None
