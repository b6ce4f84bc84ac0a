"""One sampling loop, and one small update rule per method.

A rule turns x at one noise level into x at the next. It knows neither the network, nor clipping, nor where the noise
comes from: `predict(x, level)` gives a Prediction, `draw(x)` gives noise of x's shape. Throughout x_t = alpha x_0 +
sigma eps with alpha^2 + sigma^2 = 1, and log_snr is lambda = log(alpha / sigma) (Lu et al. 2022, arXiv 2206.00927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th


class Prediction(NamedTuple):
    """What the model says of x at t, after clipping; all of x's shape."""

    x0: th.Tensor
    eps: th.Tensor
    mean: th.Tensor
    log_variance: th.Tensor


class Level(NamedTuple):
    """A noise level for each sample; t = -1 is the clean image.

    The published rules compute with the tensors, as published; the others with the numbers derived from `log_snr`,
    which is there where all samples share a level.
    """

    t: th.Tensor  # [N] int64
    alpha_bar: th.Tensor  # [N, 1, ...] float32
    log_snr: float = math.nan  # from -inf (pure noise) to inf (the clean image)

    @property
    def alpha(self) -> float:
        """What is left of the image's amplitude."""
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


class Step(NamedTuple):
    """The outcome of a rule's step; both of x's shape."""

    x: th.Tensor
    x0: th.Tensor | None  # what was predicted on the way; None where noise was added instead


Predict = Callable[[th.Tensor, Level], Prediction]
Draw = Callable[[th.Tensor], th.Tensor]


class Rule:
    """An update rule. A fresh instance serves one trajectory, so that it may keep state between steps."""

    order = 1  # of the error in the size of the steps
    skips = True  # may pass over timesteps of the process; otherwise each step must go to the next one

    def step(self, predict: Predict, x: th.Tensor, here: Level, there: Level, draw: Draw) -> Step:
        """x [N, C, ...] at level `here` taken to the less noisy level `there`."""
        raise NotImplementedError

    def rise(self, predict: Predict, x: th.Tensor, here: Level, there: Level, draw: Draw) -> Step:
        """x taken to the noisier level `there`: a draw from q(x_there | x_here) (DDPM eq. 2, over several steps)."""
        self.restart()
        keep = there.alpha / here.alpha
        return Step(keep * x + math.sqrt(1 - keep**2) * draw(x), None)

    def restart(self) -> None:
        """Forget earlier steps: x has left the trajectory."""

    def evaluations(self, steps: int) -> int:
        """How often the network is evaluated on the way down, in so many steps."""
        return steps


class Ancestral(Rule):
    """A draw from p(x_{t-1} | x_t) (DDPM alg. 2)."""

    skips = False  # that t-1 is the next timestep of the process

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        # Drawn at the last step too, where it is not used: seeds depend on the order of the draws.
        noise = draw(x)
        return Step(
            prediction.mean + _unless_clean(there, th.exp(0.5 * prediction.log_variance) * noise), prediction.x0
        )


class DDIM(Rule):
    """DDIM (Song et al. 2020, eq. 12): deterministic for eta = 0, and then good both ways; ancestral for eta = 1."""

    def __init__(self, eta: float = 0.0):
        self.eta = eta

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        noise = draw(x)
        direction = 1 - there.alpha_bar
        if self.eta:
            sigma = self.eta * th.sqrt((1 - there.alpha_bar) / (1 - here.alpha_bar))
            sigma = sigma * th.sqrt(1 - here.alpha_bar / there.alpha_bar)
            # Rounding may leave less than nothing where almost all is noise.
            direction = (direction - sigma**2).clamp(min=0)
        mean = prediction.x0 * th.sqrt(there.alpha_bar) + th.sqrt(direction) * prediction.eps
        return Step(mean + _unless_clean(there, sigma * noise) if self.eta else mean, prediction.x0)


def _unless_clean(level: Level, noise: th.Tensor) -> th.Tensor:
    """Zero where the level is the clean image, to which no noise is added."""
    return (level.t >= 0).to(noise).view(-1, *[1] * (noise.ndim - 1)) * noise


