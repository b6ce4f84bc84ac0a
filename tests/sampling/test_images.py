"""Images as a person holds them."""

import numpy as np
import pytest

from improved_diffusion import Images
from improved_diffusion.config import UserError

THREE = Images(np.arange(3, dtype=np.uint8).repeat(12).reshape(3, 2, 2, 3), np.array([5, 6, 7]), None, [10, 11, 12])


def test_an_index_gives_one_image_with_its_label_and_number():
    for index in (1, -2, np.int64(1)):
        one = THREE[index]
        assert one.array.shape == (1, 2, 2, 3) and one.array.max() == 1
        assert one.labels.tolist() == [6] and one.numbers == [11]


def test_a_slice_gives_several():
    assert THREE[1:].labels.tolist() == [6, 7] and THREE[1:].numbers == [11, 12]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_the_last_is_an_error(index):
    with pytest.raises(IndexError):
        THREE[index]


def test_what_a_prompt_shows_is_short():
    assert repr(Images(np.zeros((1200, 16, 12, 3), np.uint8))) == "Images(1,200 images of uint8 (16, 12, 3))"


def test_a_loop_over_images_ends():
    assert [image.numbers for image in THREE] == [[10], [11], [12]]


def test_no_images_are_neither_shown_nor_saved(tmp_path):
    with pytest.raises(UserError, match="empty"):
        THREE[3:].grid()
    with pytest.raises(UserError, match="empty"):
        THREE[3:].save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saved_images_are_not_mixed_with_others(tmp_path):
    THREE.save(tmp_path)
    THREE.save(tmp_path)  # the same ones again
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for other in (THREE[1:], Images(THREE.array), Images(THREE.array, THREE.labels, None, [1, 2, 3])):
        with pytest.raises(UserError, match=r"holds other images.*another folder"):
            other.save(tmp_path)
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(UserError, match=r"samples\.json.*another folder"):
        THREE.save(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*before, "samples.json"])


def test_names_and_captions_are_of_the_classes(tmp_path):
    names = [*"abcde", "ice cream", "猫", "big_cat"]
    named = Images(THREE.array, THREE.labels, names, THREE.numbers)
    named.save(tmp_path)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "ice cream_000010.png", "猫_000011.png", "big-cat_000012.png",
    }  # fmt: skip
    assert named.grid().height > Images(THREE.array).grid().height


def test_given_names_are_kept(tmp_path):
    Images(THREE.array, None, None, None, ["x", "y", "x"])[1:].save(tmp_path)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"x.png", "y.png"}
