"""The class of each sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch as th

from .. import distributed
from ..checkpoints.loading import LoadedModel
from ..config import NUM_CLASSES, UserError, nearest, one_line, shorten
from ..data.classes import integer_labels
from ..utils.captions import caption
from ..utils.text import class_parts, listed
from .noise import image_generator


def parse_classes(text: str, class_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """The class indices of --classes, given by name or index. Raises UserError for an unknown one."""
    indices = []
    numbered = bool(class_names) and all(map(str.isdecimal, class_names or ()))  # then a number is a name
    for word in (part.strip() for part in text.split(",") if part.strip()):
        if class_names and word in class_names:
            indices.append(list(class_names).index(word))
        elif not numbered and re.fullmatch("[0-9]{1,18}", word) and int(word) < num_classes:
            indices.append(int(word))
        else:
            names = listed(class_names or (), 20)
            known = names if numbered else f"0..{num_classes - 1}" + (names and f": {names}")
            near = None if numbered else nearest(word, class_names or ())
            hint = f"did you mean {one_line(near)}? " if near else ""
            raise UserError(f"--classes {one_line(shorten(word))}: {hint}the model has the classes {known}")
    return indices


class Labels:
    """The class of each sample: the given classes in turn, or a random one that follows from (seed, number).

    :param seen: the classes that random ones are drawn from; None: all.
    """

    def __init__(
        self, num_classes: int, seed: int, classes: Sequence[int], class_names: Sequence[str] | None,
        seen: Sequence[int] | None = None,
    ):  # fmt: skip
        self.num_classes, self.seed, self.classes, self.class_names = num_classes, seed, classes, class_names
        self.seen = range(num_classes) if seen is None else seen

    def index(self, i: int) -> int:
        """The class of sample i."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return self.seen[int(image_generator(self.seed, i, "label").integers(len(self.seen)))]

    def name(self, i: int) -> str:
        """The class's name, or its index where it has none."""
        return class_name(self.class_names, self.index(i))

    def file_part(self, i: int) -> str:
        """What stands for the class in file names."""
        return class_name(self._file_parts, self.index(i))

    def caption(self, i: int) -> str:
        """What is written below the sample in a grid."""
        return caption_of(self.class_names, self.index(i))

    @cached_property
    def _file_parts(self) -> Sequence[str] | None:
        return class_parts(self.class_names) if self.class_names else None


def class_name(names: Sequence[str] | None, label: int) -> str:
    """The name of a class, or its index where it has none."""
    return names[label] if names and label < len(names) else str(label)


def caption_of(names: Sequence[str] | None, label: int) -> str:
    """What is written below an image of a class: its name, or its index where the name cannot be drawn."""
    return caption(class_name(names, label), f"class {label}")


class Classes(NamedTuple):
    """What the labels of a model mean."""

    num: int
    names: Sequence[str] | None
    seen: Sequence[int] | None = None  # those that had images in training, where they are not all


def classes_of(loaded: LoadedModel) -> Classes | None:
    """The classes that a model was trained on; None for an unconditional one."""
    config, names = loaded.settings.model, loaded.metadata.get("class_names")
    if not config.class_cond:
        return None
    num = len(names) if names else config.num_classes or NUM_CLASSES
    return Classes(num, names, loaded.metadata.get("seen_classes"))


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
    return Labels(classes.num, seed, parse_classes(wanted, classes.names, classes.num), classes.names, classes.seen)


def image_labels(
    classes: Classes | None, wanted: str, seed: int, model_path: str, found: Any, count: int, source: str
) -> Labels | None:
    """The labels of `count` given images: the wanted classes, else `found` with the images; None without classes.

    :param found: an integer for each image, or None.
    :param source: where the images come from, such as "--images photos", for messages.
    Raises UserError where the model needs classes and there are none, and for a class that it does not have.
    """
    labels = choose_labels(classes, wanted, seed, model_path)
    if labels is None or wanted:
        return labels
    if found is None:
        known = f" among {listed(classes.names, 10)}" if classes and classes.names else ""
        raise UserError(f"{source} has no classes{known}, which {model_path} needs: give --classes")
    found = integer_labels(found, count, f"{source} has labels")
    wrong = [label for label in found if not 0 <= label < labels.num_classes]
    if wrong:
        names = listed(labels.class_names or (), 20)
        raise UserError(
            f"{source} has the label {wrong[0]}, but the model has the classes 0..{labels.num_classes - 1}"
            f"{names and f': {names}'}. Give an npz with those, or --classes"
        )
    return Labels(labels.num_classes, seed, found, labels.class_names)


def label_kwargs(labels: Labels | None, indices: Sequence[int]) -> dict[str, th.Tensor]:
    """The argument `y` [N], on the device, of a model with classes, for the samples with these numbers; else none."""
    return {"y": th.tensor([labels.index(i) for i in indices], device=distributed.dev())} if labels else {}
