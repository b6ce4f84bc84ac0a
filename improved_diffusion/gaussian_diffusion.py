"""The diffusion process: q(x_t | x_0), p(x_{t-1} | x_t), the losses, and the bound in bits per dimension.

DDPM is Ho et al. 2020 (arXiv 2006.11239), IDDPM Nichol & Dhariwal 2021 (arXiv 2102.09672), DDIM Song et al. 2020
(arXiv 2010.02502). Images are float32 [N, C, ...] in [-1, 1]; timesteps t are int64 [N] in 0..T-1.
"""

from __future__ import annotations

import enum
from itertools import pairwise

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, nats_to_bits, normal_kl
from .nn import mean_flat
from .sampling.solvers import DDIM, Ancestral, BothWays, Level, Prediction, sample_loop
from .schedules import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "betas_for_alpha_bar", "get_named_beta_schedule",
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
    """MSE adds the bound where the variance is learned; the rescaled kinds weigh the bound as if T were 1000 (MSE) or
    sum it over all steps (KL)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """Training and sampling for a given sequence of betas.

    :param betas: [T], each in (0, 1]; kept in float64.
    :param rescale_timesteps: give the network t * 1000/T, so that T does not change the range it sees.
    :param min_snr_gamma: weigh the squared error by min(SNR, gamma) in x_0's terms (Hang et al. 2023); 0: as published.
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
        self.mean_is_output = model_mean_type == ModelMeanType.PREVIOUS_X

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
        with np.errstate(divide="ignore"):  # a beta of 1 leaves no signal, and no way back from the noise
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7
        one_minus_prev = 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = betas * one_minus_prev / (1.0 - self.alphas_cumprod)
        # At t = 0 the variance is 0, and t = 1 stands in for it; where there is no t = 1, beta does.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = one_minus_prev * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        large = np.append(first, betas[1:])
        level_alpha_bar = np.concatenate([[1.0], self.alphas_cumprod, [0.0]])  # at t = -1..T
        with np.errstate(divide="ignore"):
            self._log_snr = (np.log(level_alpha_bar) - np.log(1.0 - level_alpha_bar)) / 2
        self._arrays = {
            "level_alpha_bar": level_alpha_bar,
            "mse_weights": self._mse_weights(),
            "score_weight": self._score_weight(),
            "log_betas": np.log(betas),
            "xstart_from_xprev": 1.0 / self.posterior_mean_coef1,
            "xstart_from_xt": self.posterior_mean_coef2 / self.posterior_mean_coef1,
            "fixed_large_variance": large,
            "fixed_large_log_variance": np.log(large),
        }
        self._on_device: dict[tuple[str, th.device], th.Tensor] = {}

    def _mse_weights(self) -> np.ndarray:
        """What each timestep's squared error counts, [T]: min(SNR, gamma) of an error in x_0 (Hang et al. 2023)."""
        if not self.min_snr_gamma:
            return np.ones(self.num_timesteps)
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        clipped = np.minimum(snr, self.min_snr_gamma)
        with np.errstate(divide="ignore", invalid="ignore"):
            # The same error in another quantity is larger or smaller by a factor.
            factor = {
                ModelMeanType.START_X: 1.0,
                ModelMeanType.EPSILON: snr,
                ModelMeanType.VELOCITY: snr + 1,
                ModelMeanType.PREVIOUS_X: self.posterior_mean_coef1**2,
            }[self.model_mean_type]
            # Where there is no signal the formula would leave the step that sampling starts from untrained.
            return np.where(snr > 0, clipped / factor, 1.0)

    def _score_weight(self) -> np.ndarray:
        """What a unit of the score adds to the network's output, [T] (Dhariwal & Nichol 2021, alg. 2: the noise)."""
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = {
                ModelMeanType.START_X: sigma**2 / alpha,
                ModelMeanType.EPSILON: -sigma,
                ModelMeanType.VELOCITY: -sigma / alpha,
                ModelMeanType.PREVIOUS_X: self.posterior_mean_coef1 * sigma**2 / alpha,
            }[self.model_mean_type]
        return np.where(alpha > 0, weight, 0.0)

    def _at(self, name: str, t: th.Tensor, x: th.Tensor) -> th.Tensor:
        """The coefficient `name` at each t, as float32 that broadcasts over x: [N, 1, ...]."""
        key = (name, t.device)
        if key not in self._on_device:
            array = self._arrays[name] if name in self._arrays else getattr(self, name)
            self._on_device[key] = th.from_numpy(array).float().to(t.device)
        return self._on_device[key][t].view(-1, *[1] * (x.ndim - 1))

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM eq. 4), each of x_start's shape."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape)
        variance = (self._at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2).expand(x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start, t, noise=None):
        """A draw of x_t given x_0 (DDPM eq. 4); `noise` of x_start's shape is drawn unless given."""
        if noise is None:
            noise = th.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise {tuple(noise.shape)} must have x_start's shape {tuple(x_start.shape)}")
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7), each of x_t's shape."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start {tuple(x_start.shape)} must have x_t's shape {tuple(x_t.shape)}")
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t).expand(x_t.shape)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape)
        return mean, variance, log_variance

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """What the model says of x_{t-1} and x_0, given x = x_t.

        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before clipping.
        :return: dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._interpret(output, x, t, clip_denoised, denoised_fn)

    def _interpret(self, output, x, t, clip_denoised, denoised_fn=None):
        """p_mean_variance for a network's output that is at hand."""
        output, variance, log_variance = self._split_variance(output, x, t)
        if self.model_mean_type == ModelMeanType.EPSILON:
            x0 = self._predict_xstart_from_eps(x, t, output)
        elif self.model_mean_type == ModelMeanType.START_X:
            x0 = output
        elif self.model_mean_type == ModelMeanType.VELOCITY:
            x0 = self._predict_xstart_from_velocity(x, t, output)
        else:
            x0 = self._predict_xstart_from_xprev(x, t, output)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean = output if self.mean_is_output else self.q_posterior_mean_variance(x0, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _split_variance(self, output, x, t):
        """The network's mean part, and the variance and log-variance of p(x_{t-1} | x_t), each of x's shape."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network gave {tuple(output.shape)} where {expected} is expected: does learn_sigma fit it?"
            )
        if not learned:
            names = (
                ("fixed_large_variance", "fixed_large_log_variance")
                if self.model_var_type == ModelVarType.FIXED_LARGE
                else ("posterior_variance", "posterior_log_variance_clipped")
            )
            variance, log_variance = (self._at(name, t, x).expand(x.shape) for name in names)
            return output, variance, log_variance
        output, values = th.split(output, x.shape[1], dim=1)
        if self.model_var_type == ModelVarType.LEARNED_RANGE:  # IDDPM eq. 15
            frac = (values + 1) / 2
            values = frac * self._at("log_betas", t, x) + (1 - frac) * self._at("posterior_log_variance_clipped", t, x)
        return output, th.exp(values), values

    def _predict_xstart_from_eps(self, x_t, t, eps):
        # DDPM eq. 4, solved for x_0
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # DDPM eq. 7, solved for x_0
        return self._at("xstart_from_xprev", t, x_t) * xprev - self._at("xstart_from_xt", t, x_t) * x_t

    def _predict_xstart_from_velocity(self, x_t, t, velocity):
        # Salimans & Ho 2022, app. D
        return (
            self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * velocity
        )

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        # DDPM eq. 4, solved for eps
        if self.alphas_cumprod[-1] == 0:  # the published form divides by the signal, of which there is none at the end
            return (x_t - self._at("sqrt_alphas_cumprod", t, x_t) * pred_xstart) / self._at(
                "sqrt_one_minus_alphas_cumprod", t, x_t
            )
        return (self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def _scale_timesteps(self, t):
        """The timesteps as the network sees them."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # Sampling: façades of the one loop in `samplers`.

    def _level(self, t, x, index=None) -> Level:
        """The noise level at each t in -1..T; `index` is the one that all samples share."""
        log_snr = float("nan") if index is None else float(self._log_snr[index + 1])
        return Level(t, self._at("level_alpha_bar", t + 1, x), log_snr)

    def _predictor(self, model, clip_denoised, denoised_fn, model_kwargs):
        def predict(x, level):
            out = self.p_mean_variance(model, x, level.t, clip_denoised, denoised_fn, model_kwargs)
            eps = self._predict_eps_from_xstart(x, level.t, out["pred_xstart"])
            return Prediction(out["pred_xstart"], eps, out["mean"], out["log_variance"])

        return predict

    def _one_step(self, rule, model, x, t, there, clip_denoised, denoised_fn, model_kwargs):
        predict = self._predictor(model, clip_denoised, denoised_fn, model_kwargs)
        sample, x0 = rule.step(predict, x, self._level(t, x), self._level(there, x), th.randn_like)
        return {"sample": sample, "pred_xstart": x0}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """A draw of x_{t-1} given x = x_t: dict of `sample` and `pred_xstart`."""
        return self._one_step(Ancestral(), model, x, t, t - 1, clip_denoised, denoised_fn, model_kwargs)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """x_{t-1} given x = x_t by DDIM: dict of `sample` and `pred_xstart`."""
        return self._one_step(DDIM(eta), model, x, t, t - 1, clip_denoised, denoised_fn, model_kwargs)

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """x_{t+1} given x = x_t along DDIM's ODE (eta must be 0): dict of `sample` and `pred_xstart`."""
        if eta != 0.0:
            raise ValueError(f"DDIM is reversible for eta 0 only, got {eta}")
        return self._one_step(DDIM(), model, x, t, t + 1, clip_denoised, denoised_fn, model_kwargs)

    def sample_loop_progressive(
        self, rule, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, noise_fn=None, path=None,
    ):  # fmt: skip
        """Walk by any rule of `samplers`, yielding a dict of `sample` and `pred_xstart` [N, C, ...] after each step.

        :param shape: [N, C, ...] of the samples.
        :param noise: where to start, at the path's first level; drawn unless given.
        :param denoised_fn, clip_denoised: see p_mean_variance.
        :param device: where to sample; the model's device unless given.
        :param progress: show a progress bar.
        :param noise_fn: gives noise shaped like the tensor it is called with; torch's global generator unless given.
        :param path: the timesteps to visit, of this process; -1 is the clean image; T-1 down to -1 unless given. Where
            it rises, noise is added.
        """
        if device is None:
            device = next(model.parameters()).device
        if not isinstance(shape, (tuple, list)):
            raise ValueError(f"shape must be a tuple or a list, got {shape!r}")
        if noise is not None:
            x = noise
        elif noise_fn is not None:
            x = noise_fn(th.empty(*shape, device=device))
        else:
            x = th.randn(*shape, device=device)
        if path is None:
            path = range(self.num_timesteps - 1, -2, -1)
        if not rule.skips and any(there < here - 1 for here, there in pairwise(path)):
            raise ValueError(f"{type(rule).__name__} goes from each timestep to the next: use respaced() to skip some")
        levels = [self._level(th.full((shape[0],), t, device=device), x, t) for t in path]
        predict = self._predictor(model, clip_denoised, denoised_fn, model_kwargs)
        yield from sample_loop(rule, predict, x, levels, noise_fn or th.randn_like, progress)

    def sample_loop(self, rule, model, shape, **kwargs):
        """The samples [N, C, ...] at the end of sample_loop_progressive, whose arguments it takes."""
        return _last(self.sample_loop_progressive(rule, model, shape, **kwargs))

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, noise_fn=None,
    ):  # fmt: skip
        """Samples of the given shape [N, C, ...] by ancestral sampling (DDPM alg. 2); see sample_loop_progressive."""
        args = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, noise_fn)
        return _last(self.sample_loop_progressive(Ancestral(), model, shape, *args))

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, noise_fn=None,
    ):  # fmt: skip
        """p_sample_loop, yielding the dict of p_sample after each of the T steps."""
        args = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, noise_fn)
        yield from self.sample_loop_progressive(Ancestral(), model, shape, *args)

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, eta=0.0, noise_fn=None,
    ):  # fmt: skip
        """Samples by DDIM; arguments as in p_sample_loop."""
        args = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, noise_fn)
        return _last(self.sample_loop_progressive(DDIM(eta), model, shape, *args))

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, eta=0.0, noise_fn=None,
    ):  # fmt: skip
        """ddim_sample_loop, yielding the dict of ddim_sample after each of the T steps."""
        args = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, noise_fn)
        yield from self.sample_loop_progressive(DDIM(eta), model, shape, *args)

    def ddim_reverse_sample_loop(
        self, model, x_start, clip_denoised=True, denoised_fn=None, model_kwargs=None, progress=False
    ):
        """The noise [N, C, ...] that DDIM takes to x_start: its ODE walked up from the image (DDIM sec. 5.4).

        `ddim_sample_loop(noise=...)` of the result gives back x_start, up to the steps' discretization.
        """
        if self.num_timesteps < 2:
            raise ValueError("inversion needs at least two timesteps")
        # The clean image enters at t = 0, the least noisy level the network knows.
        args = (x_start, clip_denoised, denoised_fn, model_kwargs, x_start.device, progress, th.zeros_like)
        up = range(self.num_timesteps)
        return _last(self.sample_loop_progressive(BothWays(DDIM()), model, tuple(x_start.shape), *args, path=up))

    # Losses

    def _vb_terms_bpd(self, out, x_start, x_t, t):
        """The bound's term at t in bits/dim [N] for `out`, a result of p_mean_variance (DDPM eq. 5)."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        return nats_to_bits(th.where(t == 0, mean_flat(decoder_nll), kl))

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The loss of each image at its timestep: dict of [N] tensors.

        `loss` always; for the MSE kinds also `mse`, and `vb` where the variance is learned (IDDPM eq. 16). `mse` is not
        weighted, `loss` is.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(self._interpret(output, x_t, t, clip_denoised=False), x_start, x_t, t)
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        terms = {}
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            # The mean part is detached: the bound trains the variance alone (IDDPM sec. 3.1).
            mean_part, variance_part = th.split(output, x_t.shape[1], dim=1)
            frozen = th.cat([mean_part.detach(), variance_part], dim=1)
            vb = self._vb_terms_bpd(self._interpret(frozen, x_t, t, clip_denoised=False), x_start, x_t, t)
            terms["vb"] = vb * (self.num_timesteps / 1000.0) if self.loss_type == LossType.RESCALED_MSE else vb
            output = mean_part
        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        elif self.model_mean_type == ModelMeanType.VELOCITY:
            target = (
                self._at("sqrt_alphas_cumprod", t, x_t) * noise
                - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_start
            )
        else:
            target = self.q_posterior_mean_variance(x_start, x_t, t)[0]
        terms["mse"] = mean_flat((target - output) ** 2)
        loss = terms["mse"]
        if self.min_snr_gamma:
            loss = self._at("mse_weights", t, x_t).flatten() * loss
        terms["loss"] = loss + terms["vb"] if "vb" in terms else loss
        return terms

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) in bits/dim [N]: the part of the bound that no network changes."""
        t = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return nats_to_bits(mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)))

    def calc_bpd_loop(
        self, model, x_start, clip_denoised=True, model_kwargs=None, noise_fn=None, timesteps=None, weights=None,
        timesteps_per_pass=1,
    ):  # fmt: skip
        """The whole variational bound of each image, term by term, in bits/dim.

        :param model_kwargs: what else the network takes; tensors of length N are the images' own.
        :param noise_fn: gives noise shaped like the tensor it is called with; torch's global generator unless given.
        :param timesteps: int64 [N, K], each image's own; T-1 down to 0 unless given.
        :param weights: [N, K], what each term counts in `total_bpd`; 1 unless given.
        :param timesteps_per_pass: evaluate so many of each image's timesteps at once. Changes speed and memory alone.
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
            x_t = self.q_sample(x_0, t, noise=noise)
            with th.no_grad():
                out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=kwargs)
                terms["vb"].append(self._vb_terms_bpd(out, x_0, x_t, t))
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_0) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        stacked = {name: th.cat(values).view(-1, n).T.contiguous() for name, values in terms.items()}
        prior_bpd = self._prior_bpd(x_start)
        bound = stacked["vb"] if weights is None else stacked["vb"] * weights
        return {"total_bpd": bound.sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **stacked}


def _repeat(value, n, times):
    """A tensor of length n so often, one after the other; anything else as it is."""
    return th.cat([value] * times) if isinstance(value, th.Tensor) and value.shape[:1] == (n,) else value


def _last(steps):
    """The last sample of a progressive loop."""
    for out in steps:
        sample = out["sample"]
    return sample
