"""Options to networks and their diffusion."""

from __future__ import annotations

import math
from typing import Any

from ..config import (
    NUM_CLASSES,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    UserError,
    comma_list,
    height_width,
    parse_size,
)
from ..gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from ..respace import SpacedDiffusion, space_timesteps
from ..schedules import shift_schedule
from ..schedules import zero_terminal_snr as rescale_to_zero_terminal_snr
from ..unet import EncoderUNetModel, SuperResModel, UNetModel

# Defaults of arguments that the published factories do not have, or have without a default.
_CHANNELS = ModelConfig.channels
_NUM_CLASSES = ModelConfig.num_classes
_CHANNEL_MULT = ModelConfig.channel_mult
_NUM_HEAD_CHANNELS = ModelConfig.num_head_channels
_RESBLOCK_UPDOWN = ModelConfig.resblock_updown
_NEW_ORDER = ModelConfig.use_new_attention_order
_NORM_EPS = ModelConfig.norm_eps
_DOWNSAMPLE_PADDING = ModelConfig.downsample_padding
_TIME_FREQ_SHIFT = ModelConfig.time_freq_shift
_CLASSIFIER = ClassifierConfig
_SIGMA_SMALL = DiffusionConfig.sigma_small
_PREDICT_V = DiffusionConfig.predict_v
_SCHEDULE_SHIFT = DiffusionConfig.schedule_shift
_ZERO_TERMINAL_SNR = DiffusionConfig.zero_terminal_snr
_MIN_SNR_GAMMA = DiffusionConfig.min_snr_gamma


def create_model_and_diffusion(
    image_size, class_cond, learn_sigma, sigma_small, num_channels, num_res_blocks, num_heads, num_heads_upsample,
    attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart,
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm, channels=_CHANNELS,
    num_classes=_NUM_CLASSES, channel_mult=_CHANNEL_MULT, predict_v=_PREDICT_V, schedule_shift=_SCHEDULE_SHIFT,
    zero_terminal_snr=_ZERO_TERMINAL_SNR, min_snr_gamma=_MIN_SNR_GAMMA, num_head_channels=_NUM_HEAD_CHANNELS,
    resblock_updown=_RESBLOCK_UPDOWN, use_new_attention_order=_NEW_ORDER, use_fp16=False, norm_eps=_NORM_EPS,
    downsample_padding=_DOWNSAMPLE_PADDING, time_freq_shift=_TIME_FREQ_SHIFT,
):  # fmt: skip
    """(UNetModel, SpacedDiffusion) for the given options; see ModelConfig and DiffusionConfig."""
    model = create_model(
        image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
        num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes, channel_mult,
        num_head_channels, resblock_updown, use_new_attention_order, use_fp16, norm_eps, downsample_padding,
        time_freq_shift,
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
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm,
    sigma_small=_SIGMA_SMALL, channels=_CHANNELS, num_classes=_NUM_CLASSES,
    channel_mult=_CHANNEL_MULT, predict_v=_PREDICT_V, schedule_shift=_SCHEDULE_SHIFT,
    zero_terminal_snr=_ZERO_TERMINAL_SNR, min_snr_gamma=_MIN_SNR_GAMMA, num_head_channels=_NUM_HEAD_CHANNELS,
    resblock_updown=_RESBLOCK_UPDOWN, use_new_attention_order=_NEW_ORDER, use_fp16=False, norm_eps=_NORM_EPS,
    downsample_padding=_DOWNSAMPLE_PADDING, time_freq_shift=_TIME_FREQ_SHIFT,
):  # fmt: skip
    """(SuperResModel, SpacedDiffusion) for the given options; see SuperResModelConfig and DiffusionConfig."""
    model = sr_create_model(
        large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult, num_head_channels, resblock_updown, use_new_attention_order, use_fp16, norm_eps,
        downsample_padding, time_freq_shift,
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
    num_heads_upsample, use_scale_shift_norm, dropout, channels=_CHANNELS, num_classes=_NUM_CLASSES,
    channel_mult=_CHANNEL_MULT, num_head_channels=_NUM_HEAD_CHANNELS, resblock_updown=_RESBLOCK_UPDOWN,
    use_new_attention_order=_NEW_ORDER, use_fp16=False, norm_eps=_NORM_EPS, downsample_padding=_DOWNSAMPLE_PADDING,
    time_freq_shift=_TIME_FREQ_SHIFT,
):  # fmt: skip
    """A UNetModel for images of `image_size`; see ModelConfig."""
    return _build(
        UNetModel, image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult, num_head_channels, resblock_updown, use_new_attention_order, use_fp16, norm_eps,
        downsample_padding, time_freq_shift,
    )  # fmt: skip


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels=_CHANNELS,
    num_classes=_NUM_CLASSES, channel_mult=_CHANNEL_MULT, num_head_channels=_NUM_HEAD_CHANNELS,
    resblock_updown=_RESBLOCK_UPDOWN, use_new_attention_order=_NEW_ORDER, use_fp16=False, norm_eps=_NORM_EPS,
    downsample_padding=_DOWNSAMPLE_PADDING, time_freq_shift=_TIME_FREQ_SHIFT,
):  # fmt: skip
    """A SuperResModel for images of `large_size`; it takes low-resolution images of any size."""
    return _build(
        SuperResModel, large_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes,
        channel_mult, num_head_channels, resblock_updown, use_new_attention_order, use_fp16, norm_eps,
        downsample_padding, time_freq_shift,
    )  # fmt: skip


