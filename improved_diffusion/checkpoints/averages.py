"""How much of a moving average is still the weights that training began with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..logs import logger

LARGEST_SHARE = 0.01  # of the first weights in an average; with more, its images are worse than the model's own

_NAME = re.compile(r"ema_([0-9.e-]+)_(\d+)\.pt")


def initial_share(rate: float, steps: int, warmup: bool = False) -> float:
    """The share, in [0, 1], of the first weights in an average after so many steps.

    That is the product of the rates of all steps: rate^steps, or with `warmup` the product of
    min(rate, (1 + s)/(10 + s)) over the steps s.
    """
    if not warmup:
        return rate**steps
    # From step s on, (1 + s)/(10 + s) is the larger one; before, the product telescopes to 1 / binomial(s + 9, 9).
    rising = min(steps, max(0, math.ceil((10 * rate - 1) / (1 - rate))))
    return rate ** (steps - rising) / math.comb(rising + 9, 9)


def initial_share_of(path: str, metadata: Mapping[str, Any]) -> float:
    """The share of the first weights in a checkpoint file, by its description, else by its name; 0 for a model's own
    weights and for averages that keep none."""
    config = metadata.get("config", {})
    rate, steps = metadata.get("ema_rate"), metadata.get("step")
    if rate is None and isinstance(metadata.get("best"), Mapping):
        rate = metadata["best"].get("ema")  # a label, "" for the model
    if not metadata and (match := _NAME.fullmatch(path.replace("\\", "/").rpartition("/")[2])):
        rate, steps = match.groups()
    try:
        rate, steps = float(rate), int(steps)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 0.0
    return initial_share(rate, steps, bool(config.get("ema_warmup"))) if 0 <= rate < 1 and steps >= 0 else 0.0


def warn_of_initial_weights(path: str, metadata: Mapping[str, Any]) -> None:
    """Warn of an average that is not far from the weights that training began with: its images are noise."""
    share = initial_share_of(path, metadata)
    if share > LARGEST_SHARE:
        logger.warn(
            f"{path} is an average with {share:.1%} of the weights that training began with, so its images are worse "
            "than the model's: take another average or modelNNNNNN.pt of that step, or train longer; "
            "--ema_warmup True or a lower --ema_rate avoids it"
        )