def _straight(prediction: Prediction, there: Level) -> th.Tensor:
    """The straight line in x / alpha over sigma / alpha, up to `there`."""
    return there.alpha * prediction.x0 + there.sigma * prediction.eps


class Euler(Rule):
    """One evaluation a step in EDM's sigma (Karras et al. 2022, alg. 1 without its correction).

    Its straight line in x / alpha over sigma / alpha is that of DDIM with eta 0; churn and the grid set them apart.
    :param noise_scale: S_noise, of what churn adds; see `timestep_grids.churned`.
    """

    def __init__(self, noise_scale: float = 1.0):
        self.noise_scale = noise_scale

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        return Step(_straight(prediction, there), prediction.x0)

    def rise(self, predict, x, here, there, draw):
        return super().rise(predict, x, here, there, lambda x: self.noise_scale * draw(x))


class Heun(Euler):
    """Two evaluations a step, one in the last (Karras et al. 2022, alg. 1; alg. 2 with churn)."""

    order = 2

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        euler = _straight(prediction, there)
        if there.is_clean or -math.inf in (here.log_snr, there.log_snr):  # where the trapezoid has no end
            return Step(euler, prediction.x0)
        length = there.alpha * (there.noise_to_signal - here.noise_to_signal)
        return Step(euler + length / 2 * (predict(euler, there).eps - prediction.eps), prediction.x0)

    def evaluations(self, steps):
        return 2 * steps - 1


class PLMS(Rule):
    """Linear multistep on the noise, four deep, and DDIM's step with what it gives (Liu et al. 2022, eq. 9-12).

    Its weights are those of evenly spaced steps. The first step evaluates twice.
    """

    order = 2  # the fourth order of the weights is lost in the transfer (Liu et al. 2022, sec. 3.4)
    WEIGHTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self) -> None:
        self.history: list[th.Tensor] = []  # the newest first

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        if here.log_snr == -math.inf:  # from where only x_0 says where to go
            return Step(_straight(prediction, there), prediction.x0)
        first = not self.history
        self.history = [prediction.eps, *self.history[:3]]
        eps = _weighted_sum(self.WEIGHTS[len(self.history) - 1], self.history)
        if first and not there.is_clean:
            eps = (eps + predict(self._transfer(x, eps, here, there), there).eps) / 2
        return Step(self._transfer(x, eps, here, there), prediction.x0)

    @staticmethod
    def _transfer(x, eps, here, there):
        return there.alpha / here.alpha * (x - here.sigma * eps) + there.sigma * eps

    def restart(self):
        self.history = []

    def evaluations(self, steps):
        return steps + 1 if steps > 1 else 1


class Multistep(Rule):
    """What the rules in log-SNR share: earlier predictions of x_0, and how far back they lie.

    At either end, where lambda is infinite, they fall back to their first order, which is exact there in x_0.
    :param depth: how many predictions a step uses.
    """

    def __init__(self, depth: int = 2):
        self.depth = self.order = depth
        self.history: list[tuple[float, th.Tensor]] = []  # (lambda, x_0), the newest first

    def restart(self):
        self.history = []

    def _note(self, here: Level, x0: th.Tensor) -> None:
        """Keep as many predictions as the order uses; one made at pure noise has no place in lambda."""
        if self.history and self.history[0][0] == -math.inf:
            self.history = []
        self.history = [(here.log_snr, x0), *self.history[: self.depth - 1]]

    def _differences(self, h: float) -> list[tuple[float, th.Tensor]]:
        """(r_k, (D_k - D_0) / r_k) for the earlier predictions D_k, r_k h away in lambda; none for an infinite h."""
        (here, newest), *earlier = self.history
        if not math.isfinite(h):
            return []
        return [(r, (x0 - newest) / r) for r, x0 in (((log_snr - here) / h, x0) for log_snr, x0 in earlier)]


