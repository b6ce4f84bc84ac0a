"""Network and diffusion options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .base import Config, extra, option
from .messages import UserError
from .values import height_width, parse_size

# Bounds, beyond all real use: a value from a damaged file must not take all memory.
MAX_SIDE = 2**13
MAX_CLASSES = 10**6
MAX_CLASS_NAME = 1000  # characters
MAX_LEVELS = 12
MAX_MULT = 64
MAX_WIDTH = 2**13
MAX_BLOCKS = 100
MAX_LISTED = 32
MAX_DIFFUSION_STEPS = 100_000
MIN_SHIFT, MAX_SHIFT = 0.01, 100  # of a noise schedule

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Config):
    """Every network."""

    kind: ClassVar[str]  # which of KINDS such a network is
    attention_option: ClassVar[str] = "attention_resolutions"

    dropout: float = option(0.0, "dropout probability in the residual blocks, in training")
    use_checkpoint: bool = option(
        False, "gradient checkpointing: recompute activations in the backward pass, for less memory and more time"
    )
    channels: int = extra(3, "channels of the images: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha", fixed=True)
    num_classes: int = extra(
        0,
        "number of classes of a conditional model; 0: from the data, or from the checkpoint",
        low=0,
        high=MAX_CLASSES,
        fixed=True,
    )
    channel_mult: str = extra(
        "", "width of each level as a multiple of num_channels, comma-separated; empty: by image size", fixed=True
    )

    @property
    def size(self) -> Any:
        """The side of the images that the network takes, or "HEIGHTxWIDTH"."""
        raise NotImplementedError

    def validate(self) -> None:
        self.require(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        self.require(1 <= self.channels <= 4, "channels", "must be 1 to 4")
        self.require_numbers("channel_mult", float, MAX_LEVELS, MAX_MULT)
        if max(height_width(self.size)) > MAX_SIDE:
            name = "large_size" if self.kind == "super_res" else "image_size"
            raise UserError(f"--{name} {self.size} is too large: a side must be at most {MAX_SIDE} pixels")


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """The U-Net of an image model or of a super-resolution model."""

    num_channels: int = option(128, "channels of the first level, a multiple of 32", high=MAX_WIDTH, fixed=True)
    num_res_blocks: int = option(2, "residual blocks on each level", low=1, high=MAX_BLOCKS, fixed=True)
    num_heads: int = option(4, "attention heads", low=1, high=MAX_WIDTH, fixed=True)
    num_heads_upsample: int = option(-1, "attention heads in the decoder; -1: num_heads", high=MAX_WIDTH, fixed=True)
    attention_resolutions: str = option(
        "16,8",
        "sides in pixels of the levels with attention, comma-separated; the default takes the levels nearest to these",
        fixed=True,
    )
    class_cond: bool = option(False, "class-conditional model", fixed=True)
    label_drop: float = extra(
        0.0, "probability of hiding an image's class in training, 0.1 for classifier-free guidance (Ho & Salimans 2022)"
    )
    use_scale_shift_norm: bool = option(
        True, "timestep and class embedding scale and shift the norms (AdaGN), rather than being added", fixed=True
    )
    num_head_channels: int = extra(
        -1, "channels of an attention head, which decide the number of heads; -1: num_heads", low=-1, high=MAX_WIDTH,
        fixed=True, older=-1,
    )  # fmt: skip
    resblock_updown: bool = extra(
        False, "residual blocks between the levels, rather than single convolutions (ADM)", fixed=True, older=False
    )
    use_new_attention_order: bool = extra(
        False,
        "the attention's q of all heads come first, then k, then v, as in some ADM models",
        fixed=True,
        older=False,
    )
    norm_eps: float = extra(
        1e-5, "what the norms add to the variance; DDPM's code: 1e-6", low=1e-12, high=0.1, fixed=True, older=1e-5
    )
    downsample_padding: int = extra(
        1, "zeros around the images that are halved; DDPM's code: 0, zeros on two sides only", low=0, high=1,
        fixed=True, older=1,
    )  # fmt: skip
    time_freq_shift: int = extra(
        0, "1: the timesteps' lowest frequency is 1/10000, as in DDPM's code", low=0, high=1, fixed=True, older=0
    )

    def validate(self) -> None:
        super().validate()
        self.require(self.num_head_channels != 0, "num_head_channels", "must be -1 or positive")
        self.require(self.num_channels > 0 and self.num_channels % 32 == 0, "num_channels", "must be a multiple of 32")
        self.require(0 <= self.label_drop < 1, "label_drop", "must be in [0, 1)")
        self.require(
            self.num_heads_upsample == -1 or self.num_heads_upsample >= 1,
            "num_heads_upsample",
            "must be -1 or positive",
        )
        self.require_numbers("attention_resolutions", int, MAX_LISTED, MAX_SIDE)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(UNetConfig):
    """Network."""

    kind = "image"

    image_size: Any = option(64, "side of the images in pixels, or HEIGHTxWIDTH", parse=parse_size, fixed=True)

    @property
    def size(self) -> Any:
        return self.image_size


@dataclass(frozen=True, kw_only=True)
class SizesConfig(Config):
    """Sizes of a super-resolution model."""

    large_size: Any = option(256, "side of the images to make, in pixels", parse=parse_size, fixed=True)
    small_size: Any = option(64, "side of the low-resolution inputs, in pixels", parse=parse_size, fixed=True)

    def validate(self) -> None:
        large, small = height_width(self.large_size), height_width(self.small_size)
        if large[0] % small[0] or large[1] % small[1] or large[0] // small[0] != large[1] // small[1]:
            raise UserError(
                f"--large_size {self.large_size} must be a whole multiple of --small_size {self.small_size}"
            )


@dataclass(frozen=True, kw_only=True)
class SuperResModelConfig(SizesConfig, UNetConfig):
    """Network."""

    kind = "super_res"

    @property
    def size(self) -> Any:
        return self.large_size

    def validate(self) -> None:
        UNetConfig.validate(self)
        SizesConfig.validate(self)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """The classifier's network."""

    classifier_width: int = extra(
        128, "channels of the classifier's first level, a multiple of 32", high=MAX_WIDTH, fixed=True
    )
    classifier_depth: int = extra(
        2, "residual blocks on each level of the classifier", low=1, high=MAX_BLOCKS, fixed=True
    )
    classifier_attention_resolutions: str = extra(
        "32,16,8", "resolutions in pixels with attention in the classifier, comma-separated", fixed=True
    )
    classifier_pool: str = extra(
        "attention", "how the classifier makes one vector of an image", choices=POOLS, fixed=True, older="attention"
    )
    classifier_resblock_updown: bool = extra(
        True, "the classifier has residual blocks between its levels, rather than convolutions", fixed=True, older=False
    )
    classifier_use_scale_shift_norm: bool = extra(
        True, "the timestep embedding scales and shifts the classifier's norms", fixed=True, older=True
    )
    classifier_use_fp16: bool = extra(False, "the classifier computes in float16")

    def validate(self) -> None:
        width = self.classifier_width
        self.require(width > 0 and width % 32 == 0, "classifier_width", "must be a multiple of 32")
        self.require_numbers("classifier_attention_resolutions", int, MAX_LISTED, MAX_SIDE)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(EncoderConfig, NetworkConfig):
    """Classifier."""

    kind = "classifier"
    attention_option = "classifier_attention_resolutions"

    image_size: Any = option(64, "side of the images in pixels, or HEIGHTxWIDTH", parse=parse_size, fixed=True)

    @property
    def size(self) -> Any:
        return self.image_size

    def validate(self) -> None:
        EncoderConfig.validate(self)
        NetworkConfig.validate(self)


