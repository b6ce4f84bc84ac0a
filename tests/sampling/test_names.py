"""What the files of samples are called."""

import numpy as np
import pytest

from improved_diffusion.data.classes import read_classes
from improved_diffusion.data.sources import open_images
from improved_diffusion.sampling.labels import Labels
from improved_diffusion.sampling.names import ByNumber, BySource, numbered_name
from improved_diffusion.utils import images

CLASSES = ["cat", "ice cream", "猫", "犬", "big_cat", "big-cat", "A", "a", "a/b", "x\ny", ".hid", "con", "", "y" * 300]


def test_a_number_and_a_class_are_in_the_name():
    assert numbered_name(7, None) == "000007.png" and numbered_name(1234567, "ice cream") == "ice cream_1234567.png"
    assert ByNumber(None)(3) == "000003.png"
    assert ByNumber(Labels(2, 0, [1], ["cat", "猫"]))(3) == "猫_000003.png"
    assert ByNumber(Labels(7, 0, [5], None))(3) == "5_000003.png"


def test_samples_are_read_back_with_as_many_classes(tmp_path):
    names = ByNumber(Labels(len(CLASSES), 0, range(len(CLASSES)), CLASSES))
    for i in range(2 * len(CLASSES)):
        (tmp_path / names(i)).write_bytes(images.encode_png(np.full((2, 2, 1), i, np.uint8)))
    source = open_images(str(tmp_path))
    found, read = read_classes(source, "prefix", str(tmp_path))
    assert len(source) == 2 * len(CLASSES) and len(read) == len(CLASSES)
    assert {"cat", "ice cream", "猫", "犬", "big-cat", "A"} <= set(read)
    by_number = {int(source.name(i)[-10:-4]): label for i, label in enumerate(found)}
    assert all(by_number[i] == by_number[i + len(CLASSES)] for i in range(len(CLASSES)))


def test_samples_are_found_by_number():
    names = ByNumber(Labels(2, 0, [0, 1], ["ice cream", "猫"]))
    # The second is of a time when names were changed more.
    assert names.found(["ice cream_000000.png", "-_000001.png", "notes.txt"]) == {
        0: "ice cream_000000.png", 1: "-_000001.png",
    }  # fmt: skip


@pytest.mark.parametrize("sources, count, expected", [
    (["cat_07", "dog"], 2, ["cat_07.png", "dog.png"]),
    (["cat_07", "dog"], 1, ["cat_07.png"]),
    (["cat_07", "dog"], 4, ["cat_07_1.png", "dog_1.png", "cat_07_2.png", "dog_2.png"]),
    (["1", "1"], 2, ["1.png", "1-2.png"]),
    (["a", "A"], 2, ["a.png", "A-2.png"]),
    (["a", "a_1"], 4, ["a_1.png", "a_1_1.png", "a_2.png", "a_1_2.png"]),
    (["猫 1", ".x", "a\n"], 3, ["猫 1.png", "-x.png", "a-.png"]),
])  # fmt: skip
def test_edited_images_keep_their_sources_names(sources, count, expected):
    names = BySource(sources, count)
    assert [names(i) for i in range(count)] == expected
    assert names.found([*expected, "other_1.png"]) == dict(enumerate(expected))