def _build(
    kind, image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
    num_heads, num_heads_upsample, use_scale_shift_norm, dropout, channels, num_classes, channel_mult,
    num_head_channels, resblock_updown, use_new_attention_order, use_fp16, norm_eps, downsample_padding,
    time_freq_shift,
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
            num_head_channels=num_head_channels,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
            use_fp16=use_fp16,
            norm_eps=norm_eps,
            downsample_padding=downsample_padding,
            time_freq_shift=time_freq_shift,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def create_classifier(
    image_size, classifier_use_fp16=_CLASSIFIER.classifier_use_fp16, classifier_width=_CLASSIFIER.classifier_width,
    classifier_depth=_CLASSIFIER.classifier_depth,
    classifier_attention_resolutions=_CLASSIFIER.classifier_attention_resolutions,
    classifier_use_scale_shift_norm=_CLASSIFIER.classifier_use_scale_shift_norm,
    classifier_resblock_updown=_CLASSIFIER.classifier_resblock_updown, classifier_pool=_CLASSIFIER.classifier_pool,
    channels=_CHANNELS, num_classes=NUM_CLASSES, dropout=_CLASSIFIER.dropout,
    use_checkpoint=_CLASSIFIER.use_checkpoint, channel_mult=_CHANNEL_MULT,
):  # fmt: skip
    """An EncoderUNetModel for images of `image_size`, with attention heads of 64 channels; see ClassifierConfig."""
    if num_classes < 2:
        raise UserError(f"a classifier needs two classes or more, not {num_classes}: look at --labels and --data_dir")
    return EncoderUNetModel(
        image_size=height_width(image_size),
        in_channels=channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=attention_factors(image_size, classifier_attention_resolutions),
        dropout=dropout,
        channel_mult=level_mult(image_size, channel_mult, classifier_width),
        use_checkpoint=use_checkpoint,
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
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


def resolve_channel_mult(image_size: Any, channel_mult: str = _CHANNEL_MULT) -> tuple[float, ...]:
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


def _default_channel_mult(sides: tuple[int, int]) -> tuple[float, ...]:
    wanted: tuple[int, ...]
    published: dict[tuple[int, int], tuple[float, ...]] = {
        (512, 512): (0.5, 1, 1, 2, 2, 4, 4),
        (256, 256): (1, 1, 2, 2, 4, 4),
        (128, 128): (1, 1, 2, 3, 4),
        (64, 64): (1, 2, 3, 4),
        (32, 32): (1, 2, 2, 2),
    }
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


def level_sides(image_size: Any, levels: int) -> list[int]:
    """The (shorter) side of the images on each level."""
    return [min(height_width(image_size)) // 2**level for level in range(levels)]


def sides_without_level(image_size: Any, levels: int, attention_resolutions: str) -> list[int]:
    """Those of the listed sides that give no level attention."""
    factors = {2**level for level in range(levels)}
    listed = comma_list(attention_resolutions, int)
    return [side for side in listed if not factors & set(attention_factors(image_size, str(side)))]


def nearest_sides(image_size: Any, levels: int, attention_resolutions: str) -> str:
    """The sides of the levels nearest, by their ratio, to the listed ones."""
    sides = level_sides(image_size, levels)
    listed = comma_list(attention_resolutions, int)
    nearest = [min(sides, key=lambda side: (abs(math.log(side / wanted)), side)) for wanted in listed]
    return ",".join(map(str, dict.fromkeys(nearest)))


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="", predict_v=_PREDICT_V,
    schedule_shift=_SCHEDULE_SHIFT, zero_terminal_snr=_ZERO_TERMINAL_SNR, min_snr_gamma=_MIN_SNR_GAMMA,
):  # fmt: skip
    """A SpacedDiffusion for the given options; see DiffusionConfig.

    The defaults of the published arguments are the published ones, which differ from the commands' where both rescale
    flags are concerned.
    """
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
