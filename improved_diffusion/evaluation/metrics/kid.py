"""The kernel inception distance (KID) of samples and real images in the features of a network."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch as th

from .arrays import Device, is_cpu, on_device

# A block of the kernel matrix and its cubes fit in a CPU's cache; an accelerator is busy with larger ones.
ROWS, COLUMNS = 512, 2560
ON_ACCELERATOR = 1 << 12


class KernelDistance(NamedTuple):
    """An unbiased estimate, which may be negative, and its standard error."""

    value: float
    standard_error: float


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, blocks: int = 20, device: Device = "cpu"
) -> KernelDistance:
    """The squared maximum mean discrepancy of two sets with the kernel (x y / D + 1)^3.

    (Binkowski et al. 2018, arXiv 1801.01401, eq. 3 and sec. 4.) All pairs are used, not random subsets, so that the
    result is deterministic; the standard error is the jackknife's over blocks of both sets.
    :param features: [N, D]; :param reference: [M, D]; both at least 2 * blocks.
    :param device: what computes it; it must have float64.
    Raises ValueError for fewer, and for sets of different widths.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of {features.shape[1]} and {reference.shape[1]} dimensions cannot be compared")
    if min(len(features), len(reference)) < 2 * blocks:
        raise ValueError(f"{min(len(features), len(reference))} images are too few: give at least {2 * blocks}")
    # Shuffled, so that blocks are alike even if the images come class by class.
    rng = np.random.default_rng(0)
    x, y = (_extended(on_device(array[rng.permutation(len(array))], device)) for array in (features, reference))
    of_x, of_y = _bounds(len(x), blocks), _bounds(len(y), blocks)
    groups = [*x.tensor_split(of_x[1:-1].tolist()), *y.tensor_split(of_y[1:-1].tolist())]
    count, width = len(x) + len(y), x.shape[1]
    # Whichever takes fewer multiplications: pairs count^2 width, moments 2/3 count width^3.
    sums = (_sums_by_pairs(groups) if count < 2 / 3 * width**2 else _sums_by_moments(groups)).cpu().numpy()
    xx, yy, xy = sums[:blocks, :blocks], sums[blocks:, blocks:], sums[:blocks, blocks:]
    # A point and itself are not a pair.
    xx -= np.diag(np.add.reduceat(_kernel_of_itself(x), of_x[:-1]))
    yy -= np.diag(np.add.reduceat(_kernel_of_itself(y), of_y[:-1]))
    n, m = np.diff(of_x), np.diff(of_y)

    def estimate(kept: np.ndarray) -> float:
        n_kept, m_kept = n[kept].sum(), m[kept].sum()
        both = np.ix_(kept, kept)
        within = xx[both].sum() / (n_kept * (n_kept - 1)) + yy[both].sum() / (m_kept * (m_kept - 1))
        return float(within - 2 * xy[both].sum() / (n_kept * m_kept))

    every = np.arange(blocks)
    without = np.array([estimate(np.delete(every, block)) for block in every])
    variance = (blocks - 1) / blocks * ((without - without.mean()) ** 2).sum()
    return KernelDistance(estimate(every), float(np.sqrt(variance)))


def _bounds(count: int, blocks: int) -> np.ndarray:
    """Where each of the blocks starts, and the end: [blocks + 1]."""
    return np.linspace(0, count, blocks + 1).astype(int)


def _extended(features: th.Tensor) -> th.Tensor:
    """[N, D + 1] such that the product of two rows is x y / D + 1. In float64: the distance is a small difference of
    large sums, and float32 does not have enough digits for it."""
    count, width = features.shape
    result = th.ones(count, width + 1, dtype=th.float64, device=features.device)
    result[:, :-1] = features
    result[:, :-1] /= math.sqrt(width)
    return result


def _kernel_of_itself(x: th.Tensor) -> np.ndarray:
    return (th.linalg.vector_norm(x, dim=1) ** 6).cpu().numpy()


def _sums_by_pairs(groups: list[th.Tensor]) -> th.Tensor:
    """The sum of (x y)^3 over all x of one group [N, D] and all y of another: [groups, groups]."""
    sums = groups[0].new_zeros(len(groups), len(groups))
    for a, x in enumerate(groups):
        for b in range(a + 1):
            sums[a, b] = sums[b, a] = _sum_of_cubes(x, groups[b])
    return sums


def _sums_by_moments(groups: list[th.Tensor]) -> th.Tensor:
    """The same, as that sum is the product of the groups' third moments, sum x_i x_j x_k: linear in N."""
    sums, width = groups[0].new_zeros(len(groups), len(groups)), groups[0].shape[1]
    for i in range(width):
        rest = width - i
        moments = sums.new_empty(len(groups), rest, rest)  # those of i and all j, k >= i
        for moment, group in zip(moments, groups):
            tail = group[:, i:]
            th.mm((tail * tail[:, :1]).T, tail, out=moment)
        # How many permutations of (i, j, k) each stands for; where j or k equals i, it is counted twice.
        orders = sums.new_full((rest, rest), 3.0)
        orders[0] = orders[:, 0] = 1.5
        orders[0, 0] = 1
        flat = moments.flatten(1)
        sums += (flat * orders.flatten()) @ flat.T
    return sums


def _sum_of_cubes(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    """The sum of cubes of the products of all rows of x with all rows of y."""
    rows, columns = (ROWS, COLUMNS) if is_cpu(x.device) else (ON_ACCELERATOR, ON_ACCELERATOR)
    total, (product, square) = x.new_zeros(()), x.new_empty(2, min(rows, len(x)) * min(columns, len(y)))
    for left in x.split(rows):
        for right in y.split(columns):
            size = len(left) * len(right)
            th.mm(left, right.T, out=product[:size].view(len(left), len(right)))
            total += th.dot(product[:size], th.square(product[:size], out=square[:size]))
    return total
