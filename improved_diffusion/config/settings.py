"""The options of a whole command: several groups, held together and found by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_type_hints

from .base import Config
from .distillation import DistillConfig, DistillTrainConfig, DistillWatchConfig
from .editing import (
    CopiesConfig,
    EditConfig,
    ImagesConfig,
    InpaintConfig,
    InterpolateConfig,
    LatentsConfig,
    VariationsConfig,
)
from .evaluation import (
    CompareConfig,
    EvaluationConfig,
    FeaturesConfig,
    LossFloorConfig,
    ReferenceConfig,
    SweepConfig,
)
from .exchange import ConvertConfig, ExportConfig, PushCommandConfig
from .messages import UserError, shorten, unknown_name
from .model import (
    ClassifierConfig,
    DiffusionConfig,
    GuidedModelConfig,
    ModelConfig,
    ProcessConfig,
    SizesConfig,
    SuperResModelConfig,
)
from .reading import ReadingConfig
from .run import RunConfig
from .sampling import (
    BaseSamplesConfig,
    ClassifierGuidanceConfig,
    GuidanceConfig,
    NLLConfig,
    SampleConfig,
    SamplerConfig,
)
from .service import EngineConfig, ServeConfig, WebConfig
from .speed import TrainSpeedConfig
from .training import (
    ClassifierTrainConfig,
    DataConfig,
    PosthocConfig,
    ProgressConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
)
from .values import path_of, paths_of

S = TypeVar("S", bound="Settings")

# What other programs, and other commands of this one, call an option.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "output_dir": "out_dir",
    "output": "out_dir",
    "train_data_dir": "data_dir",
    "dataset": "data_dir",
    "epochs": "max_steps",
    "num_epochs": "max_steps",
    "num_steps": "steps",
    "to": "steps",
    "class": "classes",
    "resolution": "image_size",
    "checkpoint": "model_path",
    "teacher": "model_path",
    "model_path": "teacher",
}


def unknown_option(what: str, word: str, known: Iterable[str]) -> UserError:
    """The error for an option that a command does not have: it names the one that is meant, or the commands
    that have it.

    :param what: it is, for the message, :param word: as the user wrote it, perhaps with dashes.
    """
    known, name = list(known), word.removeprefix("--")
    dashes = word[: len(word) - len(name)]
    if _OTHER_NAMES.get(name) in known:
        return UserError(f"unknown {what} {shorten(word)!r}: did you mean {dashes}{_OTHER_NAMES[name]}?")
    others = commands_with(name)
    hint = f"it is an option of {', '.join(others)}, not of this command" if others else "--help-all lists all options"
    return unknown_name(what, word, [f"{dashes}{option}" for option in known], hint)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The groups of options of one command: each field is a Config. Never changed: `replace` gives a new object."""

    # Flags in guided-diffusion's command lines that are accepted and change nothing, each with the reason.
    unused: ClassVar[Mapping[str, str]] = {}
    # Options that presets leave as they are.
    not_from_presets: ClassVar[frozenset[str]] = frozenset()
    # What --help shows in place of the default of an option that has another one in this command.
    shown_defaults: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @cache
    def groups(cls) -> Mapping[str, type[Config]]:
        """The config class of each group, by the group's name."""
        hints = get_type_hints(cls)
        return MappingProxyType({f.name: hints[f.name] for f in fields(cls)})

    @classmethod
    @cache
    def options(cls) -> Mapping[str, Field]:
        """Each option, by its name."""
        return MappingProxyType({f.name: f for group in cls.groups().values() for f in fields(group)})

    @classmethod
    def of(cls: type[S], options: Mapping[str, Any]) -> S:
        """Settings with these options, given by name, and defaults for the rest.

        Raises UserError for an unknown name, naming the nearest one, and for a value that cannot work.
        """
        for name in options.keys() - cls.options().keys():
            raise unknown_option("option", name, cls.options())
        return cls(**{
            group: config(**{f.name: options[f.name] for f in fields(config) if f.name in options})
            for group, config in cls.groups().items()
        })  # fmt: skip

    def values(self) -> dict[str, Any]:
        """The value of each option, by its name."""
        return {f.name: getattr(config, f.name) for config in self._configs().values() for f in fields(config)}

    def replace(self: S, **options: Any) -> S:
        """A copy in which these options have other values, in every group that has them."""
        for name in options.keys() - self.options().keys():
            raise unknown_option("option", name, self.options())
        changed = {}
        for group, config in self._configs().items():
            mine = {f.name: options[f.name] for f in fields(config) if f.name in options}
            if mine:
                changed[group] = replace(config, **mine)
        return replace(self, **changed)

    def _configs(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def merge_options(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of all sources; the later ones win.

    The batch size and its total over the ranks are two ways to say one thing: the stronger source's counts.
    """
    given: dict[str, Any] = {}
    for number, source in enumerate(sources):
        if {"batch_size", "total_batch_size"} <= source.keys() and number < len(sources) - 1:
            source = {name: value for name, value in source.items() if name != "batch_size"}  # a run's own config.json
        for name, other in (("batch_size", "total_batch_size"), ("total_batch_size", "batch_size")):
            if name in source:
                given.pop(other, None)
        given |= source
    return given


# Models


@dataclass(frozen=True, kw_only=True)
class ImageModel(Settings):
    """An image model, and how it takes images."""

    model: ModelConfig
    diffusion: DiffusionConfig
    reading: ReadingConfig


@dataclass(frozen=True, kw_only=True)
class SuperResModel(Settings):
    """A super-resolution model, and how it takes images."""

    model: SuperResModelConfig
    diffusion: DiffusionConfig
    reading: ReadingConfig


# Training


@dataclass(frozen=True, kw_only=True)
class ImageTraining(Settings):
    """Training an image model."""

    data: DataConfig
    reading: ReadingConfig
    train: TrainConfig
    speed: TrainSpeedConfig
    watch: WatchConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class SuperResTraining(Settings):
    """Training a super-resolution model."""

    data: DataConfig
    reading: ReadingConfig
    train: TrainConfig
    speed: TrainSpeedConfig
    watch: WatchConfig
    model: SuperResModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining(Settings):
    """Training a classifier of noisy images."""

    unused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("learn_sigma", "predict_xstart", "rescale_learned_sigmas", "timestep_respacing", "use_kl"),
        "a classifier predicts no noise and draws no images",
    )

    data: DataConfig
    reading: ReadingConfig
    train: ClassifierTrainConfig
    speed: TrainSpeedConfig
    watch: ProgressConfig
    guided: GuidedModelConfig
    model: ClassifierConfig
    diffusion: ProcessConfig
    run: RunConfig


# What a student's training takes from its teacher's, unless told otherwise, besides the model and how images are read.
TAKEN_FROM_TEACHER = ("labels", "random_flip", "total_batch_size")
_OF_THE_TEACHER = {
    f.name for group in (ModelConfig, SizesConfig, DiffusionConfig, ReadingConfig) for f in fields(group)
} - {"timestep_respacing"} | {"batch_size", *TAKEN_FROM_TEACHER}  # fmt: skip
# A preset describes the teacher, and how that was trained.
_OF_THE_STUDENT = frozenset(f.name for f in fields(TrainConfig)) - {"total_batch_size"}


@dataclass(frozen=True, kw_only=True)
class Distilling(Settings):
    """Distilling a model of any kind: the teacher decides which of the two that follow it is."""

    not_from_presets: ClassVar[frozenset[str]] = _OF_THE_STUDENT
    shown_defaults: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_OF_THE_TEACHER, "the teacher's"), "optimizer": "radam, or adamw with --method progressive"
    }  # fmt: skip

    distill: DistillConfig
    data: DataConfig
    reading: ReadingConfig
    train: DistillTrainConfig
    speed: TrainSpeedConfig
    watch: DistillWatchConfig
    model: ModelConfig
    sizes: SizesConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class ImageDistillation(ImageTraining):
    """Distilling an image model."""

    not_from_presets: ClassVar[frozenset[str]] = _OF_THE_STUDENT

    distill: DistillConfig
    train: DistillTrainConfig
    watch: DistillWatchConfig


@dataclass(frozen=True, kw_only=True)
class SuperResDistillation(SuperResTraining):
    """Distilling a super-resolution model."""

    not_from_presets: ClassVar[frozenset[str]] = _OF_THE_STUDENT

    distill: DistillConfig
    train: DistillTrainConfig
    watch: DistillWatchConfig


Training = ImageTraining | SuperResTraining | ClassifierTraining


@dataclass(frozen=True, kw_only=True)
class PosthocEMA(Settings):
    """Averages made after training."""

    posthoc: PosthocConfig


@dataclass(frozen=True, kw_only=True)
class Exporting(Settings):
    """Writing a model of any kind in another program's format."""

    unused: ClassVar[Mapping[str, str]] = {"use_fp16": "weights are written in float32"}

    export: ExportConfig
    model: ModelConfig
    sizes: SizesConfig
    diffusion: DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class Converting(Settings):
    """Writing the weights in another program's checkpoint to a plain file."""

    convert: ConvertConfig


@dataclass(frozen=True, kw_only=True)
class Pushing(Settings):
    """Uploading a model of any kind to the Hugging Face Hub."""

    push: PushCommandConfig
    model: ModelConfig
    sizes: SizesConfig
    diffusion: DiffusionConfig


# Sampling


@dataclass(frozen=True, kw_only=True)
class ImageSampling(Settings):
    """Sampling from an image model."""

    sample: SampleConfig
    sampler: SamplerConfig
    guidance: GuidanceConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierSampling(ImageSampling):
    """Sampling as guided-diffusion's classifier_sample.py does."""

    guidance: ClassifierGuidanceConfig


@dataclass(frozen=True, kw_only=True)
class SuperResSampling(Settings):
    """Sampling from a super-resolution model."""

    base: BaseSamplesConfig
    reading: ReadingConfig
    sample: SampleConfig
    sampler: SamplerConfig
    guidance: GuidanceConfig
    model: SuperResModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


# Editing


@dataclass(frozen=True, kw_only=True)
class Editing(Settings):
    """What all editing commands have."""

    edit: EditConfig
    sampler: SamplerConfig
    guidance: GuidanceConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Encoding(Editing):
    """Finding the noise of images."""

    images: ImagesConfig
    reading: ReadingConfig


@dataclass(frozen=True, kw_only=True)
class Decoding(Editing):
    """Turning encoded noise back into images."""

    latents: LatentsConfig
    copies: CopiesConfig


@dataclass(frozen=True, kw_only=True)
class Interpolation(Editing):
    """Images between two."""

    images: ImagesConfig
    reading: ReadingConfig
    interpolate: InterpolateConfig


@dataclass(frozen=True, kw_only=True)
class Inpainting(Editing):
    """Painting parts of images."""

    images: ImagesConfig
    reading: ReadingConfig
    inpaint: InpaintConfig
    copies: CopiesConfig


@dataclass(frozen=True, kw_only=True)
class Variations(Editing):
    """Variations of images."""

    images: ImagesConfig
    reading: ReadingConfig
    variations: VariationsConfig
    copies: CopiesConfig


# Evaluation


@dataclass(frozen=True, kw_only=True)
class Likelihood(Settings):
    """Evaluating the variational bound."""

    nll: NLLConfig
    source: SourceConfig
    reading: ReadingConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class LossFloor(Settings):
    """The floor of the loss on a set of images, and a model's loss beside it."""

    floor: LossFloorConfig
    source: SourceConfig
    reading: ReadingConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Scoring(Settings):
    """Evaluating samples, given or drawn."""

    evaluation: EvaluationConfig
    features: FeaturesConfig
    reading: ReadingConfig
    sample: SampleConfig
    sampler: SamplerConfig
    guidance: GuidanceConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Sweeping(Scoring):
    """Evaluating a model under several settings."""

    sweep: SweepConfig


@dataclass(frozen=True, kw_only=True)
class FeatureExtraction(Settings):
    """Computing the features of images."""

    features: FeaturesConfig
    reading: ReadingConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceStatistics(Settings):
    """Writing the statistics of real images."""

    reference: ReferenceConfig
    features: FeaturesConfig
    reading: ReadingConfig


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """Reports side by side."""

    compare: CompareConfig


# Doors


@dataclass(frozen=True, kw_only=True)
class Serving(Settings):
    """The HTTP service."""

    serve: ServeConfig
    engine: EngineConfig


@dataclass(frozen=True, kw_only=True)
class WebPage(Settings):
    """The web page."""

    web: WebConfig
    engine: EngineConfig


# The settings of each command, by the command's name.
_COMMANDS: dict[str, tuple[type[Settings], ...]] = {
    "train": (ImageTraining,),
    "sample": (ImageSampling,),
    "edit": (Encoding, Decoding, Interpolation, Inpainting, Variations),
    "nll": (Likelihood,),
    "loss-floor": (LossFloor,),
    "evaluate": (Scoring, Sweeping, ReferenceStatistics, Comparison),
    "super-res-train": (SuperResTraining,),
    "super-res-sample": (SuperResSampling,),
    "classifier-train": (ClassifierTraining,),
    "distill": (Distilling,),
    "posthoc-ema": (PosthocEMA,),
    "export": (Exporting,),
    "convert": (Converting,),
    "push": (Pushing,),
    "serve": (Serving,),
    "web": (WebPage,),
}


def commands_with(option: str) -> list[str]:
    """The commands that have an option of this name."""
    return [name for name, kinds in _COMMANDS.items() if any(option in kind.options() for kind in kinds)]


def path_options() -> set[str]:
    """The options of all commands whose values are paths."""
    options = (option for kinds in _COMMANDS.values() for kind in kinds for option in kind.options().items())
    return {name for name, f in options if f.metadata["parse"] in (path_of, paths_of)}