class DPMSolverPP(Multistep):
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep: depth 2 is 2M (alg. 2), depth 3 is 3M.

    3M integrates the parabola through the last three predictions exactly; its authors' code counts the curvature half.
    """

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
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
        return Step(out, prediction.x0)


class SDEDPMSolverPP(Multistep):
    """SDE-DPM-Solver++ 2M: DPM-Solver++ 2M on the diffusion SDE (Lu et al. 2022, arXiv 2211.01095, eq. 18)."""

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        self._note(here, prediction.x0)
        h = there.log_snr - here.log_snr
        phi = -math.expm1(-2 * h)
        out = there.sigma / here.sigma * math.exp(-h) * x + there.alpha * phi * prediction.x0
        for _, difference in self._differences(h):
            out = out + there.alpha * phi / 2 * difference
        if there.is_clean:
            return Step(out, prediction.x0)
        return Step(out + there.sigma * math.sqrt(phi) * draw(x), prediction.x0)


class UniPC(Multistep):
    """UniPC-p in its B_2 form: each evaluation also corrects the step that led to it (Zhao et al. 2023, alg. 1, 2).

    :param depth: p; correcting makes it a method of order p + 1.
    """

    def __init__(self, depth: int = 2):
        super().__init__(depth)
        self.order = depth + 1
        self.before: tuple[th.Tensor, Level, list[tuple[float, th.Tensor]]] | None = None

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here)
        if self.before is not None:
            x = self._correct(here, prediction.x0, *self.before)
        self._note(here, prediction.x0)
        h = there.log_snr - here.log_snr
        differences = self._differences(h)
        self.before = (x, here, differences) if math.isfinite(h) else None
        return Step(self._update(x, self.history[0][1], here, there, differences), prediction.x0)

    def _correct(self, there, x0, x, here, differences):
        """x at `there` once more, from x at `here`, now that the prediction x0 at `there` is known."""
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
    """A rule without noise or memory, walked up as well as down: from an image to its noise (DDIM sec. 5.4)."""

    def __init__(self, rule: Rule):
        self.rule, self.order = rule, rule.order

    def step(self, predict, x, here, there, draw):
        return self.rule.step(predict, x, here, there, draw)

    def rise(self, predict, x, here, there, draw):
        return self.rule.step(predict, x, here, there, draw)

    def evaluations(self, steps):
        return self.rule.evaluations(steps)


class Inpaint(Rule):
    """Any rule, with the known pixels put back after each step (RePaint, Lugmayr et al. 2022, alg. 1).

    :param rule: what paints the rest.
    :param image: x_0 [N, C, ...]; :param unknown: 1 where it is to be painted, 0 where it is known; broadcasts over it.
    Resampling, RePaint's other half, is a matter of the path: see `timestep_grids.repaint_path`.
    """

    def __init__(self, rule: Rule, image: th.Tensor, unknown: th.Tensor):
        self.rule, self.image, self.unknown = rule, image, unknown
        self.order, self.skips = rule.order, rule.skips

    def step(self, predict, x, here, there, draw):
        painted, x0 = self.rule.step(predict, x, here, there, draw)
        assert x0 is not None  # on the way down there is a prediction
        known = there.alpha * self.image + (0 if there.is_clean else there.sigma * draw(x))
        return Step(th.where(self.unknown > 0, painted, known), th.where(self.unknown > 0, x0, self.image))

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
}


def sample_loop(
    rule: Rule, predict: Predict, x: th.Tensor, levels: Sequence[Level], draw: Draw, progress: bool = False
) -> Iterator[dict[str, Any]]:
    """Walk x along `levels`, yielding `sample` and `pred_xstart` after each step.

    Where the levels rise, noise is added and `pred_xstart` is None, unless the rule can walk up by itself.
    """
    steps = range(len(levels) - 1)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps)
    for k in steps:
        here, there = levels[k], levels[k + 1]
        move = rule.rise if there.log_snr < here.log_snr else rule.step
        with th.no_grad():
            x, x0 = move(predict, x, here, there, draw)
        yield {"sample": x, "pred_xstart": x0}
