"""The class of each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch as th

from .. import distributed
from ..config import NUM_CLASSES, UserError


def parse_classes(text: str, class_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """The class indices of --classes, given by name or index. Raises UserError for one that there is not."""
    indices = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        if class_names and word in class_names:
            indices.append(list(class_names).index(word))
        elif word.isdigit() and int(word) < num_classes:
            indices.append(int(word))
        else:
            names = f": {', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}" if class_names else ""
            raise UserError(f"--classes {word}: the model has the classes 0..{num_classes - 1}{names}")
    return indices


class Labels:
    """The class of each sample: those asked for in turn, or drawn at random from seed + i."""

    def __init__(self, num_classes: int, seed: int, classes: Sequence[int], class_names: Sequence[str] | None):
        self.num_classes, self.seed, self.classes, self.class_names = num_classes, seed, classes, class_names

    def index(self, i: int) -> int:
        """The class of sample i."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return int(th.randint(self.num_classes, (1,), generator=th.Generator().manual_seed(self.seed + i)))

    def name(self, i: int) -> str:
        """The class's name, or its index where it has none."""
        label = self.index(i)
        return self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)


class Classes(NamedTuple):
    """What the labels of a model mean."""

    num: int
    names: Sequence[str] | None


def classes_of(options: Any, metadata: Mapping[str, Any]) -> Classes | None:
    """The classes of a model, no more than it was trained on; None for an unconditional one."""
    if not options.class_cond:
        return None
    names = metadata.get("class_names")
    return Classes(len(names) if names else options.num_classes or NUM_CLASSES, names)


def choose_labels(options: Any, classes: Classes | None) -> Labels | None:
    """The labels that --classes, or chance, gives a model with classes; None for one without."""
    if classes is None:
        if options.classes:
            raise UserError(
                f"--classes {options.classes}: {options.model_path} was trained without classes (--class_cond)"
            )
        return None
    wanted = parse_classes(options.classes, classes.names, classes.num)
    return Labels(classes.num, options.seed, wanted, classes.names)


def image_labels(
    options: Any, classes: Classes | None, found: Sequence[int] | None, path: str, flag: str
) -> Labels | None:
    """The labels of images that were given: those of --classes, else `found` with the images; None without classes.

    :param path: of the images, which `flag` names. Raises UserError where the model needs classes and there are none.
    """
    labels = choose_labels(options, classes)
    if labels is None or options.classes:
        return labels
    if found is None:
        known = f" among {', '.join(classes.names[:10])}" if classes and classes.names else ""
        raise UserError(f"{flag} {path} has no classes{known}, which {options.model_path} needs: give --classes")
    wrong = [label for label in found if not 0 <= label < labels.num_classes]
    if wrong:
        raise UserError(
            f"{flag} {path} has the label {wrong[0]}, but the model has the classes 0..{labels.num_classes - 1}: "
            "give an npz with those, or --classes"
        )
    return Labels(labels.num_classes, options.seed, found, labels.class_names)


def label_kwargs(labels: Labels | None, indices: Sequence[int]) -> dict[str, th.Tensor]:
    """What a model with classes takes for the samples with these numbers: `y` [N] on the device."""
    return {"y": th.tensor([labels.index(i) for i in indices], device=distributed.dev())} if labels else {}
