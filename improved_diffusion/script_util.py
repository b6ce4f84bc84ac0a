"""Config <-> command line, and config -> model and diffusion."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from . import checkpoint, logger
from .classifier import NoisyClassifier
from .config import (
    NUM_CLASSES,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
    UserError,
    comma_list,
    fixed_names,
    from_dict,
    height_width,
    parse_size,
    str2bool,
)
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps
from .schedules import shift_schedule
from .schedules import zero_terminal_snr as rescale_to_zero_terminal_snr
from .unet import SuperResModel, UNetModel, read_architecture

__all__ = [
    "NUM_CLASSES", "add_dict_to_argparser", "args_to_dict", "create_gaussian_diffusion", "create_model",
    "create_model_and_diffusion", "model_and_diffusion_defaults", "sr_create_model",
    "sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults", "str2bool",
]  # fmt: skip


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag for each entry, of its value's type; None makes a string, True and False a str2bool."""
    for name, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The given attributes of parsed arguments."""
    return {key: getattr(args, key) for key in keys}


# Factories


def _published(*groups: type) -> dict[str, Any]:
    return {f.name: f.default for group in groups for f in fields(group) if f.metadata["published"]}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The published options of create_model_and_diffusion and their defaults."""
    return _published(ModelConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The published options of sr_create_model_and_diffusion and their defaults."""
    defaults = _published(ModelConfig, DiffusionConfig, SuperResConfig)
    del defaults["image_size"]
    return defaults


def create_model_and_diffusion(
    image_size, class_cond, learn_sigma, sigma_small, num_channels, num_res_blocks, num_heads, num_heads_upsample,
    attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart,
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm, channels=3, num_classes=0,
    channel_mult="", predict_v=False, schedule_shift=1.0, zero_terminal_snr=False, min_snr_gamma=0.0,
):  # fmt: skip
    """(UNetModel, SpacedDiffusion) for the given options; see ModelConfig and DiffusionConfig."""
    model = create_model(
        image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
        num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes, channel_mult,
    )  # fmt: skip
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing, predict_v=predict_v,
        schedule_shift=schedule_shift, zero_terminal_snr=zero_terminal_snr, min_snr_gamma=min_snr_gamma,
    )  # fmt: skip
    return model, diffusion


def sr_create_model_and_diffusion(
    large_size, small_size, class_cond, learn_sigma, num_channels, num_res_blocks, num_heads, num_heads_upsample,
    attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart,
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm, sigma_small=False, channels=3,
    num_classes=0, channel_mult="", predict_v=False, schedule_shift=1.0, zero_terminal_snr=False, min_snr_gamma=0.0,
):  # fmt: skip
    """(SuperResModel, SpacedDiffusion) for the given options; see SuperResConfig, ModelConfig and DiffusionConfig."""
    model = sr_create_model(
        large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult,
    )  # fmt: skip
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing, predict_v=predict_v,
        schedule_shift=schedule_shift, zero_terminal_snr=zero_terminal_snr, min_snr_gamma=min_snr_gamma,
    )  # fmt: skip
    return model, diffusion


def create_model(
    image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions, num_heads,
    num_heads_upsample, use_scale_shift_norm, dropout, channels=3, num_classes=0, channel_mult="",
):  # fmt: skip
    """A UNetModel for images of `image_size`; see ModelConfig."""
    return _build(
        UNetModel, image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult,
    )  # fmt: skip


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels=3, num_classes=0,
    channel_mult="",
):  # fmt: skip
    """A SuperResModel for images of `large_size`; it takes low-resolution images of any size."""
    return _build(
        SuperResModel, large_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult,
    )  # fmt: skip


def _build(
    kind, image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
    num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes, channel_mult,
):  # fmt: skip
    mult = level_mult(image_size, channel_mult, num_channels)
    try:
        return kind(
            in_channels=channels,
            model_channels=num_channels,
            out_channels=2 * channels if learn_sigma else channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_factors(image_size, attention_resolutions),
            dropout=dropout,
            channel_mult=mult,
            num_classes=(num_classes or NUM_CLASSES) if class_cond else None,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def create_classifier(
    image_size, channels, num_classes, classifier_width, classifier_depth, classifier_attention_resolutions,
    dropout=0.0, use_checkpoint=False, channel_mult="",
):  # fmt: skip
    """A NoisyClassifier for images of `image_size`; see ClassifierConfig."""
    if num_classes < 2:
        raise UserError(f"a classifier needs two classes or more, not {num_classes}: look at --labels and --data_dir")
    return NoisyClassifier(
        image_size=height_width(image_size),
        in_channels=channels,
        num_classes=num_classes,
        model_channels=classifier_width,
        num_res_blocks=classifier_depth,
        attention_resolutions=attention_factors(image_size, classifier_attention_resolutions),
        dropout=dropout,
        channel_mult=level_mult(image_size, channel_mult, classifier_width),
        use_checkpoint=use_checkpoint,
    )


def level_mult(image_size: Any, channel_mult: str, num_channels: int) -> tuple[float, ...]:
    """resolve_channel_mult, checked for the norms' 32 groups."""
    mult = resolve_channel_mult(image_size, channel_mult)
    for width in (m * num_channels for m in mult):
        if width % 32:
            raise UserError(
                f"--channel_mult {channel_mult} makes a level of {width} channels: it must be a multiple of 32"
            )
    return mult


def resolve_channel_mult(image_size: Any, channel_mult: str = "") -> tuple[float, ...]:
    """Each level's width: as given, else by image size. Raises UserError where the levels do not divide the size."""
    sides = height_width(image_size)
    if channel_mult:
        mult = tuple(int(m) if m == int(m) else m for m in comma_list(channel_mult, float))
    else:
        mult = _default_channel_mult(sides)
    factor = 2 ** (len(mult) - 1)
    if any(side % factor for side in sides):
        raise UserError(
            f"--image_size {parse_size(image_size)} cannot be halved {len(mult) - 1} times, as the {len(mult)} levels "
            f"of --channel_mult {','.join(map(str, mult))} need: use a multiple of {factor}, or fewer levels"
        )
    return mult


def _default_channel_mult(sides: tuple[int, int]) -> tuple[int, ...]:
    wanted: tuple[int, ...]
    published = {(256, 256): (1, 1, 2, 2, 4, 4), (64, 64): (1, 2, 3, 4), (32, 32): (1, 2, 2, 2)}
    if sides in published:
        return published[sides]
    shorter = min(sides)
    if shorter < 24:
        wanted = (1, 2, 2) if shorter >= 12 else (1, 2)
    elif shorter < 48:
        wanted = (1, 2, 2, 2)
    elif shorter < 96:
        wanted = (1, 2, 3, 4)
    else:
        wanted = (1, 1, 2, 3, 4) if shorter < 192 else (1, 1, 2, 2, 4, 4)
    levels = len(wanted)
    while levels > 1 and any(side % 2 ** (levels - 1) for side in sides):
        levels -= 1
    if levels == 1:
        raise UserError(f"--image_size {parse_size(sides)} has an odd side, which cannot be halved: use an even size")
    return wanted[:levels]


def attention_factors(image_size: Any, attention_resolutions: str) -> tuple[int, ...]:
    """The downsampling factors of the levels whose (shorter) sides are listed; where none is exact, the nearest."""
    side = min(height_width(image_size))
    factors = []
    for resolution in comma_list(attention_resolutions, int):
        exact = side % resolution == 0 or side < resolution
        factors.append(side // resolution if exact else 2 ** round(math.log2(side / resolution)))
    return tuple(factors)


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="", predict_v=False, schedule_shift=1.0,
    zero_terminal_snr=False, min_snr_gamma=0.0,
):  # fmt: skip
    """A SpacedDiffusion for the given options; see DiffusionConfig."""
    betas = get_named_beta_schedule(noise_schedule, steps)
    if schedule_shift != 1:
        betas = shift_schedule(betas, schedule_shift)
    if zero_terminal_snr:
        betas = rescale_to_zero_terminal_snr(betas)
    mean_type = ModelMeanType.EPSILON
    if predict_xstart or predict_v:
        mean_type = ModelMeanType.START_X if predict_xstart else ModelMeanType.VELOCITY
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        min_snr_gamma=min_snr_gamma,
    )


