"""Moving averages of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from torch._utils import _unflatten_dense_tensors

from ..checkpoints.averages import LARGEST_SHARE, initial_share
from ..logs import logger
from ..utils.text import counted

FEWEST_STEPS = 10  # with fewer no average can forget the initial weights


class Followed:
    """Parameters in the form in which averages follow them: as they are on CPUs, elsewhere as one vector.

    A device would take longer to start an operation for each of them than to copy them all; a CPU would not. The views
    that the vector is made of are kept until a parameter lies elsewhere.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._parts: list[th.Tensor] = []
        self._copied: list[int] = []  # those whose memory is in another order (channels_last), which views cannot join

    def __call__(self, params: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
        if len(params) == 1 or params[0].device.type == "cpu":
            return params
        return [self._flat(params)]

    def _flat(self, params: Sequence[th.Tensor]) -> th.Tensor:
        addresses = [p.data_ptr() for p in params]
        if addresses != self._addresses:
            self._addresses = addresses
            self._parts = [p.detach().reshape(-1) for p in params]
            self._copied = [i for i, part in enumerate(self._parts) if part.data_ptr() != addresses[i]]
        for i in self._copied:
            self._parts[i] = params[i].detach().reshape(-1)
        return th.cat(self._parts)


class _Average:
    """Base of the averages: average <- average + share * (parameters - average), in one pass over all parameters."""

    label: str  # in the file's name, ema_LABEL_NNNNNN.pt
    restarts = True  # where training begins anew (TrainLoop's `diffusion.restarts`); otherwise it is of the whole run

    def __init__(self, params: Sequence[th.Tensor]):
        self.parts = [p.detach().clone() for p in Followed()(params)]
        self.like = [th.empty(p.shape, device="meta") for p in params]

    def share(self, step: int) -> float:
        """How far the average moves towards the parameters at a step (from 0)."""
        raise NotImplementedError

    def initial_share(self, steps: int) -> float:
        """The share, in [0, 1], of the first parameters in the average after so many steps."""
        raise NotImplementedError

    @property
    def description(self) -> dict[str, Any]:
        """The average's entry in a checkpoint's description."""
        raise NotImplementedError

    def update(self, followed: Sequence[th.Tensor], applied: th.Tensor, step: int) -> None:
        """Move towards what `Followed` makes of the parameters; `applied`, on the device, is 1, or 0 for no change."""
        self._move(followed, self.share(step) * applied)

    @th.no_grad()
    def _move(self, followed: Sequence[th.Tensor], share: th.Tensor) -> None:
        th._foreach_lerp_(self.parts, tuple(followed), [share] * len(self.parts))

    @property
    def params(self) -> list[th.Tensor]:
        """The average in the parameters' shapes."""
        is_joined = len(self.parts) < len(self.like)
        return list(_unflatten_dense_tensors(self.parts[0], self.like) if is_joined else self.parts)

    def load(self, params: Sequence[th.Tensor]) -> None:
        """Continue from the given values."""
        for own, value in zip(self.params, params, strict=True):
            own.copy_(value.detach())


class ParameterEMA(_Average):
    """ema <- rate * ema + (1 - rate) * parameter.

    :param rate: in [0, 1).
    :param params: the initial values.
    :param warmup: start fast: at step s the rate is min(rate, (1 + s) / (10 + s)).
    """

    def __init__(self, rate: float, params: Sequence[th.Tensor], warmup: bool = False):
        super().__init__(params)
        self.rate, self.warmup = rate, warmup
        self.label = f"{rate}"

    def share(self, step: int) -> float:
        return 1 - (min(self.rate, (1 + step) / (10 + step)) if self.warmup else self.rate)

    def initial_share(self, steps: int) -> float:
        return initial_share(self.rate, steps, self.warmup)

    @property
    def description(self) -> dict[str, Any]:
        return {"ema_rate": self.rate}


class PowerEMA(_Average):
    """The power-function average (Karras et al. 2023, "EDM2", sec. 3.1), whose length grows with the training.

    After t steps it is the mean of the parameters so far, weighted by the profile p(tau) = (gamma + 1) tau^gamma /
    t^(gamma+1) on [0, t]; the parameters after step n, n = 1 ... t, count for the times from n - 1 to n.

    :param sigma_rel: the profile's standard deviation as a fraction of t, in (0, 12^-1/2).
    :param params: the values before the first step, which the first update replaces.
    """

    restarts = False

    def __init__(self, sigma_rel: float, params: Sequence[th.Tensor]):
        super().__init__(params)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)
        self.label = f"sigma_rel{sigma_rel}"

    def update(self, followed: Sequence[th.Tensor], applied: th.Tensor, step: int) -> None:
        # Skipped steps count too: the parameters stay the same for that time.
        self._move(followed, self.share(step) * th.ones_like(applied))

    def share(self, step: int) -> float:
        return 1 - (1 - 1 / (step + 1)) ** (self.gamma + 1)  # 1 - beta_gamma(t) with t = step + 1

    def initial_share(self, steps: int) -> float:
        return 0.0 if steps else 1.0

    @property
    def description(self) -> dict[str, Any]:
        return {"ema_sigma_rel": self.sigma_rel}


