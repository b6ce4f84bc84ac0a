"""Every option of every command, written once: name, type, default, help, choices.

From the fields of these dataclasses come the flags, `--help`, the JSON inside each checkpoint and the factories'
arguments. Standard library only.
"""

from .base import (
    NUM_CLASSES,
    PRECISIONS,
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
from .editing import (
    CopiesConfig,
    EditConfig,
    ImagesConfig,
    InpaintConfig,
    InterpolateConfig,
    LatentsConfig,
    VariationsConfig,
)
from .evaluation import CompareConfig, FeaturesConfig, JudgedConfig, ReferenceConfig, SweepConfig
from .model import (
    ClassifierConfig,
    DiffusionConfig,
    GuidedModelConfig,
    ModelConfig,
    ProcessConfig,
    SuperResConfig,
    fixed_names,
)
from .run import RunConfig
from .sampling import SAMPLERS, BaseSamplesConfig, GuidanceConfig, NLLConfig, SampleConfig, SamplerConfig
from .training import (
    LR_SCHEDULES,
    MAX_SIGMA_REL,
    TRACKERS,
    DataConfig,
    PosthocConfig,
    ProgressConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
)

__all__ = [
    "LR_SCHEDULES",
    "MAX_SIGMA_REL",
    "NUM_CLASSES",
    "PRECISIONS",
    "SAMPLERS",
    "TRACKERS",
    "BaseSamplesConfig",
    "ClassifierConfig",
    "CompareConfig",
    "Config",
    "CopiesConfig",
    "DataConfig",
    "DiffusionConfig",
    "EditConfig",
    "FeaturesConfig",
    "GuidanceConfig",
    "GuidedModelConfig",
    "ImagesConfig",
    "InpaintConfig",
    "InterpolateConfig",
    "JudgedConfig",
    "LatentsConfig",
    "ModelConfig",
    "NLLConfig",
    "PosthocConfig",
    "ProcessConfig",
    "ProgressConfig",
    "ReferenceConfig",
    "RunConfig",
    "SampleConfig",
    "SamplerConfig",
    "SourceConfig",
    "SuperResConfig",
    "SweepConfig",
    "TrainConfig",
    "UserError",
    "VariationsConfig",
    "WatchConfig",
    "comma_list",
    "extra",
    "fixed_names",
    "from_dict",
    "height_width",
    "option",
    "parse_size",
    "str2bool",
    "unknown_name",
]  # fmt: skip
