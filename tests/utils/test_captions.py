"""Names under pictures."""

import numpy as np
import pytest

from improved_diffusion.utils import images
from improved_diffusion.utils.captions import caption, captioned


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [8, 48, 300])
def test_a_caption_is_below_the_picture_which_stays(channels, width):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, width, channels), dtype=np.uint8)
    shown = captioned(pictures, ["cat", "", "a name that is much too long for a picture of this size" * 2])
    np.testing.assert_array_equal(shown[:, :20], pictures)
    bands = shown[:, 20:]
    assert bands[0, ..., 0].min() < 128 and bands[2, ..., 0].min() < 128 and bands[1].min() == 255
    if channels in (2, 4):
        assert bands[..., -1].min() == 255  # opaque


def test_other_names_look_different():
    pictures = np.zeros((5, 48, 48, 3), np.uint8)
    bands = captioned(pictures, ["cat", "dog", "Жук", "émeu", "Ωmega"])[:, 48:]
    assert len(np.unique(bands.reshape(5, -1), axis=0)) == 5


@pytest.mark.parametrize("name, shown", [
    ("cat", "cat"), ("ice cream", "ice cream"), ("Жук", "Жук"), ("猫", "class 7"), ("a猫", "class 7"),
    ("a\nb", r"a\nb"), ("\x1b", r"\x1b"), ("", ""),
])  # fmt: skip
def test_names_without_letters_in_the_fonts_become_numbers(name, shown):
    assert caption(name, "class 7") == shown


def test_a_grid_without_captions_is_as_before():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    plain, named = images.grid(pictures), images.grid(pictures, captions=["a", "b", "c", "d"])
    np.testing.assert_array_equal(images.grid(pictures, captions=[]), plain)
    assert plain.shape == (102, 102, 3) and named.shape == (132, 102, 3)
    np.testing.assert_array_equal(named[2:50, 2:50], pictures[0])
