"""Every option of every command, written once: name, type, default, help, choices.

From the fields of these dataclasses come the flags, `--help`, the JSON inside each checkpoint and the factories'
arguments. Standard library only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

NUM_CLASSES = 1000  # of a class-conditional model, where nothing says otherwise


class UserError(ValueError):
    """A mistake of the user's that one clear message explains: it names the culprit and the remedy."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}: {hint}")


def str2bool(value: str | bool) -> bool:
    """The published spellings of a truth value: yes/true/t/y/1 and no/false/f/n/0."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if value.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("expected True or False")


def parse_size(value: int | str | tuple[int, int]) -> int | str:
    """`64` or `"48x64"` (height x width); a square one comes back as an int."""
    parts = value if isinstance(value, tuple) else str(value).lower().split("x")
    numbers = [int(part) for part in parts]
    if len(numbers) > 2 or min(numbers) < 1:
        raise ValueError("expected a size such as 64, or 48x64 for height x width")
    height, width = numbers[0], numbers[-1]
    return height if height == width else f"{height}x{width}"


def height_width(size: int | str | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of an `image_size`."""
    parsed = parse_size(size)
    if isinstance(parsed, int):
        return parsed, parsed
    height, width = parsed.split("x")
    return int(height), int(width)


def comma_list(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The items of a comma-separated option; none for an empty one."""
    return [kind(part) for part in str(text).split(",") if part.strip()]


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    fixed: bool = False,
    published: bool = True,
) -> Any:
    """One option. `fixed`: training decides it and sampling may not contradict it. `published`: the method's original
    code has it too."""
    if parse is None:
        parse = str2bool if isinstance(default, bool) else type(default)
    return field(
        default=default,
        metadata=dict(help=help, choices=choices, parse=parse, fixed=fixed, published=published),
    )


def extra(default: Any, help: str, **kwargs: Any) -> Any:
    """An option that the published code does not have."""
    return option(default, help, published=False, **kwargs)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the config `cls` from a mapping; a name it does not have raises with the nearest one."""
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise unknown_name(f"option of {cls.__name__}", name, known)
    return cls(**values)


class Config:
    """What the option groups share: each value is checked against its type and choices."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            try:
                value = f.metadata["parse"](value)
            except (TypeError, ValueError) as error:
                raise UserError(f"--{f.name} {value!r}: {error}") from None
            object.__setattr__(self, f.name, value)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                raise unknown_name(f"--{f.name}", str(value), choices)
        self.validate()

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""

    def require(self, condition: bool, name: str, must: str) -> None:
        if not condition:
            raise UserError(f"--{name} {getattr(self, name)} {must}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The network."""

    image_size: Any = option(64, "side of the images in pixels, or HEIGHTxWIDTH", parse=parse_size, fixed=True)
    num_channels: int = option(128, "width of the network's first level, a multiple of 32", fixed=True)
    num_res_blocks: int = option(2, "residual blocks on each level", fixed=True)
    num_heads: int = option(4, "attention heads", fixed=True)
    num_heads_upsample: int = option(-1, "attention heads on the way up; -1: as num_heads", fixed=True)
    attention_resolutions: str = option(
        "16,8", "sides in pixels of the levels that have attention, comma-separated", fixed=True
    )
    dropout: float = option(0.0, "dropout probability inside the residual blocks, while training")
    class_cond: bool = option(False, "condition the model on the images' classes", fixed=True)
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(
        True, "timestep and class scale and shift the norms, rather than being added", fixed=True
    )
    channels: int = extra(3, "channels of the images: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha", fixed=True)
    num_classes: int = extra(
        0, "classes of a conditional model; 0: counted from the data, or as the checkpoint says", fixed=True
    )
    channel_mult: str = extra(
        "", "width of each level in units of num_channels, comma-separated; empty: by image size", fixed=True
    )

    def validate(self) -> None:
        self.require(self.num_channels > 0 and self.num_channels % 32 == 0, "num_channels", "must be a multiple of 32")
        self.require(self.num_res_blocks >= 1, "num_res_blocks", "must be at least 1")
        self.require(self.num_heads >= 1, "num_heads", "must be at least 1")
        self.require(
            self.num_heads_upsample == -1 or self.num_heads_upsample >= 1,
            "num_heads_upsample",
            "must be -1 or positive",
        )
        self.require(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        self.require(1 <= self.channels <= 4, "channels", "must be 1 to 4")
        self.require(self.num_classes >= 0, "num_classes", "must not be negative")
        for name, kind in (("attention_resolutions", int), ("channel_mult", float)):
            try:
                numbers = comma_list(getattr(self, name), kind)
            except ValueError:
                raise UserError(f"--{name} {getattr(self, name)!r}: expected numbers such as 16,8") from None
            if any(number <= 0 for number in numbers):
                raise UserError(f"--{name} {getattr(self, name)!r}: every number must be positive")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """The forward process and what the network predicts."""

    learn_sigma: bool = option(False, "learn the variance as well (IDDPM sec. 3.1)", fixed=True)
    sigma_small: bool = option(False, "with a fixed variance, take the posterior's (small) rather than beta (large)")
    diffusion_steps: int = option(1000, "T, the number of noise levels the model is trained on", fixed=True)
    noise_schedule: str = option(
        "linear", "how alpha_bar falls over the steps", choices=("linear", "cosine"), fixed=True
    )
    timestep_respacing: str = option(
        "", "steps to use: a count (250), counts per section (10,15,20) or a DDIM stride (ddim50); empty: all"
    )
    use_kl: bool = option(False, "train on the variational bound alone (L_vlb) rather than the hybrid loss")
    predict_xstart: bool = option(False, "the network predicts x_0 rather than the noise", fixed=True)
    rescale_timesteps: bool = option(True, "the network sees t * 1000/T rather than t", fixed=True)
    rescale_learned_sigmas: bool = option(True, "weigh the hybrid loss's bound by T/1000 (IDDPM eq. 16)")

    def validate(self) -> None:
        self.require(self.diffusion_steps >= 1, "diffusion_steps", "must be at least 1")
        if self.noise_schedule == "linear" and self.diffusion_steps < 20:
            raise UserError(
                f"--diffusion_steps {self.diffusion_steps} with --noise_schedule linear makes a beta above 1: "
                "take at least 20 steps, or --noise_schedule cosine"
            )


@dataclass(frozen=True, kw_only=True)
class SuperResConfig(Config):
    """The sizes of super-resolution."""

    large_size: Any = option(256, "side of the images that are made, in pixels", parse=parse_size, fixed=True)
    small_size: Any = option(64, "side of the low-resolution images given, in pixels", parse=parse_size, fixed=True)

    def validate(self) -> None:
        large, small = height_width(self.large_size), height_width(self.small_size)
        if large[0] % small[0] or large[1] % small[1] or large[0] // small[0] != large[1] // small[1]:
            raise UserError(
                f"--large_size {self.large_size} must be a whole multiple of --small_size {self.small_size}"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """The images."""

    data_dir: str = option("", "images: a folder, a .zip or an .npz; a local path or a URL that blobfile reads")
    labels: str = extra("prefix", "where classes come from: prefix (cat_001.png), folder (cat/001.png), or a JSON file")


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """The training images."""

    random_flip: bool = extra(False, "mirror each image left-right half of the time")
    num_workers: int = extra(1, "processes that read and resize images, per rank; 0: in the training process")

    def validate(self) -> None:
        self.require(self.num_workers >= 0, "num_workers", "must not be negative")


PRECISIONS = ("fp32", "bf16", "fp16")
MAX_SIGMA_REL = 0.28  # of a power-function average; a little less than that of the plain mean, 12^-1/2
LR_SCHEDULES = ("auto", "constant", "linear", "cosine", "one-cycle")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The training loop."""

    schedule_sampler: str = option(
        "uniform",
        "which timesteps to train on (loss-second-moment: IDDPM eq. 18)",
        choices=("uniform", "loss-second-moment"),
    )
    lr: float = option(1e-4, "learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    lr_anneal_steps: int = option(0, "steps over which the learning rate falls to 0 and training ends; 0: no annealing")
    batch_size: int = option(1, "images a step on each rank")
    microbatch: int = option(-1, "images in one forward pass, to save memory; -1: the whole batch")
    ema_rate: str = option("0.9999", "rates of the parameters' moving averages, comma-separated")
    log_interval: int = option(10, "steps between rows of the log")
    save_interval: int = option(10000, "steps between checkpoints")
    resume_checkpoint: str = option("", "modelNNNNNN.pt to go on from (the same as --resume PATH)")
    use_fp16: bool = option(False, "train in float16 (the same as --precision fp16)")
    fp16_scale_growth: float = option(1e-3, "what a good step adds to log2 of fp16's loss scale")
    precision: str = extra(
        "fp32", "arithmetic of the network's torso; the master parameters stay fp32", choices=PRECISIONS
    )
    total_batch_size: int = extra(0, "images a step over all ranks; 0: batch_size x ranks")
    max_steps: int = extra(0, "steps to train for; 0: until lr_anneal_steps, or until stopped")
    max_hours: float = extra(0.0, "hours of wall clock after which training saves and ends; 0: no limit")
    lr_schedule: str = extra(
        "auto",
        "its course over lr_anneal_steps (or max_steps); auto: linear with lr_anneal_steps, else constant",
        choices=LR_SCHEDULES,
    )
    lr_warmup_steps: int = extra(0, "steps over which the learning rate rises from 0")
    grad_clip: float = extra(0.0, "largest norm of the gradient; 0: no clipping")
    adam_beta1: float = extra(0.9, "Adam's decay of the gradient's mean")
    adam_beta2: float = extra(0.999, "Adam's decay of the gradient's square")
    adam_eps: float = extra(1e-8, "Adam's epsilon")
    resume: str = extra("", "auto: the newest complete checkpoint in out_dir, if any; or one of its files, or a folder")
    init_checkpoint: str = extra("", "start at step 0 from these weights")
    keep_last: int = extra(0, "checkpoints to keep, the newest; 0: all")
    keep_every: int = extra(0, "with keep_last, keep those of each multiple of this many steps as well; 0: none")
    max_bad_steps: int = extra(100, "steps in a row without a finite gradient after which training stops")
    ema_warmup: bool = extra(False, "let the averages start fast: rate min(ema_rate, (1 + s)/(10 + s)) at step s")
    ema_sigma_rel: str = extra(
        "",
        "relative widths of power-function averages, such as 0.05,0.10 (EDM2); posthoc_ema.py makes any other of them",
    )
    dry_run: bool = extra(False, "try three steps, say what the run will need, and write nothing")

    def validate(self) -> None:
        for name in ("batch_size", "log_interval", "save_interval"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in (
            "lr_anneal_steps",
            "total_batch_size",
            "max_steps",
            "max_hours",
            "lr_warmup_steps",
            "grad_clip",
            "weight_decay",
            "keep_last",
            "keep_every",
        ):
            self.require(getattr(self, name) >= 0, name, "must not be negative")
        self.require(self.max_bad_steps >= 1, "max_bad_steps", "must be at least 1")
        for name in ("lr", "adam_eps"):
            self.require(getattr(self, name) > 0 and math.isfinite(getattr(self, name)), name, "must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")
        try:
            rates = comma_list(self.ema_rate, float)
        except ValueError:
            raise UserError(f"--ema_rate {self.ema_rate!r}: expected numbers such as 0.999,0.9999") from None
        self.require(all(0 <= rate < 1 for rate in rates), "ema_rate", "must be in [0, 1)")
        try:
            widths = comma_list(self.ema_sigma_rel, float)
        except ValueError:
            raise UserError(f"--ema_sigma_rel {self.ema_sigma_rel!r}: expected numbers such as 0.05,0.10") from None
        self.require(all(0 < width < MAX_SIGMA_REL for width in widths), "ema_sigma_rel", "must be in (0, 0.28)")
        if self.use_fp16 and self.precision == "bf16":
            raise UserError("--use_fp16 True contradicts --precision bf16: give one of them")
        if self.resume and self.resume_checkpoint and self.resume != self.resume_checkpoint:
            raise UserError(
                f"--resume {self.resume} contradicts --resume_checkpoint {self.resume_checkpoint}: give one of them"
            )
        if self.keep_every and not self.keep_last:
            raise UserError(f"--keep_every {self.keep_every} needs --keep_last: without it every checkpoint is kept")
        if self.init_checkpoint and self.resume_checkpoint:
            raise UserError("--init_checkpoint starts at step 0 and --resume_checkpoint goes on: give one of them")
        if self.lr_schedule in ("linear", "cosine", "one-cycle") and not (self.lr_anneal_steps or self.max_steps):
            raise UserError(f"--lr_schedule {self.lr_schedule} needs an end: give --max_steps or --lr_anneal_steps")


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Config):
    """What a run shows of itself."""

    sample_interval: int = extra(0, "steps between grids of samples, of the model and of its first EMA; 0: none")
    val_dir: str = extra("", "held-out images, given as data_dir is, on which the loss and bits/dim are watched")
    val_interval: int = extra(5000, "steps between evaluations on val_dir")
    val_images: int = extra(512, "images of val_dir to evaluate; at most all there are")
    trackers: str = extra("", "where the log goes besides the files, comma-separated: tensorboard, wandb")

    def validate(self) -> None:
        self.require(self.sample_interval >= 0, "sample_interval", "must not be negative")
        for name in ("val_interval", "val_images"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in comma_list(self.trackers, str.strip):
            if name not in TRACKERS:
                raise unknown_name("--trackers", name, TRACKERS)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """What to draw, and how."""

    model_path: str = option("", "checkpoint to sample from, preferably an ema_*.pt")
    num_samples: int = option(10000, "images to make; super-resolution makes one of each base image unless told")
    batch_size: int = option(16, "images at once on each rank")
    use_ddim: bool = option(False, "deterministic DDIM steps rather than ancestral sampling")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1] at every step")
    ddim_eta: float = extra(0.0, "DDIM's eta: 0 deterministic, 1 as noisy as ancestral sampling")
    classes: str = extra("", "classes to draw, by name or index, comma-separated, in turn; empty: random ones")

    def validate(self) -> None:
        self.require(self.num_samples >= 1, "num_samples", "must be at least 1")
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")
        self.require(self.ddim_eta >= 0, "ddim_eta", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class BaseSamplesConfig(Config):
    """The images that super-resolution starts from."""

    base_samples: str = option(
        "", "low-resolution images: an npz (arr_0, optional arr_1), a folder, a zip or one image"
    )


@dataclass(frozen=True, kw_only=True)
class NLLConfig(Config):
    """Evaluating the variational bound."""

    model_path: str = option("", "checkpoint to evaluate, preferably an ema_*.pt")
    num_samples: int = option(1000, "images to evaluate; at most all there are")
    batch_size: int = option(1, "images at once on each rank")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")

    def validate(self) -> None:
        self.require(self.num_samples >= 1, "num_samples", "must be at least 1")
        self.require(self.batch_size >= 1, "batch_size", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PosthocConfig(Config):
    """Averages made after training."""

    run_dir: str = extra("", "folder or URL of a run trained with --ema_sigma_rel; the averages are written there too")
    sigma_rel: str = extra("", "relative widths of the averages to make, such as 0.07,0.15, each in (0, 0.28)")
    step: int = extra(-1, "the number in the snapshots' file names at which to make them; -1: the newest")

    def validate(self) -> None:
        try:
            widths = comma_list(self.sigma_rel, float)
        except ValueError:
            raise UserError(f"--sigma_rel {self.sigma_rel!r}: expected numbers such as 0.07,0.15") from None
        self.require(all(0 < width < MAX_SIGMA_REL for width in widths), "sigma_rel", "must be in (0, 0.28)")
        self.require(self.step >= -1, "step", "must be -1 or the number of a snapshot")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """The run itself."""

    seed: int = extra(0, "all randomness follows from it")
    out_dir: str = extra("", "folder for everything that is written; empty: ./runs/<name>")

    def validate(self) -> None:
        self.require(self.seed >= 0, "seed", "must not be negative")
        if "://" in self.out_dir:
            raise UserError(
                f"--out_dir {self.out_dir} must be a local folder: DIFFUSION_BLOB_LOGDIR puts checkpoints elsewhere"
            )


def fixed_names() -> set[str]:
    """The options that training decides and sampling may not contradict."""
    groups = (ModelConfig, DiffusionConfig, SuperResConfig)
    return {f.name for group in groups for f in fields(group) if f.metadata["fixed"]}
