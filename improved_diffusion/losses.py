"""Likelihood terms: KL of Gaussians, and the Gaussian discretized to 256 levels. All values are in nats."""

from __future__ import annotations

import math

import torch as th


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    The arguments broadcast; some may be Python numbers, at least one must be a tensor.
    """
    tensor = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, th.Tensor)), None)
    if tensor is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments")
    # exp() needs tensors; the means may stay numbers.
    logvar1, logvar2 = (v if isinstance(v, th.Tensor) else th.tensor(v).to(tensor) for v in (logvar1, logvar2))
    return 0.5 * (-1.0 + logvar2 - logvar1 + th.exp(logvar1 - logvar2) + ((mean1 - mean2) ** 2) * th.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """The normal CDF, approximated by a tanh (Page 1977), as published checkpoints were trained."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * th.pow(x, 3))))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """log P(x) in nats, elementwise, under a Gaussian discretized to 256 levels (DDPM eq. 13).

    :param x: images in [-1, 1], from uint8 by x / 127.5 - 1.
    :param means, log_scales: of x's shape; the Gaussian's mean and the log of its standard deviation.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, means {tuple(means.shape)}, log_scales {tuple(log_scales.shape)} must agree in shape"
        )
    centered = x - means
    # Both ends of the level at once: half as many operations.
    ends = th.stack([centered + 1.0 / 255.0, centered - 1.0 / 255.0])
    cdf_above, cdf_below = approx_standard_normal_cdf(th.exp(-log_scales) * ends)
    # The outermost bins are open, so that the probabilities of the levels add up to 1.
    cdf_above = th.where(x > 0.999, 1.0, cdf_above)
    cdf_below = th.where(x < -0.999, 0.0, cdf_below)
    return th.log((cdf_above - cdf_below).clamp(min=1e-12))


def nats_to_bits(nats):
    """Nats in bits."""
    return nats / math.log(2.0)
