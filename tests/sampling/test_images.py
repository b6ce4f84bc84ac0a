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


def test_a_loop_over_images_ends():
    assert [image.numbers for image in THREE] == [[10], [11], [12]]


def test_no_images_are_neither_shown_nor_saved(tmp_path):
    with pytest.raises(UserError, match="empty"):
        THREE[3:].grid()
    with pytest.raises(UserError, match="empty"):
        THREE[3:].save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
