"""The training loop under its published name; its code is in `training.loop` and the modules that it names."""

from . import dist_util, logger
from .fp16_util import (
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)
from .nn import update_ema
from .resample import LossAwareSampler, UniformSampler
from .training.loop import (
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from .training.precision import INITIAL_LOG_LOSS_SCALE

__all__ = [
    "INITIAL_LOG_LOSS_SCALE", "LossAwareSampler", "TrainLoop", "UniformSampler", "dist_util",
    "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict", "logger", "make_master_params",
    "master_params_to_model_params", "model_grads_to_master_grads", "parse_resume_step_from_filename",
    "unflatten_master_params", "update_ema", "zero_grad",
]  # fmt: skip
