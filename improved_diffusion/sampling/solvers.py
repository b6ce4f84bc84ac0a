"""Solvers: one small update rule for each method, and the loop that applies it.

A rule takes x at one noise level to the next. Its prediction comes from a Denoiser, its noise from draw_noise. In all
of them x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, and log_snr is lambda = log(alpha / sigma) (Lu et al.
2022, arXiv 2206.00927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th

from ..gaussian_diffusion import Draw, GaussianDiffusion, draw_noise, last_sample, start_noise, trajectory


class Level(NamedTuple):
    """A noise level that all images of a batch share."""

    t: int  # the timestep; -1 is the clean image
    log_snr: float  # lambda, from -inf (pure noise) to inf (the clean image)

    @property
    def alpha(self) -> float:
        """The factor of the image in x_t."""
        return 1 / math.sqrt(1 + math.exp(-2 * self.log_snr))

    @property
    def sigma(self) -> float:
        """The noise's standard deviation."""
        return 1 / math.sqrt(1 + math.exp(2 * self.log_snr))

    @property
    def noise_to_signal(self) -> float:
        """sigma / alpha: EDM's sigma (Karras et al. 2022)."""
        return math.exp(-self.log_snr)

    @property
    def is_clean(self) -> bool:
        """Whether this is the image itself."""
        return self.log_snr == math.inf


