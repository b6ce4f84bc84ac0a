"""The best possible denoiser of a finite set of images, in closed form: its error is the floor of the loss.

For images x_1..x_N, each as likely as the others, and x_t = a x_0 + s eps (DDPM eq. 4), the posterior of x_0 given x_t
gives x_i the weight w_i ~ exp(-|x_t - a x_i|^2 / (2 s^2)). The best prediction of x_0 is its mean, and the expected
squared error of that is its variance: no function of x_t has a smaller one (Xu et al. 2025, arXiv 2506.13763).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch as th


class Posterior(NamedTuple):
    """The posterior of x_0 given each of M noisy images: float64 [M]."""

    variance: th.Tensor  # the least expected squared error of x_0, mean over the pixels
    concentration: th.Tensor  # the sum of squared weights: 1/K where K images are equally likely, and no other


def posterior(
    x_0: th.Tensor, noise: th.Tensor, own: th.Tensor, alpha_bar: th.Tensor, parts: Iterable[th.Tensor]
) -> Posterior:
    """The exact posterior of x_0 given x_t = a x_0 + s noise over a set of points.

    :param x_0, noise: float64 [M, D].
    :param own: int64 [M], the numbers of x_0 among the points.
    :param alpha_bar: float64 [M], a^2 = 1 - s^2, below 1.
    :param parts: all points, part by part in the order of their numbers: float64 [n, D].
    Memory is that of one part and of a few times M x (n + D) numbers.
    """
    m, d = x_0.shape
    a, variance = alpha_bar.sqrt()[:, None], (1 - alpha_bar)[:, None]
    scaled = a / variance * (a * x_0 + variance.sqrt() * noise)
    precision = (a * a / (2 * variance)).squeeze(1)
    # log w_i - log w_own. Sums over the other points, times exp(-top): without the own point, nothing cancels where the
    # others' share of the weight is far below the rounding of 1.
    origin = (scaled * x_0).sum(1) - precision * x_0.square().sum(1)
    top = x_0.new_zeros(m)
    weight, squared_weights, norms, points = (x_0.new_zeros(m), x_0.new_zeros(m), x_0.new_zeros(m), x_0.new_zeros(m, d))
    start = 0
    for part in parts:
        norm = part.square().sum(1)
        log_w = (scaled @ part.T).sub_(precision[:, None] * norm).sub_(origin[:, None])
        here = ((own >= start) & (own < start + len(part))).nonzero().squeeze(1)
        log_w[here, own[here] - start] = -th.inf
        start += len(part)
        new_top = th.maximum(top, log_w.amax(1))
        shrink = (top - new_top).exp()
        w = log_w.sub_(new_top[:, None]).exp_()
        weight = weight * shrink + w.sum(1)
        squared_weights = squared_weights * shrink**2 + w.square().sum(1)
        norms = norms * shrink + w @ norm
        points = points * shrink[:, None] + w @ part
        top = new_top
    total = (-top).exp() + weight
    weight, norms, points = weight / total, norms / total, points / total[:, None]
    shift = points - weight[:, None] * x_0  # of the mean, from x_0
    from_x_0 = norms - 2 * (points * x_0).sum(1) + weight * x_0.square().sum(1)  # mean squared distance from x_0
    squares = ((-2 * top).exp() + squared_weights) / total**2
    return Posterior((from_x_0 - shift.square().sum(1)).clamp(min=0) / d, squares)


def error_factor(alpha_bar: np.ndarray, target: str) -> np.ndarray:
    """The squared error of a prediction of `target` for each unit of squared error of the x_0 that it means.

    :param target: x_0, epsilon or v (Salimans & Ho 2022).
    """
    if target == "x_0":
        return np.ones_like(alpha_bar)
    if target == "epsilon":  # eps = (x_t - a x_0) / s
        return alpha_bar / (1 - alpha_bar)
    if target == "v":  # v = a eps - s x_0 = (a x_t - x_0) / s
        return 1 / (1 - alpha_bar)
    raise ValueError(f"unknown target {target!r}: choose x_0, epsilon or v")
