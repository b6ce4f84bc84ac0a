"""The class of each sample."""

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.sampling.labels import Classes, choose_labels, image_labels, parse_classes
from improved_diffusion.sampling.noise import image_generator


def drawn(classes, wanted="", count=300):
    labels = choose_labels(classes, wanted, 3, "m.pt")
    return [labels.index(i) for i in range(count)]


def test_unasked_labels_are_of_classes_that_had_images():
    assert set(drawn(Classes(8, None, [1, 3, 7]))) == {1, 3, 7}
    assert drawn(Classes(8, None, [1, 3, 7]), "0,2", 3) == [0, 2, 0]  # asked for


@pytest.mark.parametrize("num", [1, 2, 10, 1000])
def test_all_classes_are_drawn_as_ever_where_all_had_images(num):
    expected = [int(image_generator(3, i, "label").integers(num)) for i in range(300)]
    assert drawn(Classes(num, None)) == drawn(Classes(num, None, list(range(num)))) == expected


def test_a_number_is_a_name_where_names_are_numbers():
    names = ["1", "3", "7"]
    assert parse_classes("7, 1", names, 3) == [2, 0]
    for word in ("0", "2", "8", "²", "-1", "1.0"):
        with pytest.raises(UserError, match=rf"--classes {word}: the model has the classes 1, 3, 7"):
            parse_classes(word, names, 3)
    assert parse_classes("cat,0", ["cat", "dog"], 2) == [0, 0]
    for word, near in (("Cat", "cat"), ("DOG", "dog"), ("dgo", "dog")):
        with pytest.raises(UserError, match=rf"--classes {word}: did you mean {near}\? the model has the classes 0"):
            parse_classes(word, ["cat", "dog"], 2)
    assert parse_classes("999", None, 1000) == [999]


@pytest.mark.parametrize("found", [[2, 0], np.array([2, 0]), np.array([[2], [0]]), np.array([2.0, 0.0])])
def test_the_labels_of_given_images(found):
    classes = Classes(3, ["1", "3", "7"])
    assert [image_labels(classes, "", 0, "m.pt", found, 2, "--images x").index(i) for i in range(3)] == [2, 0, 2]
    assert image_labels(classes, "3", 0, "m.pt", found, 2, "--images x").index(0) == 1


WRONG = [
    [3, 0], [-1, 0], np.array(["a", "b"]), np.eye(2), [0.5, 1], np.array([np.nan, 0]), [[0], 1], [0], [0, 1, 2], [],
]  # fmt: skip


@pytest.mark.parametrize("found", WRONG)
def test_labels_that_the_model_does_not_take_are_refused_where_it_needs_them(found):
    with pytest.raises(UserError, match="--images x has"):
        image_labels(Classes(3, None), "", 0, "m.pt", found, 2, "--images x")
    assert image_labels(None, "", 0, "m.pt", found, 2, "--images x") is None
    assert image_labels(Classes(3, None), "2", 0, "m.pt", found, 2, "--images x").index(0) == 2