def levels_of(diffusion: GaussianDiffusion) -> list[Level]:
    """The levels t = -1..T-1 of a process, [T + 1]."""
    alpha_bar = np.append(1.0, diffusion.alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = (np.log(alpha_bar) - np.log(1.0 - alpha_bar)) / 2
    return [Level(t, float(value)) for t, value in enumerate(log_snr, start=-1)]


class Prediction(NamedTuple):
    """The model's prediction at x, after clipping; both of x's shape."""

    x0: th.Tensor
    eps: th.Tensor


class Denoiser:
    """A model and its diffusion, as the rules see them.

    :param cond_fn: guides the diffusion's own sampling methods; see GaussianDiffusion.condition_mean.
    :param kwargs: `clip_denoised`, `denoised_fn`, `model_kwargs` of p_mean_variance.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, model: Callable[..., th.Tensor],
        cond_fn: Callable[..., th.Tensor] | None = None, **kwargs: Any,
    ):  # fmt: skip
        self.diffusion, self.model, self.kwargs = diffusion, model, kwargs
        # Given only where there is one: a subclass's p_sample need not know it.
        self.guidance = {} if cond_fn is None else {"cond_fn": cond_fn}

    def __call__(self, x: th.Tensor, level: Level) -> Prediction:
        """The prediction for x [N, C, ...] at a level."""
        t = _timesteps(x, level)
        x0 = self.diffusion.p_mean_variance(self.model, x, t, **self.kwargs)["pred_xstart"]
        return Prediction(x0, self.diffusion._predict_eps_from_xstart(x, t, x0))

    def step(self, method: str, x: th.Tensor, level: Level, **kwargs: Any) -> dict[str, Any]:
        """The result of one of the diffusion's own sampling methods, such as p_sample, for x at a level."""
        sample = getattr(self.diffusion, method)
        return sample(self.model, x, _timesteps(x, level), **self.kwargs, **self.guidance, **kwargs)


def _timesteps(x: th.Tensor, level: Level) -> th.Tensor:
    return th.full((len(x),), level.t, device=x.device)


class Rule:
    """An update rule. It may keep state between steps: make a new instance for each trajectory.

    Both methods return a dict of `sample` and `pred_xstart`, of x's shape, as p_sample does.
    """

    order = 1  # of the error in the size of the steps
    skips = True  # can pass over timesteps of the process; otherwise each step must go to the adjacent one
    both_ways = False  # `step` also goes to noisier levels; otherwise `add_noise` does
    takes_cond_fn = False  # steps by the diffusion's own sampling methods, which a cond_fn guides
    noise_scale = 1.0  # factor of the noise that `add_noise` draws

    def step(self, denoise: Denoiser, x: th.Tensor, here: Level, there: Level) -> dict[str, Any]:
        """Take x [N, C, ...] from level `here` to the less noisy level `there`."""
        raise NotImplementedError

    def add_noise(self, x: th.Tensor, here: Level, there: Level) -> dict[str, Any]:
        """Take x to the noisier level `there`, by a draw from q(x_there | x_here) (DDPM eq. 2, over several steps).

        Nothing is predicted: `pred_xstart` is None.
        """
        self.restart()
        keep = there.alpha / here.alpha
        noise = self.noise_scale * draw_noise(x)
        return {"sample": keep * x + math.sqrt(1 - keep**2) * noise, "pred_xstart": None}

    def restart(self) -> None:
        """Forget earlier steps: x has left the trajectory."""

    def evaluations(self, steps: int) -> int:
        """How often the network is evaluated in `steps` steps down to the image."""
        return steps


class Ancestral(Rule):
    """A draw from p(x_{t-1} | x_t) (DDPM alg. 2), by the diffusion's p_sample."""

    skips, takes_cond_fn = False, True

    def step(self, denoise, x, here, there):
        return denoise.step("p_sample", x, here)


class DDIM(Rule):
    """DDIM (Song et al. 2020, eq. 12), by the diffusion's ddim_sample; towards noise by its ddim_reverse_sample.

    :param eta: 0 is deterministic and works in both directions, 1 is as noisy as ancestral sampling.
    """

    skips, takes_cond_fn = False, True

    def __init__(self, eta: float = 0.0):
        self.eta = eta

    def step(self, denoise, x, here, there):
        method = "ddim_sample" if there.t < here.t else "ddim_reverse_sample"
        return denoise.step(method, x, here, eta=self.eta)


def _straight(prediction: Prediction, there: Level) -> th.Tensor:
    """The straight line in x / alpha over sigma / alpha, up to `there`."""
    return there.alpha * prediction.x0 + there.sigma * prediction.eps


class Euler(Rule):
    """One evaluation a step in EDM's sigma (Karras et al. 2022, alg. 1 without its correction).

    The same straight line in x / alpha over sigma / alpha as DDIM with eta 0; it differs by churn and by its grid.
    :param noise_scale: S_noise, the factor of the noise that churn adds; see `timestep_grids.churned`.
    """

    def __init__(self, noise_scale: float = 1.0):
        self.noise_scale = noise_scale

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        return {"sample": _straight(prediction, there), "pred_xstart": prediction.x0}


class Heun(Euler):
    """Two evaluations a step, one in the last (Karras et al. 2022, alg. 1; alg. 2 with churn)."""

    order = 2

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        euler = _straight(prediction, there)
        if there.is_clean or -math.inf in (here.log_snr, there.log_snr):  # where the trapezoid is infinite
            return {"sample": euler, "pred_xstart": prediction.x0}
        length = there.alpha * (there.noise_to_signal - here.noise_to_signal)
        return {
            "sample": euler + length / 2 * (denoise(euler, there).eps - prediction.eps),
            "pred_xstart": prediction.x0,
        }

    def evaluations(self, steps):
        return 2 * steps - 1


class PLMS(Rule):
    """Linear multistep on the noise, of four predictions, followed by DDIM's step (Liu et al. 2022, eq. 9-12).

    The weights are those of evenly spaced steps. The first step evaluates twice.
    """

    order = 2  # the fourth order of the weights is lost in the transfer (Liu et al. 2022, sec. 3.4)
    WEIGHTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self) -> None:
        self.history: list[th.Tensor] = []  # the newest first

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        if here.log_snr == -math.inf:  # without signal only x_0 gives the direction
            return {"sample": _straight(prediction, there), "pred_xstart": prediction.x0}
        first = not self.history
        self.history = [prediction.eps, *self.history[:3]]
        eps = _weighted_sum(self.WEIGHTS[len(self.history) - 1], self.history)
        if first and not there.is_clean:
            eps = (eps + denoise(self._transfer(x, eps, here, there), there).eps) / 2
        return {"sample": self._transfer(x, eps, here, there), "pred_xstart": prediction.x0}

    @staticmethod
    def _transfer(x, eps, here, there):
        return there.alpha / here.alpha * (x - here.sigma * eps) + there.sigma * eps

    def restart(self):
        self.history = []

    def evaluations(self, steps):
        return steps + 1 if steps > 1 else 1


class Multistep(Rule):
    """Base of the rules in log-SNR: keeps earlier predictions of x_0 and their lambda.

    At both ends, where lambda is infinite, the rules use their first order, which is exact there in x_0.
    :param depth: how many predictions a step uses.
    """

    def __init__(self, depth: int = 2):
        self.depth = self.order = depth
        self.history: list[tuple[float, th.Tensor]] = []  # (lambda, x_0), the newest first

    def restart(self):
        self.history = []

    def _note(self, here: Level, x0: th.Tensor) -> None:
        """Keep as many predictions as the order uses; one at pure noise, where lambda is infinite, is dropped."""
        if self.history and self.history[0][0] == -math.inf:
            self.history = []
        self.history = [(here.log_snr, x0), *self.history[: self.depth - 1]]

    def _differences(self, h: float) -> list[tuple[float, th.Tensor]]:
        """(r_k, (D_k - D_0) / r_k) of the earlier predictions D_k, r_k h away in lambda; [] for an infinite h."""
        (here, newest), *earlier = self.history
        if not math.isfinite(h):
            return []
        return [(r, (x0 - newest) / r) for r, x0 in (((log_snr - here) / h, x0) for log_snr, x0 in earlier)]


