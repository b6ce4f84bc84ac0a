"""Subsets of the timesteps: fewer, larger steps of the same process (IDDPM sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch as th

from .config import UserError
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps to keep of a process of `num_timesteps`.

    :param section_counts: how many to keep in each of equal sections, as a list or as "10,15,20"; or "ddimN" for the
        integer stride of DDIM that keeps exactly N.
    Raises UserError for counts that the sections do not hold and for an N that no stride gives.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_stride(num_timesteps, section_counts)
        try:
            section_counts = [int(count) for count in section_counts.split(",")]
        except ValueError:
            raise UserError(
                f"timestep_respacing {section_counts!r}: expected a count (250), counts (10,15,20) or a stride (ddim50)"
            ) from None
    sections = len(section_counts)
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = num_timesteps // sections + (1 if i < num_timesteps % sections else 0)
        if not 1 <= count <= size:
            raise UserError(
                f"timestep_respacing: section {i + 1} of {sections} holds {size} of the {num_timesteps} steps, "
                f"cannot take {count} of them: give 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Accumulated by addition: another order of operations rounds to other steps.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += size
    return kept


def _ddim_stride(num_timesteps: int, text: str) -> set[int]:
    try:
        desired = int(text[len("ddim") :])
    except ValueError:
        raise UserError(f"timestep_respacing {text!r}: expected ddim and a number, such as ddim50") from None
    for stride in range(1, max(num_timesteps, 2)):
        if len(range(0, num_timesteps, stride)) == desired:
            return set(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    near = min(possible, key=lambda n: (abs(n - desired), n), default=1)
    raise UserError(f"no integer stride keeps exactly {desired} of {num_timesteps} steps: try ddim{near}, or {desired}")


class SpacedDiffusion(GaussianDiffusion):
    """The diffusion that skips to a subset of the steps of a base process.

    :param use_timesteps: the base process's timesteps to keep.
    :param kwargs: the arguments of the base GaussianDiffusion.
    The network still sees the base process's timesteps, through `timestep_map` (new -> old).
    """

    def __init__(self, use_timesteps, **kwargs):
        base = np.array(kwargs.pop("betas"), dtype=np.float64)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(base)
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < len(base):
            raise ValueError(f"use_timesteps must be a non-empty subset of 0..{len(base) - 1}")
        kept = np.cumprod(1.0 - base)[self.timestep_map]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def _scale_timesteps(self, t):
        key = ("timestep_map", t.device)
        if key not in self._on_device:
            self._on_device[key] = th.tensor(self.timestep_map, device=t.device)
        original = self._on_device[key][t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original