def warn_of_slow_averages(emas: Sequence[_Average], steps: int) -> None:
    """Warn before training of averages that will still hold much of the first weights after all of its steps.

    :param steps: of the whole run; 0: not known.
    """
    slow = [ema for ema in emas if steps and ema.initial_share(steps) > LARGEST_SHARE]
    if not slow:
        return
    shares = ", ".join(f"{ema.label}: {ema.initial_share(steps):.1%}" for ema in slow)
    warmup = "" if any(getattr(ema, "warmup", False) for ema in slow) else "--ema_warmup True, or "
    remedy = "train for more steps" if steps < FEWEST_STEPS else f"give {warmup}--ema_rate {forgetting_rate(steps):g}"
    logger.warn(
        f"after {counted(steps, 'step')} the moving average would still be the initial weights in part (--ema_rate "
        f"{shares}), and its samples noise: {remedy}"
    )


def forgetting_rate(steps: int) -> float:
    """A rate, 1 minus a round number, whose average has forgotten the first weights after so many steps."""
    return 1 - float(f"{max(min(10 / steps, 0.5), 1e-4):.0e}")


def gamma_of(sigma_rel: float) -> float:
    """The exponent, not negative, whose profile has the given relative width.

    Raises ValueError outside (0, 12^-1/2): the plain mean, gamma = 0, is the widest profile.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel} must lie between 0 and 12^-1/2 = 0.2887")
    s = sigma_rel**-2
    # sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1. With s > 12 this cubic has exactly one positive root.
    return float(max(root.real for root in np.roots([1, 7, 16 - s, 12 - s])))


def profile_products(steps: Any, gammas: Any, other_steps: Any, other_gammas: Any) -> np.ndarray:
    """<p, q>, the integral of the product of two profiles, for all pairs. Float64, [len(steps), len(other_steps)].

    With s <= t, the profile of s and a and that of t and b share the times [0, s], so that (EDM2 alg. 3)
    <p, q> = (a+1) (b+1) / (s^(a+1) t^(b+1)) * integral_0^s tau^(a+b) dtau = (a+1) (b+1) / (a+b+1) * (s/t)^b / t,
    where nothing overflows, however large the exponents are.
    """
    t, g = (np.asarray(v, np.float64)[:, None] for v in (steps, gammas))
    u, h = (np.asarray(v, np.float64)[None, :] for v in (other_steps, other_gammas))
    later, exponent_of_later = np.maximum(t, u), np.where(t > u, g, h)
    return (g + 1) * (h + 1) / (g + h + 1) * (np.minimum(t, u) / later) ** exponent_of_later / later


def posthoc_weights(steps: Any, gammas: Any, target_step: float, target_gamma: float) -> np.ndarray:
    """The weights of stored power-function averages whose sum is nearest to another one (EDM2 sec. 3.2, alg. 3).

    An average is the integral over time of its profile times the parameters. So with the profiles p_i of the stored
    averages and q of the wanted one, the weights w minimise the mean square of sum_i w_i p_i - q: A w = b with
    A_ij = <p_i, p_j> and b_i = <p_i, q>. Added here: sum_i w_i = 1, so that constant parameters are reproduced exactly;
    w moves along A^-1 1, which increases the error least.

    :param steps: the training steps done before each average was stored, at least 1; a snapshot's "step".
    :param gammas: the exponents of the stored averages.
    Returns float64 [len(steps)], 0 where the step is after target_step. `profile_error` gives the remaining error.
    Raises ValueError where all steps are after it.
    """
    steps, gammas = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    used = steps <= target_step
    if not used.any():
        raise ValueError(f"no average was stored up to step {target_step}")
    t, g = steps[used], gammas[used]
    scale = np.sqrt((2 * g + 1) * t) / (g + 1)  # 1 / |p_i|, so that A has ones on its diagonal
    products = profile_products(t, g, t, g) * scale[:, None] * scale
    targets = profile_products(t, g, [target_step], [target_gamma])[:, 0] * scale
    nearest, unit = _solve(products, np.stack([targets, scale], axis=1)).T * scale
    weights = np.zeros(len(steps))
    weights[used] = nearest + unit * (1 - nearest.sum()) / unit.sum()
    return weights


def _solve(products: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A^-1 right; the shortest least-squares solution where profiles are linearly dependent up to rounding."""
    try:
        # The diagonal of the Cholesky factor: each profile's distance from the span of those before it.
        if np.linalg.cholesky(products).diagonal().min() > 1e-5:
            return np.linalg.solve(products, right)
    except np.linalg.LinAlgError:
        pass
    return np.linalg.lstsq(products, right, rcond=1e-12)[0]


def profile_error(steps: Any, gammas: Any, weights: Any, target_step: float, target_gamma: float) -> float:
    """The relative error |sum_i w_i p_i - q| / |q| of a weighted sum of stored profiles p_i against the wanted q."""
    steps, gammas = (
        np.append(np.asarray(v, np.float64), last) for v, last in ((steps, target_step), (gammas, target_gamma))
    )
    difference = np.append(weights, -1.0)
    products = profile_products(steps, gammas, steps, gammas)
    return float(np.sqrt(max(difference @ products @ difference, 0.0) / products[-1, -1]))
