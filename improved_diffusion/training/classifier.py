"""Training a classifier for guidance: its loss, options and validation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F

from ..checkpoints import checkpoint
from ..checkpoints.loading import KINDS, kind_of, refuse_contradictions
from ..cli.published_flags import args_to_dict
from ..config import ClassifierConfig, ProcessConfig, UserError
from ..logs import logger
from ..models.classifier import NoisyClassifier
from ..models.factories import create_classifier, create_gaussian_diffusion
from .validation import HeldOutImages, build_validation


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
        # Scaled as for the guided model, so that both are called alike.
        logits = model(x_t, self.diffusion._scale_timesteps(t)).float()
        # The number of classes ahead of the right one, ties and NaN among them.
        rank = (~(logits < logits.gather(1, y[:, None]))).sum(dim=1) - 1
        terms = {"loss": F.cross_entropy(logits, y, reduction="none"), "accuracy": (rank < 1).float()}
        if logits.shape[1] >= 10:
            terms["accuracy_top5"] = (rank < 5).float()
        return terms


_PROCESS = [f.name for f in fields(ProcessConfig)]


def build_classifier(options: Any) -> tuple[NoisyClassifier, ClassifierObjective]:
    """(classifier, objective) for a namespace of options, as script_util.build gives a model and its diffusion."""
    process = args_to_dict(options, _PROCESS)
    diffusion = create_gaussian_diffusion(steps=process.pop("diffusion_steps"), **process)
    classifier = create_classifier(**args_to_dict(options, [f.name for f in fields(ClassifierConfig)]))
    return classifier, ClassifierObjective(diffusion)


def adopt_process(options: argparse.Namespace) -> None:
    """Take the images' size and channels and the noise from the diffusion model at --model_path, if there is one.

    From then on they count as given. Raises UserError for a flag that contradicts the checkpoint. Collective.
    """
    path = options.model_path
    if not path:
        return
    _, metadata = checkpoint.load(path)
    stored = metadata.get("config", {})
    names = {"image_size", "channels", *_PROCESS}
    if not stored:
        flags = ", ".join(f"--{name}" for name in sorted(names))
        raise UserError(f"--model_path {path} has no description: leave it out, and say by {flags} what it is")
    if kind_of(stored) != "image":
        raise UserError(f"--model_path {path} is {KINDS[kind_of(stored)][0]}: a classifier guides an image model")
    stored = {**{f.name: f.default for f in fields(ProcessConfig)}, **stored}  # an older file lacks newer options
    refuse_contradictions(options, path, stored, names)
    for name in names:
        setattr(options, name, stored[name])
        options.given.add(name)
    logger.log(f"to guide {path}: {', '.join(f'{name}={getattr(options, name)}' for name in sorted(names))}")


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


def build_classifier_validation(
    options: Any, objective: ClassifierObjective, class_names: Sequence[str] | None
) -> list[tuple[int, HeldOutImages]]:
    """The hook that evaluates a classifier on --val_dir, as validation.build_validation makes one. Collective."""
    return build_validation(options, objective, class_names, ClassifierValidation)
