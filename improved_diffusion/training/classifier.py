"""Training a classifier for guidance: its loss and its validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F

from ..logs import logger
from .validation import HeldOutImages


class ClassifierObjective:
    """What TrainLoop trains a NoisyClassifier on, in place of a diffusion: the classes of noisy images x_t.

    :param diffusion: the process that makes x_t, the same as that of the model to be guided.
    """

    def __init__(self, diffusion: Any):
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None) -> dict[str, th.Tensor]:
        """`loss`, -log p(y | x_t) in nats, and `accuracy`, whether the likeliest class is right (0 or 1): each [N].

        With ten classes or more also `accuracy_top5`: whether the right one is among the five likeliest.
        :param model: (x_t, timesteps) -> logits [N, classes].
        :param model_kwargs: the classes y [N]; they are not given to the model.
        """
        if not model_kwargs or "y" not in model_kwargs:
            raise ValueError("a classifier learns from labels: model_kwargs must hold y [N]")
        y = model_kwargs["y"]
        x_t = self.diffusion.q_sample(x_start, t, noise)
        # As the guided model is given them, so that both are called alike.
        logits = self.diffusion._wrap_model(model)(x_t, t).float()
        # The number of classes ahead of the right one, ties and NaN among them.
        rank = (~(logits < logits.gather(1, y[:, None]))).sum(dim=1) - 1
        terms = {"loss": F.cross_entropy(logits, y, reduction="none"), "accuracy": (rank < 1).float()}
        if logits.shape[1] >= 10:
            terms["accuracy_top5"] = (rank < 5).float()
        return terms


class ClassifierValidation(HeldOutImages):
    """Loss and accuracy of a classifier on held-out images.

    Logs `val_loss` and `val_accuracy`, and the same of each average with `_ema_LABEL` appended.
    """

    def measure(
        self, model: Any, batch: th.Tensor, model_kwargs: dict[str, th.Tensor], numbers: Sequence[int]
    ) -> Sequence[th.Tensor]:
        """The loss and accuracy (0 or 1) [N] of each image."""
        losses = self.losses(model, batch, model_kwargs, numbers, self.noise_of(numbers)(batch))
        return losses["loss"], losses["accuracy"]

    def log(self, steps: int, tables: Mapping[str, np.ndarray]) -> None:
        texts = []
        for label, table in tables.items():
            loss, accuracy = table.mean(axis=0).tolist()
            suffix = f"_ema_{label}" if label else ""
            logger.logkv(f"val_loss{suffix}", loss)
            logger.logkv(f"val_accuracy{suffix}", accuracy)
            texts.append(f"{f'EMA {label} ' if label else ''}loss {loss:.4g}, accuracy {accuracy:.1%}")
        logger.log(f"validation after {steps} steps: {'; '.join(texts)}")
