"""Checkpoints to models: the options that a model was trained with come from its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch as th

from .. import distributed
from ..config import (
    KINDS,
    NUM_CLASSES,
    ClassifierConfig,
    Config,
    DiffusionConfig,
    EncoderConfig,
    ModelConfig,
    NetworkConfig,
    ProcessConfig,
    ReadingConfig,
    SuperResModelConfig,
    UserError,
    fixed_names,
    height_width,
)
from ..config.messages import naming
from ..config.presets import presets_like
from ..config.settings import ImageModel, Settings, SuperResModel
from ..logs import logger
from ..models.architecture import is_encoder, read_architecture, read_encoder
from ..models.build import build_classifier, build_model, build_model_and_diffusion
from ..models.factories import attention_factors
from ..respace import SpacedDiffusion
from ..unet import EncoderUNetModel, count_heads
from ..utils import files, hub
from ..utils.outline import outline
from . import checkpoint, diffusers_folder, hub_model, sets
from .averages import warn_of_initial_weights
from .dialects import refuse_foreign

S = TypeVar("S", bound=Settings)
Found = tuple[str, dict[str, th.Tensor], dict[str, Any]]  # file, state dict, description

MODEL_OPTIONS = [
    f.name for group in (ModelConfig, SuperResModelConfig, ClassifierConfig, DiffusionConfig) for f in fields(group)
]
READING_OPTIONS = [f.name for f in fields(ReadingConfig)]  # images are read as in training unless told otherwise


@dataclass(frozen=True)
class LoadedModel(Generic[S]):
    """A model from a checkpoint.

    :param settings: the command's, with the options that the model was trained with.
    :param given: the options that the user gave.
    :param model: in eval mode, on the CPU.
    :param metadata: what the checkpoint says of itself; {} for a published one.
    """

    path: str
    settings: S
    given: frozenset[str]
    model: th.nn.Module
    diffusion: SpacedDiffusion
    metadata: Mapping[str, Any]

    def description(self) -> dict[str, Any]:
        """What a file of this model says of itself."""
        config = {**self.settings.values(), **self.metadata.get("config", {})}
        return {**self.metadata, "config": config}


def load_model(
    settings: S, given: Iterable[str], path: str, *, warn: bool = True, found: Found | None = None
) -> LoadedModel[S]:
    """The model of a checkpoint. What training fixed need not be given. Collective.

    :param settings: a command's, with groups `model` and `diffusion`.
    :param given: the options that the user gave.
    :param warn: of an average that is still the initial weights in part.
    :param found: what `read` gave for the path, where that is known.
    Raises UserError for an option that contradicts the checkpoint, and for a file that is not a checkpoint.
    """
    path, state_dict, metadata = found or read(path)
    settings = take_options(settings, given, path, state_dict, metadata, [*MODEL_OPTIONS, *READING_OPTIONS])
    with naming(path):
        model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)  # type: ignore[attr-defined]
    checkpoint.load_into(model, state_dict, path)
    if warn:
        warn_of_initial_weights(path, metadata)
    settings = with_own_steps(settings, metadata)
    return LoadedModel(path, settings, frozenset(given), model.eval(), diffusion, metadata)


def with_own_steps(settings: S, metadata: Mapping[str, Any]) -> S:
    """The settings with the sampler, the steps and their grid that a distilled model is for, where they name none.

    :param metadata: what the model's file says of itself.
    """
    values, student = settings.values(), metadata.get("distilled")
    if not student or "sampler" not in values:
        return settings
    name = "ddim" if values["use_ddim"] else values["sampler"]
    if name not in ("auto", student["sampler"]):
        return settings
    own, grid = {"sampler": student["sampler"]}, values["timestep_grid"]
    if grid == "auto":
        grid = student.get("timestep_grid", grid)
    if not values["timestep_respacing"] and grid.isalpha():  # the name of a grid, not a list of its levels
        own |= {"timestep_grid": grid, "steps": values["steps"] or student["steps"]}
    return settings.replace(**own)


def read(path: str, flag: str = "--model_path", classifier: bool = False) -> Found:
    """(file, state dict, description) of a checkpoint; of a folder, the newest moving average in it. Collective.

    :param classifier: of several networks in a file, prefer a classifier to a U-Net.
    Raises UserError where there is none, for a file that is not a checkpoint, and for another program's network.
    """
    if not path:
        raise UserError(f"{flag} is missing: name a run's folder, or a checkpoint such as ema_0.9999_010000.pt")
    found = distributed.from_rank0(find_file, path, None, flag)
    if found != path:
        logger.log(f"{flag} {path}: loading {found}")
    state_dict, metadata = checkpoint.load(found, classifier=classifier)
    if not metadata:
        refuse_foreign(state_dict, found)
    return found, state_dict, metadata


def find_file(path: str, average: str | float | None = None, flag: str = "", token: str | None = None) -> str:
    """The file of a checkpoint; of a folder, the newest one in it; of a name on the Hub, a copy of its file.

    :param average: of a folder, which moving average: its rate, or "raw" for the weights themselves; the run's first
        average unless given.
    :param token: for the Hub; that of its own login unless given.
    Raises UserError where there is none.
    """
    if path.startswith(hub.PREFIX) or (not files.exists(path) and hub.may_be_name(path)):
        path = hub_model.fetch(path, token)
    named = f"{flag} {path}".lstrip()
    if not files.exists(path):
        raise UserError(f"{named} does not exist: name a run's folder, or a checkpoint such as ema_0.9999_010000.pt")
    if files.is_dir(path):
        if average is None and diffusers_folder.is_folder(path):
            return diffusers_folder.find_weights(path)
        return _newest(path, average, named)
    if average is not None:
        raise UserError(f"average={average!r} chooses among the files of a run's folder, but {path} is a file")
    return path


def _newest(folder: str, average: str | float | None, named: str) -> str:
    """The file of the newest checkpoint in a folder, called `named` in messages: a complete one, else the newest by
    name."""
    names = files.list_dir(folder)
    step = sets.newest_whole_set(folder, [], logger.warn)
    if step is None:
        models = [name for name in names if name.startswith(("model", "ema_"))]
        step = max((n for n in map(sets.step_of, models) if n is not None), default=None)
    if step is None:
        raise UserError(
            f"{named} holds no checkpoint (modelNNNNNN.pt or ema_RATE_NNNNNN.pt): name a run's folder, or a checkpoint"
        )
    found = {label: checkpoint.ema_name(label, step) for label in sets.average_labels(folder, step)}
    if checkpoint.model_name(step) in names:
        found["raw"] = checkpoint.model_name(step)
    label = next(iter(found)) if average is None else str(average)
    if label not in found:
        raise UserError(f"{folder} has no average {label} at step {step}, choose from: {', '.join(found)}")
    return files.join(folder, found[label])


def read_kind(path: str, found: Found | None = None) -> type[ImageModel] | type[SuperResModel]:
    """Which kind of model a checkpoint holds, by its description or its shapes. Collective.

    :param found: what `read` gave for the path, where that is known.
    Raises UserError for a classifier, which makes no images, and for a file of something else.
    """
    path, state_dict, metadata = found or read(path)
    stored = metadata.get("config", {})
    if stored:
        kind = kind_of(stored)
        if kind == "classifier":
            raise UserError(f"{path} is {': '.join(KINDS[kind])}")
        return SuperResModel if kind == "super_res" else ImageModel
    arch = _read_architecture(path, state_dict)
    # A super-resolution network takes twice the channels; of the two readings, the one as an image model comes first.
    as_image = arch["in_channels"] <= 4 and arch["out_channels"] in (arch["in_channels"], 2 * arch["in_channels"])
    return ImageModel if as_image else SuperResModel


def kind_of(names: Iterable[str]) -> str:
    """Which of KINDS a run with options of these names trains."""
    names = set(names)
    return "classifier" if "classifier_width" in names else "super_res" if "large_size" in names else "image"


def take_options(
    settings: S,
    given: Iterable[str],
    path: str,
    state_dict: Mapping[str, th.Tensor],
    metadata: Mapping[str, Any],
    names: Iterable[str] | None = None,
) -> S:
    """The settings with the options of a checkpoint, where the user gave none.

    :param names: the options that may be taken; those of the model and the diffusion unless given.
    Raises UserError for an option that contradicts what training fixed, naming both values.
    """
    given = frozenset(given)
    known, values = settings.options(), settings.values()
    stored = stored_options(settings, given, path, state_dict, metadata)
    fixed = fixed_names()
    refuse_contradictions(values, given, path, stored, fixed)
    taken = {
        name: stored[name]
        for name in (MODEL_OPTIONS if names is None else names)
        if name in stored and name in known and (name in fixed or name not in given)
    }
    with naming(path):
        settings = settings.replace(**taken)
    model, learn_sigma = settings.model, settings.values().get("learn_sigma", False)  # type: ignore[attr-defined]
    _check_network(model, learn_sigma, path, state_dict, metadata.get("class_names"))
    return settings


def _validated(settings: Settings, path: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a description says, in which the options of the model have passed the checks of flags."""
    names = stored.keys() & settings.options().keys() & set(MODEL_OPTIONS)
    with naming(path):
        values = settings.replace(**{name: stored[name] for name in names}).values()
    return {**stored, **{name: values[name] for name in names}}


