"""The diffusion process: q(x_t | x_0), p(x_{t-1} | x_t), the losses, and the bound in bits per dimension.

DDPM is Ho et al. 2020 (arXiv 2006.11239), IDDPM Nichol & Dhariwal 2021 (arXiv 2102.09672), DDIM Song et al. 2020
(arXiv 2010.02502), guidance Dhariwal & Nichol 2021 (arXiv 2105.05233). Images are float32 [N, C, ...] in [-1, 1];
timesteps t are int64 [N] in 0..T-1.

The public methods call each other through `self`, and coefficients through `_extract_into_tensor`, so that a subclass,
an instance or a patched module changes every computation that depends on what it replaces.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, nats_to_bits, normal_kl
from .nn import mean_flat
from .schedules import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood", "get_named_beta_schedule", "mean_flat", "normal_kl",
]  # fmt: skip


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # v = alpha eps - sigma x_0 (Salimans & Ho 2022, app. D)


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t). LEARNED_RANGE interpolates between the two fixed ones (IDDPM eq. 15)."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What is minimised.

    The MSE kinds add the bound's term where the variance is learned; RESCALED_MSE multiplies that term by T/1000.
    RESCALED_KL multiplies the bound's term by T, so that its mean over t estimates the whole bound.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


Draw = Callable[[th.Tensor], th.Tensor]  # noise of its argument's shape, type and device

_noise_fn: ContextVar[Draw | None] = ContextVar("noise_fn", default=None)


@contextmanager
def noise_from(noise_fn: Draw | None) -> Iterator[None]:
    """Let draw_noise take its noise from `noise_fn` inside the with statement; None changes nothing.

    The methods that a subclass replaces have no argument for it.
    """
    if noise_fn is None:
        yield
        return
    token = _noise_fn.set(noise_fn)
    try:
        yield
    finally:
        _noise_fn.reset(token)


def draw_noise(x: th.Tensor) -> th.Tensor:
    """Standard normal noise like x: of the noise_fn in use, otherwise of torch's global generator."""
    noise_fn = _noise_fn.get()
    return th.randn_like(x) if noise_fn is None else noise_fn(x)


def skip_noise(x: th.Tensor) -> None:
    """Pass over noise like x that is not used, so that what is drawn later is the same as if it had been drawn.

    A noise_fn with a method `skip` is told; anything else draws it, as the published code does.
    """
    skip = getattr(_noise_fn.get(), "skip", draw_noise)
    skip(x)


def start_noise(model, shape: Sequence[int], noise=None, device=None, noise_fn: Draw | None = None) -> th.Tensor:
    """x_T [N, C, ...]: `noise` where it is given, otherwise drawn on the device (the model's, unless given)."""
    if not isinstance(shape, (tuple, list)):
        raise ValueError(f"shape must be a tuple or a list, got {shape!r}")
    if noise is not None:
        return noise
    if device is None:
        device = next(model.parameters()).device
    noise_fn = noise_fn or _noise_fn.get()
    return th.randn(*shape, device=device) if noise_fn is None else noise_fn(th.empty(*shape, device=device))


