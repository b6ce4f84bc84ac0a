"""Every option of every command, written once: name, type, default, help, choices.

From the fields of these dataclasses come the flags, `--help`, the JSON inside each checkpoint and the factories'
arguments. Standard library only, but for the names of colours.
"""

from .base import AUTO_PRECISION, NUM_CLASSES, PRECISIONS, Config, checked_value, from_dict
from .editing import (
    CopiesConfig,
    EditConfig,
    ImagesConfig,
    InpaintConfig,
    InterpolateConfig,
    LatentsConfig,
    VariationsConfig,
)
from .evaluation import SWEEP_OPTIONS, CompareConfig, EvaluationConfig, FeaturesConfig, ReferenceConfig, SweepConfig
from .messages import UNSEEN, UserError, nearest, one_line, shorten, shown, unknown_name
from .model import (
    KINDS,
    ClassifierConfig,
    DiffusionConfig,
    EncoderConfig,
    GuidedModelConfig,
    ModelConfig,
    NetworkConfig,
    ProcessConfig,
    SuperResModelConfig,
    UNetConfig,
    fixed_names,
)
from .reading import MAX_IMAGE_PIXELS, RESIZE_MODES, ReadingConfig
from .run import RunConfig
from .sampling import SAMPLERS, BaseSamplesConfig, GuidanceConfig, NLLConfig, SampleConfig, SamplerConfig
from .speed import SpeedConfig, TrainSpeedConfig
from .training import (
    LR_SCHEDULES,
    TRACKERS,
    DataConfig,
    PosthocConfig,
    ProgressConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
)
from .values import comma_list, height_width, number_list, parse_size, path_argument, repeated, str2bool, whole_number

__all__ = [
    "AUTO_PRECISION",
    "KINDS",
    "LR_SCHEDULES",
    "MAX_IMAGE_PIXELS",
    "NUM_CLASSES",
    "PRECISIONS",
    "RESIZE_MODES",
    "SAMPLERS",
    "SWEEP_OPTIONS",
    "TRACKERS",
    "UNSEEN",
    "BaseSamplesConfig",
    "ClassifierConfig",
    "CompareConfig",
    "Config",
    "CopiesConfig",
    "DataConfig",
    "DiffusionConfig",
    "EditConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "FeaturesConfig",
    "GuidanceConfig",
    "GuidedModelConfig",
    "ImagesConfig",
    "InpaintConfig",
    "InterpolateConfig",
    "LatentsConfig",
    "ModelConfig",
    "NLLConfig",
    "NetworkConfig",
    "PosthocConfig",
    "ProcessConfig",
    "ProgressConfig",
    "ReadingConfig",
    "ReferenceConfig",
    "RunConfig",
    "SampleConfig",
    "SamplerConfig",
    "SourceConfig",
    "SpeedConfig",
    "SuperResModelConfig",
    "SweepConfig",
    "TrainConfig",
    "TrainSpeedConfig",
    "UNetConfig",
    "UserError",
    "VariationsConfig",
    "WatchConfig",
    "checked_value",
    "comma_list",
    "fixed_names",
    "from_dict",
    "height_width",
    "nearest",
    "number_list",
    "one_line",
    "parse_size",
    "path_argument",
    "repeated",
    "shorten",
    "shown",
    "str2bool",
    "unknown_name",
    "whole_number",
]  # fmt: skip
