"""The kernel inception distance: how far samples are from real images in the space of some network's features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROWS = 2048  # of the kernel's matrix at once


class KernelDistance(NamedTuple):
    """An unbiased estimate, which may be below 0, and its standard error."""

    value: float
    standard_error: float


def kernel_distance(features: np.ndarray, reference: np.ndarray, blocks: int = 20) -> KernelDistance:
    """The squared maximum mean discrepancy of two sets with the kernel (x y / D + 1)^3.

    (Binkowski et al. 2018, arXiv 1801.01401, eq. 3 and sec. 4.) All pairs are used, rather than random subsets, so that
    the number is the same every time; the standard error is the jackknife's over blocks of both sets.
    :param features: [N, D]; :param reference: [M, D]; both at least 2 * blocks.
    Raises ValueError for fewer, and for sets of other widths.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of {features.shape[1]} and {reference.shape[1]} dimensions cannot be compared")
    if min(len(features), len(reference)) < 2 * blocks:
        raise ValueError(f"{min(len(features), len(reference))} images are too few: take at least {2 * blocks}")
    # Blocks are to be alike, whatever order the images come in: class by class, for one.
    rng = np.random.default_rng(0)
    x, y = (np.asarray(array, dtype=np.float64)[rng.permutation(len(array))] for array in (features, reference))
    of_x, of_y = _bounds(len(x), blocks), _bounds(len(y), blocks)
    xx, yy, xy = _block_sums(x, x, of_x, of_x), _block_sums(y, y, of_y, of_y), _block_sums(x, y, of_x, of_y)
    # A point is no pair with itself.
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


def _kernel_of_itself(x: np.ndarray) -> np.ndarray:
    return ((x**2).sum(axis=1) / x.shape[1] + 1) ** 3


def _block_sums(x: np.ndarray, y: np.ndarray, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """The kernel's sum over each pair of blocks, [blocks, blocks]."""
    by_row = np.empty((len(x), len(of_y) - 1))
    for start in range(0, len(x), ROWS):
        kernel = (x[start : start + ROWS] @ y.T / x.shape[1] + 1) ** 3
        by_row[start : start + ROWS] = np.add.reduceat(kernel, of_y[:-1], axis=1)
    return np.add.reduceat(by_row, of_x[:-1], axis=0)
