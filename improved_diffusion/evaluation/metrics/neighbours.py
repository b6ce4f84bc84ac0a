"""Nearest neighbours: float32 distances decide most pairs, float64 distances the rest.

A matrix product in float32 is twice as fast as in float64, and its error has a known bound. The few pairs that are
within this bound of a decision are computed again from the differences of their coordinates. The results are therefore
those of float64: a point has distance 0 to its copies, and equal pairs have equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch as th

ELEMENTS = 1 << 24  # of the distance matrix in memory
EXACT_ROWS = 1 << 14  # pairs computed in float64 at once
SPARE = 2  # extra neighbours kept, so that float32's order rarely has to be checked again


class Pairs:
    """All pairs of a row of x [N, D] and a row of y [M, D].

    Raises ValueError for different widths, and for numbers that are not finite.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray):
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
        self.x, self.y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        # The error grows with the norms; the distances do not depend on the origin.
        centre = y.mean(axis=0, dtype=np.float64)
        self._left, self.x_squared = _extended(x, centre)
        right, self.y_squared = _extended(y, centre)
        right[:, [-2, -1]] = right[:, [-1, -2]]
        self._right = right.T
        if not (np.isfinite(self.x_squared).all() and np.isfinite(self.y_squared).all()):
            raise ValueError("features that are not finite numbers cannot be compared")
        # Higham 2002, sec. 3.1: a sum of n products in any order is off by at most n u times that of their magnitudes.
        # The margin is for rounding the coordinates, the norms and the thresholds to float32.
        self._error = (x.shape[1] + 16) * float(np.finfo(np.float32).eps) / 2

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows of x, closeness [rows, M]) of one block after another, in one buffer.

        The closeness, float32, is minus half of the squared distance, as far as float32 can tell.
        """
        height = min(max(ELEMENTS // len(self.y), 1), len(self.x))
        buffer = np.empty((height, len(self.y)), np.float32)
        for start in range(0, len(self.x), height):
            rows = slice(start, min(start + height, len(self.x)))
            yield rows, np.matmul(self._left[rows], self._right, out=buffer[: rows.stop - start])

    def thresholds(self, centre_squared: np.ndarray, radius_squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(least, sure), float32, for balls around points with these `x_squared` or `y_squared`: every point inside has
        at least the closeness `least`, and every point with at least `sure` is inside."""
        # The norm of a point in the ball is at most the centre's plus the radius. Points of larger norm have a larger
        # error, but are further outside too: twice the bound is enough for them.
        largest = (np.sqrt(centre_squared) + np.sqrt(radius_squared)) ** 2
        slack = 2 * self._error * (centre_squared + largest)
        least, sure = -radius_squared / 2 - slack, -radius_squared / 2 + slack
        return least.astype(np.float32), sure.astype(np.float32)

    def squared(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The squared distances of x[i] and y[j], both [P]: float64 [P]."""
        result = np.empty(len(i))
        for start in range(0, len(i), EXACT_ROWS):
            part = slice(start, start + EXACT_ROWS)
            difference = self.x[i[part]].astype(np.float64) - self.y[j[part]]
            np.einsum("pd,pd->p", difference, difference, out=result[part])
        return result


def _extended(points: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N, D + 2] of the centred points, 1 and minus half of their squared norms; those norms, float64 [N])."""
    result, squared = np.ones((len(points), points.shape[1] + 2), np.float32), np.empty(len(points))
    for start in range(0, len(points), EXACT_ROWS):
        part = slice(start, start + EXACT_ROWS)
        centred = points[part] - centre
        squared[part] = np.einsum("nd,nd->n", centred, centred)
        result[part, :-2] = centred
    result[:, -1] = -squared / 2
    return result, squared


def nearest_neighbours(x: np.ndarray, y: np.ndarray | None = None, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances float64 [N, count], rows of y int64 [N, count]) of the nearest rows of y, nearest first.

    Among equal rows of y, any may be returned. Without y: the other rows of x.
    Raises ValueError where there are fewer than `count`.
    """
    alone = y is None
    pairs = Pairs(x, x if y is None else y)
    others = len(pairs.y) - alone
    if others < count:
        raise ValueError(f"{len(pairs.y)} images are too few to have {count} neighbours each")
    distances, indices = np.empty((len(x), count)), np.empty((len(x), count), np.int64)
    kept = min(count + SPARE, others)
    for rows, closeness in pairs.blocks():
        i = np.arange(rows.start, rows.stop)
        if alone:
            closeness[i - rows.start, i] = -np.inf
        top, found = (part.numpy() for part in th.topk(th.from_numpy(closeness), kept, dim=1))
        squared = pairs.squared(np.repeat(i, kept), found.ravel()).reshape(found.shape)
        order = np.argsort(squared, axis=1, kind="stable")[:, :count]
        distances[rows], indices[rows] = (np.take_along_axis(part, order, axis=1) for part in (squared, found))
        furthest = distances[rows, -1]
        least, _ = pairs.thresholds(pairs.x_squared[rows], furthest)
        # A row that was not kept may be nearer (none is nearer than a copy): compute these again.
        for row in np.flatnonzero((top[:, -1] >= least) & (furthest > 0) & (kept < others)):
            j = np.flatnonzero(closeness[row] >= least[row])
            squared_of_row = pairs.squared(np.full(len(j), i[row]), j)
            nearest = np.argsort(squared_of_row, kind="stable")[:count]
            distances[i[row]], indices[i[row]] = squared_of_row[nearest], j[nearest]
    return distances, indices
