"""Which checkpoint a run continues from."""

from __future__ import annotations

import os

from ..checkpoints import checkpoint, diffusers_folder, sets
from ..config import TrainConfig, UserError
from ..logs import logger
from ..utils import files
from .loop import get_blob_logdir


def find_resume(config: TrainConfig, given: frozenset[str]) -> str:
    """The model file to continue from, "" to start at step 0.

    :param given: the options that the user gave.
    Raises UserError where --resume names no complete checkpoint, and where a new run would overwrite an earlier one.
    """
    folder = get_blob_logdir()
    labels = _WantedLabels(config, given)
    if config.resume == "auto":
        return _newest(folder, labels) or _none_to_resume(folder, labels)
    found = ""
    if config.resume:
        found = _find_named(config.resume, labels)
    elif config.resume_checkpoint:
        found = _find_published(config.resume_checkpoint)
    continues = bool(found) and files.same(files.folder_of(found), folder)
    if not continues and _holds_a_run(folder) and not config.dry_run:
        raise UserError(
            f"{folder} holds checkpoints of an earlier run: give --resume auto to continue it, or another --out_dir"
        )
    return found


def folder_of_run(config: TrainConfig) -> str:
    """The folder of the run that is resumed, where it continues unless told otherwise; "" for the usual folder.

    That is one that we have written, on a local disk.
    """
    path = config.resume or config.resume_checkpoint
    if path in ("", "auto") or files.is_url(path) or {"OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"} & os.environ.keys():
        return ""
    folder = path if files.is_dir(path) else files.folder_of(path)
    is_run = files.exists(files.join(folder, sets.CONFIG_FILE)) and not diffusers_folder.is_folder(folder)
    return folder if is_run else ""


def _find_named(wanted: str, labels: _WantedLabels) -> str:
    """--resume PATH: a folder, or one of the files of a complete set."""
    if files.is_dir(wanted):
        _refuse_pipeline("--resume", wanted)
        newest = _newest(wanted, labels)
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
    folder = files.folder_of(wanted)
    problem = sets.problem_of(folder, step)
    if problem:
        raise UserError(f"--resume {wanted}: {problem}; --resume {folder} takes the newest complete checkpoint")
    return files.join(folder, checkpoint.model_name(step))


def _find_published(wanted: str) -> str:
    """--resume_checkpoint PATH: as published, weights alone will do. A set that has changed since is refused."""
    if not files.exists(wanted):
        raise UserError(f"--resume_checkpoint {wanted} does not exist")
    if files.is_dir(wanted):
        _refuse_pipeline("--resume_checkpoint", wanted)
        raise UserError(f"--resume_checkpoint {wanted} is a folder: --resume {wanted} takes its newest checkpoint")
    step, folder = sets.step_of(wanted), files.folder_of(wanted)
    problem = None if step is None else sets.problem_of(folder, step)
    if problem:
        raise UserError(
            f"--resume_checkpoint {wanted}: {problem}; --resume {folder} takes the newest complete checkpoint"
        )
    if step is not None and not files.same(wanted, model := files.join(folder, checkpoint.model_name(step))):
        # The published code tells steps by model files' names alone: another file would start at step 0 unnoticed.
        raise UserError(
            f"--resume_checkpoint {wanted} is not a model's file: give {model} to continue, or use "
            "--init_checkpoint to start at step 0 from these weights"
        )
    return wanted


def _refuse_pipeline(flag: str, folder: str) -> None:
    if diffusers_folder.is_folder(folder):
        raise UserError(
            f"{flag} {folder} is a model of diffusers, which holds no training to resume: --init_checkpoint {folder} "
            "starts at step 0 from its weights"
        )


def _newest(folder: str, labels: _WantedLabels) -> str:
    """The model's file of the newest complete set in a folder, "" where there is none."""
    step = sets.newest_whole_set(folder, labels.of(folder), logger.warn)
    return "" if step is None else files.join(folder, checkpoint.model_name(step))


def _none_to_resume(folder: str, labels: _WantedLabels) -> str:
    """Start afresh, unless that would overwrite the rest of a run."""
    if _holds_a_run(folder):
        newest = checkpoint.model_name(checkpoint.model_steps(folder)[-1])
        parts = ", ".join(["model", *(f"ema_{label}" for label in labels.of(folder)), "opt", "manifest"])
        raise UserError(
            f"--resume auto: {folder} holds {newest} but no complete checkpoint: every step lacks one of {parts}. "
            "Restore the missing files or choose another --out_dir; to start at step 0 from weights alone, use "
            "--init_checkpoint"
        )
    logger.log(f"--resume auto: no complete checkpoint in {folder}, so training starts at step 0")
    return ""


def _holds_a_run(folder: str) -> bool:
    """Whether a new run would overwrite another's checkpoints; what a first save left that was cut off does not."""
    return any(checkpoint.model_steps(folder)) or bool(sets.complete_sets(folder, []))


class _WantedLabels:
    """The labels of the averages to resume: those given, else those of the run that wrote the folder."""

    def __init__(self, config: TrainConfig, given: frozenset[str]):
        self.config = config
        self.given = bool({"ema_rate", "ema_sigma_rel"} & given)

    def of(self, folder: str) -> list[str]:
        """For the checkpoints in a folder. Raises UserError where its description is damaged."""
        if self.given:
            return sets.ema_labels(self.config.ema_rate, self.config.ema_sigma_rel)
        return sets.labels_of_run(folder)
