"""The class of each sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import NUM_CLASSES, UserError, shorten
from .noise import image_generator


def parse_classes(text: str, class_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """The class indices of --classes, given by name or index. Raises UserError for an unknown one."""
    indices = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        if class_names and word in class_names:
            indices.append(list(class_names).index(word))
        elif re.fullmatch("[0-9]{1,18}", word) and int(word) < num_classes:
            indices.append(int(word))
        else:
            names = f": {', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}" if class_names else ""
            raise UserError(f"--classes {shorten(word)}: the model has the classes 0..{num_classes - 1}{names}")
    return indices


class Labels:
    """The class of each sample: the given classes in turn, or a random one that follows from (seed, number)."""

    def __init__(self, num_classes: int, seed: int, classes: Sequence[int], class_names: Sequence[str] | None):
        self.num_classes, self.seed, self.classes, self.class_names = num_classes, seed, classes, class_names

    def index(self, i: int) -> int:
        """The class of sample i."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return int(image_generator(self.seed, i, "label").integers(self.num_classes))

    def name(self, i: int) -> str:
        """The class's name, or its index where it has none."""
        label = self.index(i)
        return self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)


class Classes(NamedTuple):
    """What the labels of a model mean."""

    num: int
    names: Sequence[str] | None


def classes_of(loaded: LoadedModel) -> Classes | None:
    """The classes that a model was trained on; None for an unconditional one."""
    config, names = loaded.settings.model, loaded.metadata.get("class_names")
    if not config.class_cond:
        return None
    return Classes(len(names) if names else config.num_classes or NUM_CLASSES, names)


def choose_labels(classes: Classes | None, wanted: str, seed: int, model_path: str) -> Labels | None:
    """The labels of samples: the wanted classes in turn, or random ones; None for a model without classes.

    :param wanted: names or indices, comma-separated.
    :param model_path: of the model, for messages.
    Raises UserError for a class that the model does not have.
    """
    if classes is None:
        if wanted:
            raise UserError(f"--classes {wanted}: {model_path} was trained without classes (--class_cond)")
        return None
    return Labels(classes.num, seed, parse_classes(wanted, classes.names, classes.num), classes.names)


def image_labels(
    classes: Classes | None, wanted: str, seed: int, model_path: str, found: Sequence[int] | None, source: str
) -> Labels | None:
    """The labels of given images: the wanted classes, else `found` with the images; None without classes.

    :param source: where the images come from, such as "--images photos", for messages.
    Raises UserError where the model needs classes and there are none, and for a class that it does not have.
    """
    labels = choose_labels(classes, wanted, seed, model_path)
    if labels is None or wanted:
        return labels
    if found is None:
        known = f" among {', '.join(classes.names[:10])}" if classes and classes.names else ""
        raise UserError(f"{source} has no classes{known}, which {model_path} needs: give --classes")
    wrong = [label for label in found if not 0 <= label < labels.num_classes]
    if wrong:
        raise UserError(
            f"{source} has the label {wrong[0]}, but the model has the classes 0..{labels.num_classes - 1}: "
            "give an npz with those, or --classes"
        )
    return Labels(labels.num_classes, seed, found, labels.class_names)


def label_kwargs(labels: Labels | None, indices: Sequence[int]) -> dict[str, th.Tensor]:
    """The argument `y` [N], on the device, of a model with classes, for the samples with these numbers; else none."""
    return {"y": th.tensor([labels.index(i) for i in indices], device=distributed.dev())} if labels else {}