def trajectory(
    step: Callable[[th.Tensor, int, int], dict[str, Any]], x: th.Tensor, path: Iterable[int], progress: bool = False,
    noise_fn: Draw | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The loop of all samplers: take x from timestep to timestep of `path`, yielding what each step returns.

    :param step: (x, here, there) -> a dict; its `sample`, also where the caller has replaced it, is the next x.
    :param progress: show a progress bar.
    :param noise_fn: see noise_from.
    """
    moves: Iterable[tuple[int, int]] = list(pairwise(path))
    if progress:
        from tqdm.auto import tqdm

        moves = tqdm(moves)
    for here, there in moves:
        # Neither is held while the caller has the result: two trajectories may be advanced in turns.
        with th.no_grad(), noise_from(noise_fn):
            out = step(x, here, there)
        yield out
        x = out["sample"]


def last_sample(steps: Iterable[dict[str, Any]]) -> th.Tensor:
    """The `sample` of a trajectory's last step."""
    for out in steps:
        sample = out["sample"]
    return sample


class GivenOutput:
    """A network's output in the network's place: whatever it is called with, that is what it gives."""

    def __init__(self, output):
        self.output = output

    def __call__(self, *args, **kwargs):
        return self.output


class GaussianDiffusion:
    """Training and sampling for a given sequence of betas.

    :param betas: [T], each in (0, 1]; kept in float64.
    :param model_mean_type, model_var_type, loss_type: may be None where no model is involved.
    :param rescale_timesteps: give the network t * 1000/T, so that T does not change the range it sees.
    :param min_snr_gamma: weight the squared error of x_0 by min(SNR, gamma) (Hang et al. 2023); 0: as published.
    Raises ValueError for betas outside (0, 1].
    """

    def __init__(
        self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False, min_snr_gamma=0.0
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.min_snr_gamma = min_snr_gamma

        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a list of numbers in (0, 1], got {betas}")
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # after a beta of 1 no signal is left to divide by
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7
        one_minus_prev = 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = betas * one_minus_prev / (1.0 - self.alphas_cumprod)
        # The variance is 0 at t = 0: use that of t = 1, or beta where T is 1.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = one_minus_prev * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        self._log_betas = np.log(betas)
        self._fixed_large_variance = np.append(first, betas[1:])
        self._fixed_large_log_variance = np.log(self._fixed_large_variance)
        self._xstart_from_xprev = 1.0 / self.posterior_mean_coef1
        self._xstart_from_xt = self.posterior_mean_coef2 / self.posterior_mean_coef1
        self._mse_weights = self._min_snr_weights() if min_snr_gamma else np.ones(self.num_timesteps)

    def _min_snr_weights(self) -> np.ndarray:
        """The weight of each timestep's squared error, [T]: min(SNR, gamma) of an error in x_0 (Hang et al. 2023)."""
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        clipped = np.minimum(snr, self.min_snr_gamma)
        with np.errstate(divide="ignore", invalid="ignore"):
            # The squared error of what is predicted is this many times that of x_0.
            factor = {
                ModelMeanType.START_X: 1.0,
                ModelMeanType.EPSILON: snr,
                ModelMeanType.VELOCITY: snr + 1,
                ModelMeanType.PREVIOUS_X: self.posterior_mean_coef1**2,
            }[self.model_mean_type]
            # Without signal the formula gives 0, but sampling starts there: that step must be trained.
            return np.where(snr > 0, clipped / factor, 1.0)

    # The forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM eq. 4), each of x_start's shape."""
        mean = _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) ** 2
        log_variance = _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start, t, noise=None):
        """A draw of x_t given x_0 (DDPM eq. 4); `noise` of x_start's shape is drawn unless given."""
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise {tuple(noise.shape)} must have x_start's shape {tuple(x_start.shape)}")
        return (
            _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7), each of x_t's shape."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start {tuple(x_start.shape)} must have x_t's shape {tuple(x_t.shape)}")
        mean = (
            _extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + _extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = _extract_into_tensor(self.posterior_variance, t, x_t.shape)
        log_variance = _extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance

    # The reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """The model's p(x_{t-1} | x_t) and its prediction of x_0, given x = x_t.

        :param model: (x, timesteps, **model_kwargs) -> [N, C, ...], or [N, 2C, ...] with a learned variance.
        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before clipping.
        :return: dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape.
        Raises ValueError for an output of another shape.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        output, variance, log_variance = self._split_variance(output, x, t)
        x0 = self._predict_xstart(output, x, t)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _split_variance(self, output, x, t):
        """The network's mean part, and the variance and log-variance of p(x_{t-1} | x_t), each of x's shape."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network gave {tuple(output.shape)} where {expected} is expected: does learn_sigma fit it?"
            )
        if learned:
            output, values = th.split(output, x.shape[1], dim=1)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:  # IDDPM eq. 15
                low = _extract_into_tensor(self.posterior_log_variance_clipped, t, x.shape)
                high = _extract_into_tensor(self._log_betas, t, x.shape)
                frac = (values + 1) / 2
                values = frac * high + (1 - frac) * low
            return output, th.exp(values), values
        variance, log_variance = {
            ModelVarType.FIXED_LARGE: (self._fixed_large_variance, self._fixed_large_log_variance),
            ModelVarType.FIXED_SMALL: (self.posterior_variance, self.posterior_log_variance_clipped),
        }[self.model_var_type]
        return output, _extract_into_tensor(variance, t, x.shape), _extract_into_tensor(log_variance, t, x.shape)

    def _predict_xstart(self, output, x_t, t):
        """x_0 from the network's mean part."""
        if self.model_mean_type == ModelMeanType.START_X:
            return output
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t=x_t, t=t, eps=output)
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return self._predict_xstart_from_velocity(x_t=x_t, t=t, velocity=output)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self._predict_xstart_from_xprev(x_t=x_t, t=t, xprev=output)
        raise NotImplementedError(f"model_mean_type {self.model_mean_type}")

    def _predict_xstart_from_eps(self, x_t, t, eps):
        # DDPM eq. 4, solved for x_0
        return (
            _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * eps
        )

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # DDPM eq. 7, solved for x_0
        return (
            _extract_into_tensor(self._xstart_from_xprev, t, x_t.shape) * xprev
            - _extract_into_tensor(self._xstart_from_xt, t, x_t.shape) * x_t
        )

    def _predict_xstart_from_velocity(self, x_t, t, velocity):
        # Salimans & Ho 2022, app. D
        return (
            _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape) * x_t
            - _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * velocity
        )

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        # DDPM eq. 4, solved for eps
        if self.alphas_cumprod[-1] == 0:  # the published form divides by the signal, which is 0 at the last step
            return (
                x_t - _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape) * pred_xstart
            ) / _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
        return (
            _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t - pred_xstart
        ) / _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def _scale_timesteps(self, t):
        """The timesteps as the network sees them."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # Guidance

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean of p(x_{t-1} | x_t, y), of x's shape (Dhariwal & Nichol 2021, alg. 1).

        :param cond_fn: (x, timesteps as the network sees them, **model_kwargs) -> the gradient of log p(y | x_t) with
            respect to x_t, of x's shape, times the scale of the guidance. It is called without gradients: it enables
            them for itself.
        :param p_mean_var: from p_mean_variance.
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """What p_mean_variance returns, of p(x_{t-1} | x_t, y) (Dhariwal & Nichol 2021, alg. 2).

        The noise that belongs to the predicted, clipped x_0 is guided; the x_0 of the result is not clipped again.
        Arguments as in condition_mean.
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        alpha_bar = _extract_into_tensor(self.alphas_cumprod, t, x.shape)
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]) - th.sqrt(1 - alpha_bar) * gradient
        x0 = self._predict_xstart_from_eps(x, t, eps)
        if self.alphas_cumprod[-1] == 0:  # x_t without signal says nothing about x_0: the prediction stays
            x0 = th.where(alpha_bar > 0, x0, p_mean_var["pred_xstart"])
        mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return {**p_mean_var, "mean": mean, "pred_xstart": x0}

    # Sampling

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, *, cond_fn=None):
        """A draw of x_{t-1} given x = x_t (DDPM alg. 2): dict of `sample` and `pred_xstart`, both of x's shape.

        :param cond_fn: guides the mean; see condition_mean. `pred_xstart` is the model's.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        # Drawn at t = 0 too, where it is not used: a seed's samples depend on the order of the draws.
        noise = draw_noise(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = mean + _unless_last(t, x) * (th.exp(0.5 * out["log_variance"]) * noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0, *, cond_fn=None
    ):
        """x_{t-1} given x = x_t (DDIM eq. 12): dict of `sample` and `pred_xstart`, both of x's shape.

        :param eta: 0 is deterministic, 1 is as noisy as ancestral sampling.
        :param cond_fn: guides the noise, and `pred_xstart` with it; see condition_score.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_prev = _extract_into_tensor(self.alphas_cumprod_prev, t, x.shape)
        direction = 1 - alpha_bar_prev
        if not eta:
            skip_noise(x)  # see p_sample
        else:
            noise = draw_noise(x)
            alpha_bar = _extract_into_tensor(self.alphas_cumprod, t, x.shape)
            sigma = eta * th.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
            sigma = sigma * th.sqrt(1 - alpha_bar / alpha_bar_prev)
            direction = (direction - sigma**2).clamp(min=0)  # rounding can make it negative where nearly all is noise
        sample = out["pred_xstart"] * th.sqrt(alpha_bar_prev) + th.sqrt(direction) * eps
        if eta:
            sample = sample + _unless_last(t, x) * (sigma * noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """x_{t+1} given x = x_t along DDIM's ODE: dict of `sample` and `pred_xstart`, both of x's shape.

        Raises ValueError for an eta other than 0.
        """
        if eta != 0.0:
            raise ValueError(f"DDIM is reversible for eta 0 only, got {eta}")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = _extract_into_tensor(self.alphas_cumprod_next, t, x.shape)
        sample = out["pred_xstart"] * th.sqrt(alpha_bar_next) + th.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, noise_fn=None, *, cond_fn=None,
    ):  # fmt: skip
        """Samples of the given shape [N, C, ...] by ancestral sampling (DDPM alg. 2).

        :param noise: x_T; drawn unless given.
        :param denoised_fn, clip_denoised: see p_mean_variance.
        :param device: where to sample; the model's device unless given.
        :param progress: show a progress bar.
        :param noise_fn: gives noise shaped like the tensor it is called with; torch's global generator unless given.
        :param cond_fn: guides each step; see condition_mean.
        """
        with noise_from(noise_fn):
            return last_sample(
                self.p_sample_loop_progressive(
                    model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                    model_kwargs=model_kwargs, device=device, progress=progress, **_if_given(cond_fn=cond_fn),
                )
            )  # fmt: skip

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, noise_fn=None, *, cond_fn=None,
    ):  # fmt: skip
        """p_sample_loop, yielding what p_sample returns at each of the T steps."""
        kwargs = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        kwargs |= _if_given(cond_fn=cond_fn)
        x = start_noise(model, shape, noise, device, noise_fn)
        yield from self._down(lambda x, t: self.p_sample(model, x, t, **kwargs), x, progress, noise_fn)

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, eta=0.0, noise_fn=None, *, cond_fn=None,
    ):  # fmt: skip
        """Samples by DDIM; arguments as in p_sample_loop and ddim_sample."""
        with noise_from(noise_fn):
            return last_sample(
                self.ddim_sample_loop_progressive(
                    model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                    model_kwargs=model_kwargs, device=device, progress=progress, eta=eta,
                    **_if_given(cond_fn=cond_fn),
                )
            )  # fmt: skip

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, eta=0.0, noise_fn=None, *, cond_fn=None,
    ):  # fmt: skip
        """ddim_sample_loop, yielding what ddim_sample returns at each of the T steps."""
        kwargs = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs, eta=eta)
        kwargs |= _if_given(cond_fn=cond_fn)
        x = start_noise(model, shape, noise, device, noise_fn)
        yield from self._down(lambda x, t: self.ddim_sample(model, x, t, **kwargs), x, progress, noise_fn)

    def _down(self, step, x, progress, noise_fn):
        """The trajectory of `step(x, t [N])` over all timesteps, from x = x_T."""

        def move(x, here, there):
            return step(x, th.full((len(x),), here, device=x.device))

        return trajectory(move, x, range(self.num_timesteps - 1, -2, -1), progress, noise_fn)

    # Losses

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """The bound's term at t (DDPM eq. 5): dict of `output` [N] in bits/dim and `pred_xstart` [N, C, ...]."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = nats_to_bits(th.where(t == 0, mean_flat(decoder_nll), kl))
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The loss of each image at its timestep: dict of [N] tensors.

        `loss` always; for the MSE kinds also `mse`, and `vb` where the variance is learned (IDDPM eq. 16). `mse` is not
        weighted, `loss` is.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(
                model=model, x_start=x_start, x_t=x_t, t=t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            return {"loss": bound * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else bound}

        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            terms["vb"] = self._variance_loss(output, x_start, x_t, t)
            output = output[:, : x_t.shape[1]]
        terms["mse"] = mean_flat((self._target(x_start, x_t, t, noise) - output) ** 2)
        loss = terms["mse"]
        if self.min_snr_gamma:
            loss = _extract_into_tensor(self._mse_weights, t, loss.shape) * loss
        terms["loss"] = loss + terms["vb"] if "vb" in terms else loss
        return terms

    def _variance_loss(self, output, x_start, x_t, t):
        """The bound's term of a network's output, which trains the variance alone (IDDPM sec. 3.1): [N] in bits/dim."""
        mean_part, variance_part = th.split(output, x_t.shape[1], dim=1)
        frozen = th.cat([mean_part.detach(), variance_part], dim=1)
        vb = self._vb_terms_bpd(
            model=GivenOutput(frozen), x_start=x_start, x_t=x_t, t=t, clip_denoised=False
        )["output"]  # fmt: skip
        return vb * (self.num_timesteps / 1000.0) if self.loss_type == LossType.RESCALED_MSE else vb

    def _target(self, x_start, x_t, t, noise):
        """The value that the network's mean part is trained to predict, of x_start's shape."""
        if self.model_mean_type == ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type == ModelMeanType.START_X:
            return x_start
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return (
                _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape) * noise
                - _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * x_start
            )
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        raise NotImplementedError(f"model_mean_type {self.model_mean_type}")

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) in bits/dim [N]: the part of the bound that does not depend on the network."""
        t = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return nats_to_bits(mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)))

    def calc_bpd_loop(
        self, model, x_start, clip_denoised=True, model_kwargs=None, noise_fn=None, timesteps=None, weights=None,
        timesteps_per_pass=1,
    ):  # fmt: skip
        """The whole variational bound of each image, term by term, in bits/dim.

        :param model_kwargs: further arguments of the network; a tensor of length N has one entry for each image.
        :param noise_fn: gives noise shaped like the tensor it is called with; torch's global generator unless given.
        :param timesteps: int64 [N, K], each image's own; T-1 down to 0 unless given.
        :param weights: [N, K], the weight of each term in `total_bpd`; 1 unless given.
        :param timesteps_per_pass: how many of an image's timesteps to evaluate at once; changes only speed and memory.
        :return: dict of `total_bpd` and `prior_bpd` [N], and `vb`, `xstart_mse`, `mse` [N, K].
        """
        draw, n = noise_fn or th.randn_like, len(x_start)
        terms: dict[str, list[th.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        if timesteps is None:
            timesteps = th.arange(self.num_timesteps, device=x_start.device).flip(0).expand(n, -1)
        for part in timesteps.split(timesteps_per_pass, dim=1):
            k = part.shape[1]
            t, x_0 = part.T.flatten(), th.cat([x_start] * k)  # all images at the first timestep, at the second, ...
            kwargs = {name: _repeat(value, n, k) for name, value in (model_kwargs or {}).items()}
            noise = th.cat([draw(x_start) for _ in range(k)])
            x_t = self.q_sample(x_start=x_0, t=t, noise=noise)
            with th.no_grad():
                out = self._vb_terms_bpd(
                    model, x_start=x_0, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=kwargs
                )
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["vb"].append(out["output"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_0) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        stacked = {name: th.cat(values).view(-1, n).T.contiguous() for name, values in terms.items()}
        prior_bpd = self._prior_bpd(x_start)
        bound = stacked["vb"] if weights is None else stacked["vb"] * weights
        return {"total_bpd": bound.sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **stacked}


_device_copies: dict[tuple[int, th.device], th.Tensor] = {}


def _on_device(array: np.ndarray, device: th.device) -> th.Tensor:
    """The array as a tensor on the device, float64 as float32. Copied once, so that no step waits for the host: to
    change a coefficient, assign a new array instead of writing into the old one."""
    key = (id(array), device)
    if key not in _device_copies:
        tensor = th.tensor(array)
        _device_copies[key] = (tensor.float() if tensor.is_floating_point() else tensor).to(device)
        weakref.finalize(array, _device_copies.pop, key, None)  # before another array can have its id
    return _device_copies[key]


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """arr[timesteps], expanded to `broadcast_shape`.

    :param arr: numpy [T], float64; :param timesteps: int64 [N]; :param broadcast_shape: [N, ...].
    :return: float32 of `broadcast_shape` on the timesteps' device.
    """
    values = _on_device(arr, timesteps.device)[timesteps]
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)


def _unless_last(t, x):
    """[N, 1, ...] of x's type: 0 at t = 0, where no noise is added to the image, otherwise 1."""
    return (t != 0).to(x).view(-1, *[1] * (x.ndim - 1))


def _if_given(**arguments):
    """The arguments that are not None: a subclass's method need not know the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def _repeat(value, n, times):
    """A tensor of length n repeated along its first dimension; anything else unchanged."""
    return th.cat([value] * times) if isinstance(value, th.Tensor) and value.shape[:1] == (n,) else value