class DPMSolverPP(Multistep):
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep: depth 2 is 2M (alg. 2), depth 3 is 3M.

    3M integrates the parabola through the last three predictions exactly; the authors' code halves the curvature.
    """

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        self._note(here, prediction.x0)
        h = there.log_snr - here.log_snr
        phi = -math.expm1(-h)
        out = there.sigma / here.sigma * x + there.alpha * phi * prediction.x0
        differences = self._differences(h)
        if len(differences) == 1:
            out = out + there.alpha * phi / 2 * differences[0][1]
        elif len(differences) == 2:
            (r1, d1), (r2, d2) = differences
            second = (d1 - d2) / (r1 - r2)  # half the second derivative of x_0 in units of h
            first = d1 - r1 * second
            out = out + there.alpha * ((1 - phi / h) * first + 2 * (phi / h - 1 + h / 2) / h * second)
        return {"sample": out, "pred_xstart": prediction.x0}


class SDEDPMSolverPP(Multistep):
    """SDE-DPM-Solver++ 2M: DPM-Solver++ 2M on the diffusion SDE (Lu et al. 2022, arXiv 2211.01095, eq. 18)."""

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        self._note(here, prediction.x0)
        h = there.log_snr - here.log_snr
        phi = -math.expm1(-2 * h)
        out = there.sigma / here.sigma * math.exp(-h) * x + there.alpha * phi * prediction.x0
        for _, difference in self._differences(h):
            out = out + there.alpha * phi / 2 * difference
        if there.is_clean:
            return {"sample": out, "pred_xstart": prediction.x0}
        return {"sample": out + there.sigma * math.sqrt(phi) * draw_noise(x), "pred_xstart": prediction.x0}


class Renoise(Rule):
    """Predicts x_0, adds fresh noise up to the next level, and so on (Song et al. 2023, arXiv 2303.01469, alg. 1).

    Exact for a consistency model, whose predictions are samples. Those of other models are averages, from which the
    samples get too little variance; the levels decide how much.
    """

    def step(self, denoise, x, here, there):
        x0 = denoise(x, here).x0
        out = x0 if there.is_clean else there.alpha * x0 + there.sigma * draw_noise(x)
        return {"sample": out, "pred_xstart": x0}


class UniPC(Multistep):
    """UniPC-p in its B_2 form: each evaluation also corrects the step that led to it (Zhao et al. 2023, alg. 1, 2).

    :param depth: p; correcting makes it a method of order p + 1.
    """

    def __init__(self, depth: int = 2):
        super().__init__(depth)
        self.order = depth + 1
        self.before: tuple[th.Tensor, Level, list[tuple[float, th.Tensor]]] | None = None

    def step(self, denoise, x, here, there):
        prediction = denoise(x, here)
        if self.before is not None:
            x = self._correct(here, prediction.x0, *self.before)
        self._note(here, prediction.x0)
        h = there.log_snr - here.log_snr
        differences = self._differences(h)
        self.before = (x, here, differences) if math.isfinite(h) else None
        return {"sample": self._update(x, self.history[0][1], here, there, differences), "pred_xstart": prediction.x0}

    def _correct(self, there, x0, x, here, differences):
        """x at `there` recomputed from x at `here`, with the prediction x0 at `there`."""
        newest = self.history[0][1]
        return self._update(x, newest, here, there, [*differences, (1.0, x0 - newest)])

    def _update(self, x, x0, here, there, differences):
        h = there.log_snr - here.log_snr
        phi = -math.expm1(-h)
        out = there.sigma / here.sigma * x + there.alpha * phi * x0
        weights = _unipc_weights([r for r, _ in differences], h)
        for weight, (_, difference) in zip(weights, differences):
            out = out + there.alpha * phi * weight * difference
        return out

    def restart(self):
        super().restart()
        self.before = None


def _unipc_weights(r: list[float], h: float) -> list[float]:
    """The weights a of UniPC's differences, relative to B_2(h) = e^h - 1 (Zhao et al. 2023, eq. 5)."""
    if len(r) <= 1:
        return [0.5] * len(r)  # which satisfies the conditions to the order (Zhao et al. 2023, sec. 3.1)
    hh = -h
    target, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for k in range(1, len(r) + 1):
        target.append(phi * factorial / math.expm1(hh))
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return np.linalg.solve(np.vander(r, increasing=True).T, target).tolist()


def _weighted_sum(weights: Sequence[float], tensors: Sequence[th.Tensor]) -> th.Tensor:
    return sum(weight * tensor for weight, tensor in zip(weights, tensors))  # type: ignore[return-value]


