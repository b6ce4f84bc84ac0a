"""Training the classifier that guides a diffusion model: its loss, its options and its validation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch as th
import torch.nn.functional as F

from ..checkpoints import checkpoint
from ..checkpoints.loading import KINDS, kind_of, refuse_contradictions
from ..cli.published_flags import args_to_dict
from ..config import ClassifierConfig, ProcessConfig, UserError
from ..logs import logger
from ..models.classifier import NoisyClassifier
from ..models.factories import create_classifier, create_gaussian_diffusion
from ..sampling.noise import SeededNoise
from .validation import SEED, Validation, build_validation


class ClassifierObjective:
    """What TrainLoop trains a NoisyClassifier on, in the place of a diffusion: the classes of x_t.

    :param diffusion: the process that makes x_t; it must be that of the model to be guided.
    """

    def __init__(self, diffusion: Any):
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None) -> dict[str, th.Tensor]:
        """-log p(y | x_t) in nats and whether the likeliest class is right (0 or 1): `loss` and `accuracy`, each [N].

        With ten classes and more also `accuracy_top5`: whether it is among the five likeliest.
        :param model: (x_t, timesteps) -> logits [N, classes].
        :param model_kwargs: the classes y [N], which the model is not shown.
        """
        if not model_kwargs or "y" not in model_kwargs:
            raise ValueError("a classifier learns from labels: model_kwargs must hold y [N]")
        y = model_kwargs["y"]
        x_t = self.diffusion.q_sample(x_start, t, noise)
        # As the guided model is given them, so that both are called alike.
        logits = self.diffusion._wrap_model(model)(x_t, t).float()
        # Classes that come before the right one. Those that tie with it do, and those that are not a number.
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

    They count as given from there on. Raises UserError for a flag that contradicts the checkpoint. Collective.
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


class ClassifierValidation(Validation):
    """A hook for TrainLoop: loss and accuracy of the classifier and each moving average, as Validation does it.

    Logs `val_loss` and `val_accuracy`, the same of each average with `_ema_LABEL` behind, and keeps best.pt.
    """

    def _problem(self) -> str | None:
        return None  # build_validation has looked at the images

    def __call__(self, loop: Any) -> None:
        """Evaluate, log, and keep the best. Collective."""
        scores = {"": self._score(loop, loop.master_params)}
        scores |= {ema.label: self._score(loop, ema.params) for ema in loop.emas}
        texts = []
        for label, score in scores.items():
            suffix = f"_ema_{label}" if label else ""
            logger.logkv(f"val_loss{suffix}", score.loss)
            logger.logkv(f"val_accuracy{suffix}", score.bound.mean)
            texts.append(f"{f'EMA {label} ' if label else ''}loss {score.loss:.4g}, accuracy {score.bound.mean:.1%}")
        steps = loop.absolute_step + 1
        logger.log(f"validation after {steps} steps: {'; '.join(texts)}")
        self._keep_best(loop, steps, scores)

    def _evaluate(self, loop: Any, numbers: list[int]) -> th.Tensor:
        """Loss and, where Validation has the bound, accuracy of the images with these numbers: float64 [N, 2]."""
        indices = self.selected[numbers]
        batch, kwargs = th.utils.data.default_collate([self.dataset[i] for i in indices])
        batch = batch.to(loop.device)
        losses = self.diffusion.training_losses(
            loop.model,
            batch,
            th.from_numpy(self.loss_t[numbers]).to(loop.device),
            model_kwargs={key: value.to(loop.device) for key, value in kwargs.items()},
            noise=SeededNoise([SEED + i for i in indices])(batch),
        )
        return th.stack([losses["loss"].double(), losses["accuracy"].double()], dim=1).cpu()


def build_classifier_validation(
    options: Any, objective: ClassifierObjective, class_names: Sequence[str] | None
) -> list[tuple[int, ClassifierValidation]]:
    """The hook that evaluates a classifier on --val_dir, as validation.build_validation makes one. Collective."""
    return [
        (
            interval,
            ClassifierValidation(objective, hook.dataset, num_images=hook.num_images, batch_size=hook.batch_size),
        )
        for interval, hook in build_validation(options, objective, class_names)
    ]