def _check_network(
    model: NetworkConfig, learn_sigma: bool, path: str, state_dict: Mapping[str, th.Tensor], names: Sequence[str] | None
) -> None:
    """Raise UserError unless the network of these options has the tensors of the file. It takes no memory.

    :param names: of the classes.
    """
    with naming(path), outline():
        is_classifier = isinstance(model, ClassifierConfig)
        network = build_classifier(model) if is_classifier else build_model(model, learn_sigma)  # type: ignore[arg-type]
    checkpoint.check_fits(network, state_dict, path)
    if names and len(names) > (model.num_classes or NUM_CLASSES):
        raise UserError(f"{path} names {len(names)} classes, more than its num_classes {model.num_classes}")


def stored_options(
    settings: Settings,
    given: Iterable[str],
    path: str,
    state_dict: Mapping[str, th.Tensor],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint says of its options: its description, else what its shapes show, which is logged.

    Raises UserError for a model of another kind than the settings'.
    """
    stored = dict(metadata.get("config", {}))
    groups: Any = (settings.model, settings.diffusion)  # type: ignore[attr-defined]
    known, values = {f.name: f for group in groups for f in fields(group)}, settings.values()
    if stored:
        if kind_of(stored) != settings.model.kind:  # type: ignore[attr-defined]
            raise UserError(f"{path} is {': '.join(KINDS[kind_of(stored)])}")
        stored = _validated(settings, path, stored)
        older = {f.name: f.metadata["older"] for f in known.values() if f.metadata["older"] is not None}
        return {**older, **stored}
    stored = _options_from_shapes(settings, given, path, state_dict)
    by_flag = {name: values[name] for name in sorted(fixed_names() & known.keys() - stored.keys())}
    if groups[0].kind != "classifier":  # whose heads are always alike
        _check_known(type(settings), fixed_names() & known.keys() & set(given), path, stored, by_flag)
    logger.log(f"{path} has no description. From its shapes: {_shown(stored)}. By flag or default: {_shown(by_flag)}")
    return stored


_HEADS = {"num_heads", "num_head_channels"}


def _check_known(
    kind: type[Settings], given: set[str], path: str, stored: Mapping[str, Any], unshown: Mapping[str, Any]
) -> None:
    """Raise UserError where nobody has said what the shapes of a checkpoint without a description do not show.

    Who gives flags of the model, as published command lines do, leaves those out that have the default.
    """
    if given and (given & _HEADS or not stored.get("resblock_updown")):
        return
    names = _HEADS | {"use_new_attention_order"}
    if not given:
        names |= {name for name in unshown if kind.options()[name].metadata["published"]}
    form = ", has the form of guided-diffusion's networks (resblock_updown)" if stored.get("resblock_updown") else ""
    presets = presets_like(stored, kind)
    hint = f", or --preset {' or '.join(presets)} if it is that model, whose shapes it has" if presets else ""
    raise UserError(
        f"{path} has no description{form}, and its shapes do not show {', '.join(sorted(names))}: give the flags of "
        f"the model that it was trained with{hint}"
    )


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def refuse_contradictions(
    values: Mapping[str, Any], given: Iterable[str], path: str, stored: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Raise UserError where one of the names was given another value than a checkpoint has."""
    for name in sorted(set(given) & stored.keys() & set(names)):
        value, there = values[name], stored[name]
        if name in ("channel_mult", "num_classes") and not value:
            continue
        if value != there:
            raise UserError(
                f"--{name} {value} contradicts {path}, which was trained with --{name} {there}: leave the flag out, "
                "or the preset that sets it"
            )


def _read_architecture(path: str, state_dict: Mapping[str, th.Tensor]) -> dict[str, Any]:
    if is_encoder(state_dict):
        raise UserError(f"{path} is {': '.join(KINDS['classifier'])}")
    try:
        return read_architecture(state_dict)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        is_cut = isinstance(error, KeyError) and any(name.startswith("input_blocks.") for name in state_dict)
        lacks = f": it lacks {ascii(error.args[0])[1:-1]}" if is_cut else ""
        raise UserError(f"{path} is not a checkpoint of this method's networks{lacks}") from None


def _options_from_shapes(
    settings: Settings, given: Iterable[str], path: str, state_dict: Mapping[str, th.Tensor]
) -> dict[str, Any]:
    """What the tensors' shapes say of a checkpoint that comes without a description."""
    config: Any = settings.model  # type: ignore[attr-defined]
    if isinstance(config, ClassifierConfig):
        return encoder_options(path, state_dict, config, given)
    arch = _read_architecture(path, state_dict)
    superres = isinstance(config, SuperResModelConfig)
    channels = arch["in_channels"] // 2 if superres else arch["in_channels"]
    if channels > 4 or arch["out_channels"] not in (channels, 2 * channels):
        raise UserError(f"{path} is {': '.join(KINDS['image' if superres else 'super_res'])}")
    mult = arch["channel_mult"]
    by_mult = {
        (0.5, 1, 1, 2, 2, 4, 4): 512, (1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32,
    }  # fmt: skip
    name = "large_size" if superres else "image_size"
    usual = by_mult.get(mult)
    size = config.size if name in given or usual is None else usual
    if usual is not None and size != usual:
        logger.warn(f"--{name} {size}: {path} has the levels of networks for images of {usual}")
    stored = {
        **({} if usual is None or size != usual else {name: size}),
        "channels": channels,
        "num_channels": arch["model_channels"],
        "num_res_blocks": arch["num_res_blocks"],
        "channel_mult": ",".join(map(str, mult)),
        "class_cond": arch["num_classes"] is not None,
        "num_classes": arch["num_classes"] or 0,
        "learn_sigma": arch["out_channels"] == 2 * channels,
        "use_scale_shift_norm": arch["use_scale_shift_norm"],
        "resblock_updown": arch["resblock_updown"],
    }
    listed = {f for f in attention_factors(size, config.attention_resolutions) if f < 2 ** len(mult)}
    if listed != set(arch["attention_resolutions"]):
        side = min(height_width(size))
        sides = ",".join(str(side // f) for f in arch["attention_resolutions"])
        if "attention_resolutions" in given:
            refuse_contradictions(settings.values(), given, path, stored, fixed_names())
            levels = ", ".join(f"1/{f}" for f in arch["attention_resolutions"]) or "no level"
            raise UserError(
                f"--attention_resolutions {config.attention_resolutions} with --{name} {size} does not fit {path}: its "
                f"attention is at {levels} of the images' size, here {sides or 'none'}: one of the two is wrong"
            )
        stored["attention_resolutions"] = sides
    if arch["resblock_updown"] and "rescale_timesteps" not in given:
        stored["rescale_timesteps"] = False  # guided-diffusion's default; for 1000 steps either is the same
    return stored


def encoder_options(
    path: str, state_dict: Mapping[str, th.Tensor], config: EncoderConfig, given: Iterable[str], size: Any = None
) -> dict[str, Any]:
    """What the shapes of a classifier's tensors say of its options.

    :param config: the options that were given for it.
    :param size: of its images, where the shapes do not show it.
    Raises UserError where an option that the shapes do not show was not given.
    """
    depth = config.classifier_depth if "classifier_depth" in given else None
    try:
        arch = read_encoder(state_dict, depth)
    except (KeyError, IndexError, ZeroDivisionError):
        raise UserError(f"{path} is not a classifier of this method's kind") from None
    except ValueError as error:
        remedy = "give --classifier_depth" if depth is None else f"--classifier_depth {depth} is wrong"
        raise UserError(f"{path} has no description, and {error}: {remedy}") from None
    size = arch["image_size"] or size or getattr(config, "image_size", None)
    side = min(height_width(size))
    return {
        "image_size": size,
        "channels": arch["in_channels"],
        "num_classes": arch["out_channels"],
        "channel_mult": ",".join(map(str, arch["channel_mult"])),
        "classifier_width": arch["model_channels"],
        "classifier_depth": arch["num_res_blocks"],
        "classifier_attention_resolutions": ",".join(str(side // f) for f in arch["attention_resolutions"]),
        "classifier_pool": arch["pool"],
        "classifier_resblock_updown": arch["resblock_updown"],
        "classifier_use_scale_shift_norm": arch["use_scale_shift_norm"],
    }


def _names(group: type[Config]) -> set[str]:
    return {f.name for f in fields(group)}


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier from a checkpoint: in eval mode on the CPU, its run's options, and its classes' names."""

    path: str
    classifier: EncoderUNetModel
    config: Mapping[str, Any]
    class_names: list[str] | None
    seen_classes: list[int] | None = None  # those that had images in training, where not all had


def load_classifier(
    path: str, like: EncoderConfig | None = None, given: Iterable[str] = (), size: Any = None
) -> LoadedClassifier:
    """The classifier of a checkpoint. Collective.

    :param like, given: options of the classifier, and which of them the user gave.
    :param size: of the images to classify, for a file without a description that does not show it.
    Raises UserError for a file that is not a classifier's, and for options that contradict it.
    """
    path, state_dict, metadata = read(path, "--classifier_path", classifier=True)
    stored = metadata.get("config", {})
    if stored and kind_of(stored) != "classifier":
        raise UserError(f"{path} is {KINDS[kind_of(stored)][0]}, not a classifier: classifier-train makes one")
    if not is_encoder(state_dict):
        raise UserError(f"{path} is not a classifier of noisy images: classifier-train makes one")
    if stored:
        older = {f.name: f.metadata["older"] for f in fields(ClassifierConfig) if f.metadata["older"] is not None}
        stored = {**older, **stored}
    else:
        stored = encoder_options(path, state_dict, like or ClassifierConfig(), given, size)
        logger.log(f"{path} has no description. From its shapes: {_shown(stored)}; attention heads of 64 channels")
    if like is not None:
        refuse_contradictions(vars(like), given, path, stored, _names(EncoderConfig) - {"classifier_use_fp16"})
    with naming(path):
        config = ClassifierConfig(**{name: stored[name] for name in _names(ClassifierConfig) & stored.keys()})
        process = ProcessConfig(**{name: stored[name] for name in _names(ProcessConfig) & stored.keys()})
    state_dict = _with_adm_names(state_dict)
    _check_network(config, False, path, state_dict, metadata.get("class_names"))
    classifier = build_classifier(config)
    checkpoint.load_into(classifier, state_dict, path)
    warn_of_initial_weights(path, metadata)
    options = {
        name: getattr(group, name) for group in (config, process) for name in _names(type(group)) & stored.keys()
    }
    names, seen = metadata.get("class_names"), metadata.get("seen_classes")
    return LoadedClassifier(path, classifier.eval(), {**stored, **options}, names, seen)


def _with_adm_names(state_dict: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The state dict of a classifier from before its pool had ADM's names and order of q, k and v."""
    renamed = {name.replace("out.2.qkv.", "out.2.qkv_proj.").replace("out.2.proj_out.", "out.2.c_proj."): tensor
               for name, tensor in state_dict.items()}  # fmt: skip
    if renamed.keys() == state_dict.keys():
        return dict(state_dict)
    for name in ("out.2.qkv_proj.weight", "out.2.qkv_proj.bias"):
        channels = len(renamed[name]) // 3
        heads = count_heads(channels, num_head_channels=64 if channels % 64 == 0 else 32)
        renamed[name] = renamed[name].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return renamed