class BothWays(Rule):
    """A rule without noise or memory that goes towards noise as well: from an image to its latent (DDIM sec. 5.4).

    The image enters at t = 0, the least noisy level that the network knows.
    """

    both_ways = True

    def __init__(self, rule: Rule):
        self.rule, self.order, self.skips = rule, rule.order, rule.skips

    def step(self, denoise, x, here, there):
        return self.rule.step(denoise, x, here, there)

    def evaluations(self, steps):
        return self.rule.evaluations(steps)


class Inpaint(Rule):
    """Any rule, with the known pixels put back after each step (RePaint, Lugmayr et al. 2022, alg. 1).

    :param rule: paints the unknown pixels.
    :param image: x_0 [N, C, ...]; :param unknown: 1 where to paint, 0 where the image is known; broadcasts over it.
    The path decides on resampling, RePaint's other half: see `timestep_grids.repaint_path`.
    """

    def __init__(self, rule: Rule, image: th.Tensor, unknown: th.Tensor):
        self.rule, self.image, self.unknown = rule, image, unknown
        self.order, self.skips, self.takes_cond_fn = rule.order, rule.skips, rule.takes_cond_fn

    def step(self, denoise, x, here, there):
        out = self.rule.step(denoise, x, here, there)
        known = there.alpha * self.image + (0 if there.is_clean else there.sigma * draw_noise(x))
        return {
            **out,
            "sample": th.where(self.unknown > 0, out["sample"], known),
            "pred_xstart": th.where(self.unknown > 0, out["pred_xstart"], self.image),
        }

    def restart(self):
        self.rule.restart()

    def evaluations(self, steps):
        return self.rule.evaluations(steps)


RULES: dict[str, Callable[[], Rule]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "plms": PLMS,
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_3m": lambda: DPMSolverPP(3),
    "dpmpp_2m_sde": SDEDPMSolverPP,
    "unipc": UniPC,
    "unipc_3": lambda: UniPC(3),
    "euler": Euler,
    "heun": Heun,
    "renoise": Renoise,
}
NOISY = ("ancestral", "dpmpp_2m_sde", "renoise")  # these draw noise at each step


def sample_loop_progressive(
    rule: Rule, diffusion: GaussianDiffusion, model: Any, shape: Sequence[int], noise: th.Tensor | None = None,
    clip_denoised: bool = True, denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
    model_kwargs: dict[str, Any] | None = None, device: Any = None, progress: bool = False,
    noise_fn: Draw | None = None, path: Sequence[int] | None = None, cond_fn: Callable[..., th.Tensor] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Sample by any rule, yielding a dict of `sample` and `pred_xstart` [N, C, ...] after each step.

    Where the path goes to a noisier level, noise is added and `pred_xstart` is None, unless the rule goes both ways.
    :param shape: [N, C, ...] of the samples.
    :param noise: x at the path's first level; drawn unless given.
    :param denoised_fn, clip_denoised: see GaussianDiffusion.p_mean_variance.
    :param device: where to sample; the model's device unless given.
    :param progress: show a progress bar.
    :param noise_fn: gives noise shaped like the tensor it is called with; torch's global generator unless given.
    :param path: the timesteps to visit, of this diffusion; -1 is the clean image; T-1 down to -1 unless given.
    :param cond_fn: guides each step of a rule that takes it; see GaussianDiffusion.condition_mean.
    Raises ValueError for a path of fewer than two levels, for one that skips timesteps where the rule cannot, and for a
    cond_fn that the rule does not take.
    """
    if cond_fn is not None and not rule.takes_cond_fn:
        raise ValueError(f"{type(rule).__name__} does not take a cond_fn: guide the model instead")
    path = range(diffusion.num_timesteps - 1, -2, -1) if path is None else path
    if len(path) < 2:
        raise ValueError(f"a path needs at least two levels, got {list(path)}")
    steps = [(here, there) for here, there in pairwise(path) if there < here or rule.both_ways]
    if not rule.skips and any(abs(there - here) != 1 for here, there in steps):
        raise ValueError(f"{type(rule).__name__} goes from each timestep to the next: use respaced() to skip some")
    levels = levels_of(diffusion)
    denoise = Denoiser(
        diffusion, model, cond_fn, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
    )

    def move(x, here, there):
        start, end = levels[here + 1], levels[there + 1]
        if there > here and not rule.both_ways:
            return rule.add_noise(x, start, end)
        return rule.step(denoise, x, start, end)

    yield from trajectory(move, start_noise(model, shape, noise, device, noise_fn), path, progress, noise_fn)


def sample_loop(
    rule: Rule, diffusion: GaussianDiffusion, model: Any, shape: Sequence[int], **kwargs: Any
) -> th.Tensor:  # fmt: skip
    """The samples [N, C, ...] at the end of sample_loop_progressive, whose arguments it takes."""
    return last_sample(sample_loop_progressive(rule, diffusion, model, shape, **kwargs))