@dataclass(frozen=True, kw_only=True)
class GuidedModelConfig(Config):
    """Model to guide."""

    model_path: str = extra(
        "",
        "its checkpoint, which gives the images' size and channels and the noise schedule; empty: give them as flags",
    )


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(Config):
    """Forward process."""

    diffusion_steps: int = option(
        1000, "T, the number of noise levels in training", low=1, high=MAX_DIFFUSION_STEPS, fixed=True
    )
    noise_schedule: str = option(
        "linear", "how alpha_bar falls over the steps", choices=("linear", "cosine", "sigmoid"), fixed=True
    )
    rescale_timesteps: bool = option(True, "give the network t * 1000/T rather than t", fixed=True)
    schedule_shift: float = extra(
        1.0, "divide the schedule's SNR by its square: image_size / 64 for larger images (Hoogeboom 2023)", fixed=True,
        older=1.0,
    )  # fmt: skip
    zero_terminal_snr: bool = extra(
        False, "rescale the schedule to end in pure noise (Lin et al. 2024); needs predict_v", fixed=True, older=False
    )

    def validate(self) -> None:
        within = MIN_SHIFT <= self.schedule_shift <= MAX_SHIFT
        self.require(within, "schedule_shift", f"must be in [{MIN_SHIFT}, {MAX_SHIFT}]")
        if self.zero_terminal_snr and self.diffusion_steps < 2:
            raise UserError(f"--zero_terminal_snr needs more than --diffusion_steps {self.diffusion_steps}")
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise UserError(
                f"--diffusion_steps {self.diffusion_steps} with --noise_schedule linear makes a beta of 1 or more and "
                "leaves no signal: take at least 21 steps, or --noise_schedule cosine"
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ProcessConfig):
    """Diffusion."""

    learn_sigma: bool = option(False, "learn the variance too (IDDPM sec. 3.1)", fixed=True)
    sigma_small: bool = option(False, "fixed variance: the posterior's (small) rather than beta (large)")
    timestep_respacing: str = option(
        "", "sampling steps: a count (250), counts per section (10,15,20) or a DDIM stride (ddim50); empty: all"
    )
    use_kl: bool = option(False, "train on the variational bound (L_vlb) rather than the hybrid loss")
    predict_xstart: bool = option(False, "the network predicts x_0 rather than the noise", fixed=True)
    rescale_learned_sigmas: bool = option(True, "weight the hybrid loss's bound by T/1000 (IDDPM eq. 16)")
    predict_v: bool = extra(
        False, "the network predicts v rather than the noise (Salimans & Ho 2022)", fixed=True, older=False
    )
    min_snr_gamma: float = extra(0.0, "min-SNR weighting of the squared error, gamma = 5 in Hang et al. 2023; 0: off")

    def validate(self) -> None:
        super().validate()
        self.require(self.min_snr_gamma >= 0, "min_snr_gamma", "must not be negative")
        if self.predict_v and self.predict_xstart:
            raise UserError("--predict_v contradicts --predict_xstart: the network predicts one of them")
        if self.zero_terminal_snr and not (self.predict_v or self.predict_xstart):
            raise UserError(
                "--zero_terminal_snr needs --predict_v True: at the last step there is no signal to predict noise from"
            )
        if self.min_snr_gamma and self.use_kl:
            raise UserError("--min_snr_gamma weights the squared error, which --use_kl does not have: give one of them")


# What a checkpoint may hold, and what to do with one of another kind.
KINDS = {
    "image": ("an image model", "use sample, edit or nll"),
    "super_res": ("a super-resolution model", "use super-res-sample"),
    "classifier": ("a classifier", "it makes no images but guides a model that does (--classifier_path)"),
}


def fixed_names() -> set[str]:
    """The options that training decides and sampling may not contradict."""
    groups = (ModelConfig, DiffusionConfig, SuperResModelConfig, ClassifierConfig)
    return {f.name for group in groups for f in fields(group) if f.metadata["fixed"]}
