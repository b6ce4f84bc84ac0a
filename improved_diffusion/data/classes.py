"""The class of each image: from its file's name, its folder, a label file, or the labels of an npz."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..config import NUM_CLASSES, UserError, one_line
from ..config.model import MAX_CLASS_NAME
from ..logs import logger
from ..utils.text import class_index, listed
from .label_file import KEYWORDS, Label, LabelFile
from .sources import ArrayImages

NAMED = "name the files class_number.png, or give --labels folder or a label file"
MAX_CLASSES = 100_000  # more are a mistake, and would make an embedding of that many rows


def read_classes(
    source: Any, labels: str, data_dir: str, num_classes: int = 0, model_path: str = ""
) -> tuple[list[int], list[str]]:
    """(the class index of each image, the classes' names), for training.

    Classes are numbered in the order of their names or numbers. Numbers without images get no index, so that no class
    is trained on nothing, unless a model is to have more classes than the largest.
    :param labels: prefix, folder or the path of a file, see `read_labels`.
    :param num_classes: the classes that the model will have; 0: those that are found.
    :param model_path: the model that training continues or distils, for messages; "" for a new one.
    Raises UserError if the images have no classes of that kind.
    """
    found = read_labels(source, labels, data_dir, model_path=model_path)
    where = data_dir if isinstance(source, ArrayImages) and labels in KEYWORDS else labels
    names = _by_name(found, where) if _has_names(found) else _by_number(found, where, num_classes)
    if len(names) > max(MAX_CLASSES, num_classes):
        raise UserError(f"the labels in {where} are of {len(names):,} classes: at most {MAX_CLASSES:,} can be trained")
    index = {name: i for i, name in enumerate(names)}
    return [index[str(label)] for label in found], names


def class_indices(
    source: Any, labels: str, data_dir: str, class_names: Sequence[str] | None, num_classes: int, model_path: str
) -> list[int]:
    """Each image's class in a checkpoint's numbering.

    :param labels: where the classes come from, see `read_labels`.
    :param class_names: the checkpoint's; None where it has none.
    :param num_classes: the checkpoint's; 0: NUM_CLASSES.
    Raises UserError for a class that the checkpoint does not have.
    """
    found = read_labels(source, labels, data_dir, model_path=model_path)
    count = num_classes or NUM_CLASSES
    if class_names is None and not _has_names(found):
        indices = [int(label) for label in found]
    else:
        names = list(class_names or _by_name(found, data_dir))
        unknown = classes_not_in(found, names)
        if unknown:
            raise UserError(
                f"with --labels {labels}, {data_dir} has the class {one_line(unknown[0])}, which {model_path} was not "
                f"trained on; its classes are {listed(names, 8)}: {NAMED}"
            )
        index = class_index(names)
        indices = [index[str(label)] for label in found]
    wrong = [i for i in indices if not 0 <= i < count]
    if wrong:
        raise UserError(f"{data_dir} has class {max(wrong)}; {model_path} has {count} classes, 0..{count - 1}")
    return indices


def classes_not_in(found: Iterable[Label], names: Sequence[str]) -> list[str]:
    """The labels that are none of the classes, each once, sorted."""
    return sorted({str(label) for label in found} - class_index(names).keys())


def _has_names(found: Sequence[Label]) -> bool:
    return any(isinstance(label, str) for label in found)


def _by_name(found: Iterable[Label], where: str) -> list[str]:
    names = sorted({str(label) for label in found})
    for name in names:
        if len(name) > MAX_CLASS_NAME:
            raise UserError(f"{where} has a class whose name is longer than {MAX_CLASS_NAME} characters: shorten it")
    return names


def _by_number(found: Sequence[Any], where: str, num_classes: int) -> list[str]:
    numbers = sorted(set(found))
    if numbers[0] < 0:
        raise UserError(f"the labels in {where} must not be negative, found {numbers[0]}: number them from 0")
    if len(numbers) == numbers[-1] + 1:
        return list(map(str, numbers))
    if num_classes > numbers[-1]:
        missing = num_classes - len(numbers)
        logger.warn(f"{where} has no images of {missing:,} of the {num_classes:,} classes: they will not be learned")
        return [str(i) for i in range(numbers[-1] + 1)]
    if num_classes > len(numbers):
        raise UserError(
            f"the labels in {where} are {listed(numbers, 8)}, which does not fit the {num_classes} classes of "
            f"--num_classes or of the checkpoint: number them from 0 to {num_classes - 1}"
        )
    logger.warn(
        f"the labels in {where} are {listed(numbers, 8)}, not 0 to {len(numbers) - 1}: the model gets these "
        f"{len(numbers):,} classes, which keep their numbers as names"
    )
    return list(map(str, numbers))


# Labels


def read_labels(source: Any, labels: str, data_dir: str, few: bool = False, model_path: str = "") -> Sequence[Label]:
    """What the class of each image is called: a name, or a number.

    :param labels: "prefix", the file's name up to the first "_"; "folder"; or the path of a JSON, JSONL, CSV or TSV
        file. An npz has its own labels, unless a file is named.
    :param few: allow data sets with only one image of each class.
    :param model_path: the model that needs the classes, for messages; "" where one is to be trained.
    Raises UserError if the images have no classes of that kind.
    """
    if isinstance(source, ArrayImages) and labels in KEYWORDS:
        if source.labels is None:
            remedy = f"{model_path} needs them: give a label file" if model_path else "drop --class_cond"
            raise UserError(f"{data_dir} has no arr_1, so its images have no classes: {remedy}")
        return integer_labels(source.labels, len(source), f"{data_dir} has arr_1")
    names = [source.name(i).replace("\\", "/") for i in range(len(source))]
    if labels == "prefix":
        found: Sequence[Label] = [class_in_name(name.split("/")[-1]) for name in names]
    elif labels == "folder":
        found = [_storable(name.rpartition("/")[0]) for name in names]
        if "" in found:
            raise UserError(f"--labels folder: {names[found.index('')]} is in no folder below {data_dir}")
    else:
        found = LabelFile(labels).of(names)
    if len(set(found)) == len(found) > 1 and not few:
        where = f"{model_path} needs classes" if model_path else "--class_cond True"
        raise UserError(
            f"{where}; with --labels {labels} each of the {len(found)} images in {data_dir} would be a class of its "
            f"own: {NAMED}{'' if model_path else ', or drop --class_cond'}"
        )
    return found


def check_several(source: Any, labels: str, data_dir: str, names: Sequence[str], otherwise: str) -> None:
    """Raise UserError for images of one class only, which is seldom meant: phones call all their photos IMG_NNNN.

    :param otherwise: ends the message: what to do where it is meant.
    """
    if len(names) != 1:
        return
    found = {source.name(i).replace("\\", "/").rpartition("/")[0] for i in range(len(source))}
    in_folders = labels == "prefix" and len(found) > 1 and "" not in found
    remedy = f"--labels folder finds {listed(sorted(found), 8)}" if in_folders else NAMED
    raise UserError(
        f"with --labels {labels} every image in {data_dir} is of the one class {one_line(names[0])}: {remedy}; "
        f"{otherwise}"
    )


def class_in_name(file_name: str) -> str:
    """The class that `--labels prefix` reads off a file's name."""
    return _storable(file_name.split("_")[0])


def _storable(name: str) -> str:
    """The name with escapes for bytes that are not UTF-8, of a file named in another encoding: JSON has none."""
    return name.encode(errors="backslashreplace").decode()


def integer_labels(labels: Any, count: int, what: str) -> list[int]:
    """One integer for each of `count` images, of an array [N] or [N, 1] of any type.

    :param what: begins the message, such as "d.npz has arr_1". Raises UserError for anything else.
    """
    try:
        array = np.asarray(labels)
    except ValueError:  # of two files, in different forms
        array = np.array(labels, dtype=object)
    flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.shape != (count,) or flat.dtype.kind not in "iuf" or not _is_whole(flat):
        raise UserError(f"{what} of {array.dtype} {array.shape}: expected an integer for each of {count} images")
    return [int(label) for label in flat]


def _is_whole(array: np.ndarray) -> bool:
    if array.dtype.kind != "f":
        return True
    return bool(((array == np.rint(array)) & (np.abs(array) < 2**53)).all())  # False for NaN
