"""Nearest neighbours: float32 distances decide most pairs, float64 distances the rest.

A matrix product in float32 is twice as fast as in float64, and its error has a known bound. The few pairs that are
within this bound of a decision are computed again from the differences of their coordinates. The results are therefore
those of float64: a point has distance 0 to its copies, and equal pairs have equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch as th

from .arrays import Device, full_precision, is_cpu, on_device, sum_of_rows

ELEMENTS = 1 << 24  # of the distance matrix in memory
ON_ACCELERATOR = 1 << 26  # the same, where larger ones keep the device busy
EXACT_ROWS = 1 << 14  # pairs computed in float64 at once
SPARE = 2  # extra neighbours kept, so that float32's order rarely has to be checked again


class Pairs:
    """All pairs of a row of x [N, D] and a row of y [M, D], on a device that has float64.

    Raises ValueError for different widths, and for numbers that are not finite.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, device: Device = "cpu"):
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
        self.x = on_device(x, device)
        self.y = self.x if y is x else on_device(y, device)
        # The error grows with the norms; the distances do not depend on the origin.
        centre = self.y.mean(dim=0, dtype=th.float64)
        self._left, self.x_squared = _extended(self.x, centre)
        right, self.y_squared = _extended(self.y, centre)
        right[:, [-2, -1]] = right[:, [-1, -2]]
        self._right = right.T
        if not (self.x_squared.isfinite().all() and self.y_squared.isfinite().all()):
            raise ValueError("features that are not finite numbers cannot be compared")
        # Higham 2002, sec. 3.1: a sum of n products in any order is off by at most n u times that of their magnitudes.
        # The margin is for rounding the coordinates, the norms and the thresholds to float32.
        self._error = (x.shape[1] + 16) * float(np.finfo(np.float32).eps) / 2

    def blocks(self) -> Iterator[tuple[slice, th.Tensor]]:
        """(rows of x, closeness [rows, M]) of one block after another, in one buffer.

        The closeness, float32, is minus half of the squared distance, as far as float32 can tell.
        """
        elements = ELEMENTS if is_cpu(self.x.device) else ON_ACCELERATOR
        height = min(max(elements // len(self.y), 1), len(self.x))
        buffer = self._left.new_empty(height, len(self.y))
        for start in range(0, len(self.x), height):
            rows = slice(start, min(start + height, len(self.x)))
            with full_precision():
                closeness = th.mm(self._left[rows], self._right, out=buffer[: rows.stop - start])
            yield rows, closeness

    def thresholds(self, centre_squared: th.Tensor, radius_squared: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """(least, sure), float32, for balls around points with these `x_squared` or `y_squared`: every point inside has
        at least the closeness `least`, and every point with at least `sure` is inside."""
        # The norm of a point in the ball is at most the centre's plus the radius. Points of larger norm have a larger
        # error, but are further outside too: twice the bound is enough for them.
        largest = (centre_squared.sqrt() + radius_squared.sqrt()) ** 2
        slack = 2 * self._error * (centre_squared + largest)
        least, sure = -radius_squared / 2 - slack, -radius_squared / 2 + slack
        return least.float(), sure.float()

    def squared(self, i: th.Tensor, j: th.Tensor) -> th.Tensor:
        """The squared distances of x[i] and y[j], both [P]: float64 [P]; the same bits for equal pairs."""
        parts = [self.x.new_empty(0, dtype=th.float64)]
        for of_x, of_y in zip(i.split(EXACT_ROWS), j.split(EXACT_ROWS)):
            difference = self.x[of_x].double() - self.y[of_y].double()
            parts.append(sum_of_rows(difference.square_()))
        return th.cat(parts)


def _extended(points: th.Tensor, centre: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """(float32 [N, D + 2] of the centred points, 1 and minus half of their squared norms; those norms, float64 [N])."""
    result = th.ones(len(points), points.shape[1] + 2, device=points.device)
    squared = centre.new_empty(len(points))
    for start in range(0, len(points), EXACT_ROWS):
        part = slice(start, start + EXACT_ROWS)
        centred = points[part] - centre
        result[part, :-2] = centred
        squared[part] = sum_of_rows(centred.square_())
    result[:, -1] = -squared / 2
    return result, squared


def nearest_neighbours(
    x: np.ndarray, y: np.ndarray | None = None, count: int = 1, device: Device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances float64 [N, count], rows of y int64 [N, count]) of the nearest rows of y, nearest first.

    Among equal rows of y, any may be returned. Without y: the other rows of x.
    :param device: what computes them; it must have float64. The distances have the same bits on all.
    Raises ValueError where there are fewer than `count`.
    """
    pairs = Pairs(x, x if y is None else y, device)
    distances, indices = nearest_of(pairs, count, y is None)
    return distances.cpu().numpy(), indices.cpu().numpy()


def nearest_of(pairs: Pairs, count: int, alone: bool) -> tuple[th.Tensor, th.Tensor]:
    """`nearest_neighbours` on the pairs' device. :param alone: y is x, and no row is its own neighbour."""
    others = len(pairs.y) - alone
    if others < count:
        raise ValueError(f"{len(pairs.y)} images are too few to have {count} neighbours each")
    distances = pairs.x_squared.new_empty(len(pairs.x), count)
    indices = th.empty_like(distances, dtype=th.int64)
    kept = min(count + SPARE, others)
    for rows, closeness in pairs.blocks():
        i = th.arange(rows.start, rows.stop, device=closeness.device)
        if alone:
            closeness[i - rows.start, i] = -th.inf
        top, found = th.topk(closeness, kept, dim=1)
        squared = pairs.squared(i.repeat_interleave(kept), found.flatten()).view(found.shape)
        order = squared.argsort(dim=1, stable=True)[:, :count]
        distances[rows], indices[rows] = squared.gather(1, order), found.gather(1, order)
        furthest = distances[rows, -1]
        least, _ = pairs.thresholds(pairs.x_squared[rows], furthest)
        # A row that was not kept may be nearer (none is nearer than a copy): compute these again.
        if kept < others:
            for row in ((top[:, -1] >= least) & (furthest > 0)).nonzero().flatten().tolist():
                j = (closeness[row] >= least[row]).nonzero().flatten()
                squared_of_row = pairs.squared(i[row].expand(len(j)), j)
                nearest = squared_of_row.argsort(stable=True)[:count]
                distances[rows.start + row], indices[rows.start + row] = squared_of_row[nearest], j[nearest]
    return distances, indices
