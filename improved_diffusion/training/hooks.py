"""What the training loop offers to hooks: previews, validation, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch as th


class TrainingView(Protocol):
    """A training run as a hook sees it. TrainLoop is one; a hook is called as hook(view), after a step, on all ranks.

    A hook that has a `name`, state_dict() and load_state_dict(state) is saved with the checkpoints and restored. Its
    state is made of tensors, numbers and text, in dicts and lists.
    """

    model: th.nn.Module
    device: th.device
    microbatch: int  # images in one forward pass

    @property
    def absolute_step(self) -> int:
        """The number of the step just made, from 0, counted from the very first one."""

    @property
    def parameter_sets(self) -> Mapping[str, Sequence[th.Tensor]]:
        """The model's parameters under "", and each moving average under its label, such as "0.9999"."""

    @property
    def initial_shares(self) -> Mapping[str, float]:
        """For each moving average, by its label, the share of the weights that training began with, in [0, 1]."""

    def using(self, params: Sequence[th.Tensor]) -> AbstractContextManager[None]:
        """The model has one of the parameter sets, and is in eval mode; afterwards it is as before."""

    def write_model(self, name: str, params: Sequence[th.Tensor], metadata: Mapping[str, Any]) -> None:
        """Write one of the parameter sets to a file beside the checkpoints, together with the next checkpoint."""


class Hook(Protocol):
    """What TrainLoop calls every so many steps. Collective."""

    def __call__(self, view: TrainingView, /) -> None: ...
