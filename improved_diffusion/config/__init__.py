"""Every option of every command, written once: name, type, default, help, choices.

From the fields of these dataclasses come the flags, `--help`, the JSON inside each checkpoint and the factories'
arguments. Standard library only.
"""

from .base import (
    NUM_CLASSES,
    Config,
    UserError,
    comma_list,
    extra,
    from_dict,
    height_width,
    option,
    parse_size,
    str2bool,
    unknown_name,
)
from .model import DiffusionConfig, ModelConfig, SuperResConfig, fixed_names
from .run import RunConfig
from .sampling import BaseSamplesConfig, NLLConfig, SampleConfig
from .training import (
    LR_SCHEDULES,
    MAX_SIGMA_REL,
    PRECISIONS,
    TRACKERS,
    DataConfig,
    PosthocConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
)

__all__ = [
    "LR_SCHEDULES", "MAX_SIGMA_REL", "NUM_CLASSES", "PRECISIONS", "TRACKERS", "BaseSamplesConfig", "Config",
    "DataConfig", "DiffusionConfig", "ModelConfig", "NLLConfig", "PosthocConfig", "RunConfig", "SampleConfig",
    "SourceConfig", "SuperResConfig", "TrainConfig", "UserError", "WatchConfig", "comma_list", "extra", "fixed_names",
    "from_dict", "height_width", "option", "parse_size", "str2bool", "unknown_name",
]  # fmt: skip