# Checkpoints that describe themselves

_MODEL_OPTIONS = [
    f.name for group in (ModelConfig, DiffusionConfig, SuperResConfig, ClassifierConfig) for f in fields(group)
]
KINDS = {
    "image": ("an image model", "use the image_* scripts"),
    "super_res": ("a super-resolution model", "use the super_res_* scripts"),
    "classifier": (
        "a classifier",
        "it makes no images but guides a model that does (--classifier_path); classifier_train.py trains it",
    ),
}


def kind_of(names: Iterable[str]) -> str:
    """Which of KINDS a run with options of these names trains."""
    names = set(names)
    return "classifier" if "classifier_width" in names else "super_res" if "large_size" in names else "image"


def build(options: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """(model, diffusion) for a namespace of options; super-resolution where they have a large_size."""
    superres = hasattr(options, "large_size")
    create = sr_create_model_and_diffusion if superres else create_model_and_diffusion
    names = [
        *(sr_model_and_diffusion_defaults() if superres else model_and_diffusion_defaults()),
        "channels",
        "num_classes",
        "channel_mult",
        *(f.name for f in fields(DiffusionConfig) if not f.metadata["published"]),
    ]
    return create(**args_to_dict(options, names))


def adopt(options: argparse.Namespace, path: str, state_dict: Mapping[str, Any], metadata: Mapping[str, Any],
          names: Iterable[str] | None = None) -> None:  # fmt: skip
    """Take the options that were not given from a checkpoint. A contradiction raises UserError with both values.

    :param names: the options that may be taken; those of the model and the diffusion unless given.
    """
    stored = dict(metadata.get("config", {}))
    if stored and kind_of(stored) != kind_of(vars(options)):
        raise UserError(f"{path} is {': '.join(KINDS[kind_of(stored)])}")
    if not stored:
        stored = _config_from_shapes(options, path, state_dict)
        shown = ", ".join(f"{name}={value}" for name, value in stored.items())
        logger.log(
            f"{path} has no description. Read off its shapes: {shown}. By flag or default: "
            + ", ".join(
                f"{name}={getattr(options, name)}"
                for name in sorted(fixed_names())
                if hasattr(options, name) and name not in stored
            )
        )
    else:
        # An older file lacks newer options, which did not exist when it was trained.
        newer = {
            f.name: f.default for f in fields(DiffusionConfig) if f.metadata["fixed"] and not f.metadata["published"]
        }
        stored = {**{name: value for name, value in newer.items() if hasattr(options, name)}, **stored}
    fixed = fixed_names()
    refuse_contradictions(options, path, stored, fixed)
    for name in _MODEL_OPTIONS if names is None else names:
        if name in stored and hasattr(options, name) and (name in fixed or name not in options.given):
            setattr(options, name, stored[name])


def refuse_contradictions(options: argparse.Namespace, path: str, stored: Mapping[str, Any], names: set[str]) -> None:
    """Raise UserError where one of the names was given another value than a checkpoint has."""
    for name in sorted(options.given & stored.keys() & names):
        value, there = getattr(options, name), stored[name]
        if name in ("channel_mult", "num_classes") and not value:
            continue
        if value != there:
            raise UserError(
                f"--{name} {value} contradicts {path}, which was trained with --{name} {there}: leave the flag out"
            )


def _config_from_shapes(options: argparse.Namespace, path: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors' shapes say of a checkpoint that comes without a description."""
    if kind_of(vars(options)) == "classifier":
        raise UserError(f"{path} has no description: a classifier needs one, as classifier_train.py writes it")
    try:
        arch = read_architecture(state_dict)
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{path} is not a checkpoint of this method's networks") from None
    superres = hasattr(options, "large_size")
    channels = arch["in_channels"] // 2 if superres else arch["in_channels"]
    if channels > 4 or arch["out_channels"] not in (channels, 2 * channels):
        other = "an image" if superres else "a super-resolution"
        raise UserError(f"{path} is {other} model: use the other kind of script")
    mult = arch["channel_mult"]
    by_mult = {(1, 1, 2, 2, 4, 4): 256, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
    name = "large_size" if superres else "image_size"
    size = getattr(options, name) if name in options.given else by_mult.get(mult, getattr(options, name))
    side = min(height_width(size))
    stored = {
        name: size,
        "channels": channels,
        "num_channels": arch["model_channels"],
        "num_res_blocks": arch["num_res_blocks"],
        "channel_mult": ",".join(map(str, mult)),
        "class_cond": arch["num_classes"] is not None,
        "num_classes": arch["num_classes"] or 0,
        "learn_sigma": arch["out_channels"] == 2 * channels,
        "use_scale_shift_norm": arch["use_scale_shift_norm"],
    }
    listed = {f for f in attention_factors(size, options.attention_resolutions) if f < 2 ** len(mult)}
    if listed != set(arch["attention_resolutions"]):
        stored["attention_resolutions"] = ",".join(str(side // f) for f in arch["attention_resolutions"])
    return stored


def load_model(options: argparse.Namespace) -> tuple[UNetModel, SpacedDiffusion, dict[str, Any]]:
    """(model in eval mode on the CPU, diffusion, metadata) of --model_path; what training fixed need not be given.

    Raises UserError for a flag that contradicts the checkpoint, and for a file that is not a checkpoint. Collective.
    """
    if not options.model_path:
        raise UserError("--model_path is missing: name a checkpoint, such as runs/NAME/ema_0.9999_010000.pt")
    state_dict, metadata = checkpoint.load(options.model_path)
    adopt(options, options.model_path, state_dict, metadata)
    model, diffusion = build(options)
    checkpoint.load_into(model, state_dict, options.model_path)
    return model.eval(), diffusion, metadata


def load_classifier(path: str) -> tuple[NoisyClassifier, dict[str, Any], list[str] | None]:
    """(classifier in eval mode on the CPU, its run's options, its classes' names) of a checkpoint. Collective.

    Raises UserError for a file that is not a classifier's.
    """
    state_dict, metadata = checkpoint.load(path)
    stored = metadata.get("config", {})
    if not stored:
        raise UserError(f"{path} has no description: a classifier is a file that classifier_train.py wrote")
    if kind_of(stored) != "classifier":
        raise UserError(f"{path} is {KINDS[kind_of(stored)][0]}, not a classifier: classifier_train.py trains one")
    names = [f.name for f in fields(ClassifierConfig)]
    config = from_dict(ClassifierConfig, {name: stored[name] for name in names if name in stored})
    classifier = create_classifier(**vars(config))
    checkpoint.load_into(classifier, state_dict, path)
    return classifier.eval(), stored, metadata.get("class_names")
