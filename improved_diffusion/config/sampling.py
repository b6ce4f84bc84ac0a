"""The options of sampling and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from .base import MOST_SAMPLES, PRECISIONS, Config, extra, option, with_default
from .messages import UserError, shown
from .model import EncoderConfig
from .speed import SpeedConfig
from .values import comma_list, number_list, path_of, real_number

SAMPLERS = (
    "auto", "ancestral", "ddim", "plms", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "unipc_3", "euler", "heun",
    "renoise",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(SpeedConfig):
    """Sampler options."""

    use_ddim: bool = option(False, "deterministic DDIM steps (the same as --sampler ddim)")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1] at every step")
    ddim_eta: float = extra(0.0, "DDIM's eta: 0 deterministic, 1 as noisy as ancestral sampling", low=0, high=1)
    sampler: str = extra(
        "auto", "the solver; auto: a distilled model's own, else ancestral, or ddim with --use_ddim", choices=SAMPLERS
    )
    steps: int = extra(
        0,
        "number of steps; 0: timestep_respacing if given, else a distilled model's own, all of training's for "
        "ancestral and ddim, 4 for renoise, 20 for others; edits: 100 or 200",
        low=0,
    )
    timestep_grid: str = extra(
        "auto",
        "spacing of the steps: uniform, ddim, trailing, logsnr, karras, quadratic, coarse, timesteps such as "
        "0,10.5,500,999, or noise levels such as sigma:40,5,1.5,0.5; auto: by sampler",
    )
    churn: float = extra(
        0.0, "S_churn of euler and heun: noise added and removed again at each step (EDM alg. 2)", low=0
    )
    churn_min: float = extra(0.0, "S_tmin: no churn below this noise level sigma", low=0)
    churn_max: float = extra(0.0, "S_tmax: no churn above this noise level sigma; 0: no limit", low=0)
    churn_noise: float = extra(1.0, "S_noise, the standard deviation of the noise that churn adds", low=0, high=100)
    dynamic_threshold: float = extra(
        0.0,
        "dynamic thresholding (Imagen): the quantile of |x_0|, such as 0.995, to scale to 1 where it is more; 0: off",
        low=0,
        high=1,
    )
    print_steps: bool = extra(False, "print the steps with their noise levels, and stop")
    precision: str = extra(
        "fp32", "number format of the networks' blocks; 16 bits round, and are faster on GPUs", choices=PRECISIONS
    )
    use_fp16: bool = extra(False, "the model, but no classifier that guides it, computes in float16")

    def validate(self) -> None:
        super().validate()
        if self.use_fp16 and self.precision == "bf16":
            raise UserError("--use_fp16 True contradicts --precision bf16: give one of them")
        if 0 < self.churn_max <= self.churn_min:
            raise UserError(f"--churn_max {self.churn_max} must be more than --churn_min {self.churn_min}")
        if self.use_ddim and self.sampler not in ("auto", "ddim"):
            raise UserError(f"--use_ddim contradicts --sampler {self.sampler}: give one of them")
        if self.churn and self.sampler not in ("euler", "heun"):
            raise UserError(f"--churn {self.churn} is for --sampler euler or heun, not {self.sampler}")
        for name, default in (("churn_min", 0), ("churn_max", 0), ("churn_noise", 1)):
            if getattr(self, name) != default and not self.churn:
                raise UserError(f"--{name} {getattr(self, name)} does nothing without --churn: give both")
        if self.ddim_eta and not (self.use_ddim or self.sampler == "ddim"):
            raise UserError(f"--ddim_eta {self.ddim_eta} is for --sampler ddim, not {self.sampler}")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(EncoderConfig):
    """Guidance options. Those of the classifier's network are for a checkpoint that does not describe itself."""

    guidance_scale: float = extra(
        1.0, "classifier-free guidance: guide + scale x (model - guide); 1: no guidance", low=0, high=1e6
    )
    guide_path: str = extra(
        "",
        "checkpoint of a weaker or unconditional guide; empty: the model itself with its class hidden",
        parse=path_of,
    )
    guidance_interval: str = extra(
        "", "lowest and highest noise level sigma at which guidance acts, such as 0.3,5; empty: at every one"
    )
    guidance_rescale: float = extra(
        0.0, "share of the contrast to restore, 0.7 in Lin et al. 2024; 0: none", low=0, high=1
    )
    classifier_path: str = extra("", "checkpoint of a classifier to guide by, from classifier-train", parse=path_of)
    classifier_scale: float = extra(1.0, "weight of the gradient of --classifier_path", low=0, high=1e6)
    classifier_guidance: str = extra(
        "prediction",
        "what the gradient moves; prediction: the network's output, with any sampler; published: as guided-diffusion "
        "does, ancestral's mean and ddim's noise",
        choices=("prediction", "published"),
    )

    def validate(self) -> None:
        super().validate()
        if self.guidance_interval:
            try:
                low, high = comma_list(self.guidance_interval, real_number)
            except ValueError:
                raise UserError(
                    f"--guidance_interval {shown(self.guidance_interval)}: expected two noise levels such as 0.3,5"
                ) from None
            self.require(0 <= low < high, "guidance_interval", "must go from a lower noise level to a higher one")
        if self.guide_path and self.guidance_scale == 1:
            raise UserError(f"--guide_path {self.guide_path} does nothing at --guidance_scale 1: give more, such as 2")
        if self.guidance_rescale and self.guidance_scale == 1:
            raise UserError(f"--guidance_rescale {self.guidance_rescale} does nothing at --guidance_scale 1: give more")
        if self.classifier_scale != 1 and not self.classifier_path:
            raise UserError(f"--classifier_scale {self.classifier_scale} does nothing without --classifier_path")
        if self.guidance_interval and self.guidance_scale == 1 and not self.classifier_path:
            raise UserError(
                f"--guidance_interval {self.guidance_interval} does nothing without guidance: give --guidance_scale or "
                "--classifier_path"
            )


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidanceConfig(GuidanceConfig):
    """Guidance options."""

    classifier_guidance: str = with_default(GuidanceConfig, "classifier_guidance", "published")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """Sampling options."""

    model_path: str = option("", "checkpoint to sample from, preferably an ema_*.pt", parse=path_of)
    num_samples: int = option(
        10000, "images to make; super-resolution: one from each base image unless given", low=1, high=MOST_SAMPLES
    )
    seeds: str = extra(
        "", "numbers of the images to make, such as 17,40-47, out of those of --seed; empty: 0 to num_samples - 1"
    )
    batch_size: int = option(
        16, "images per batch on each rank; 0: as many as fit a GPU's memory, and 16 on CPUs", low=0
    )
    classes: str = extra("", "classes by name or index, comma-separated, repeated in turn; empty: random")
    save_steps: int = extra(
        0,
        "show this many of the predictions of x_0 during sampling of the first images in steps.png and steps.gif; "
        "0: none",
        low=0,
    )

    def validate(self) -> None:
        self.require(not self.classes or bool(comma_list(self.classes, str)), "classes", "names no class")
        try:
            numbers = number_list(self.seeds)
        except ValueError as error:
            raise UserError(f"--seeds {shown(self.seeds)}: {error}") from None
        self.require(len(set(numbers)) == len(numbers), "seeds", "names an image twice")


