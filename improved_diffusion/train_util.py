"""The training loop under its published name; its code is in `training.loop`."""

from .training.loop import (
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)

__all__ = [
    "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict",
    "parse_resume_step_from_filename",
]  # fmt: skip