@dataclass(frozen=True, kw_only=True)
class BaseSamplesConfig(Config):
    """Super-resolution inputs."""

    base_samples: str = option(
        "", "low-resolution images: an npz (arr_0, optional arr_1), a folder, a zip or one image", parse=path_of
    )
    any_size: bool = extra(
        False,
        "enlarge images of any one size that the network's levels divide, rather than resize them to small_size; "
        "results are best near the size in training",
    )
    reference: str = extra(
        "",
        "true images of --large_size, in the order of --base_samples: PSNR and SSIM are measured against them",
        parse=path_of,
    )


@dataclass(frozen=True, kw_only=True)
class NLLConfig(Config):
    """Likelihood options."""

    model_path: str = option("", "checkpoint to evaluate, preferably an ema_*.pt", parse=path_of)
    num_samples: int = option(1000, "images to evaluate; no more than there are", low=1, high=MOST_SAMPLES)
    batch_size: int = option(1, "images per batch on each rank", low=1)
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")
    use_fp16: bool = extra(False, "the model computes in float16")
    nll_timesteps: int = extra(
        0,
        "estimate each image's bound from this many random timesteps, at least 2; 0: evaluate all timesteps",
        low=0,
    )
    timesteps_per_pass: int = extra(
        0, "timesteps of each image to evaluate at once; 0: chosen for speed by image size", low=0
    )
