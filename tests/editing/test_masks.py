"""Masks: their sizes and modes, and which image each belongs to."""

import numpy as np
import pytest
from PIL import Image
from script_helpers import save_mask

from improved_diffusion.config import UserError
from improved_diffusion.editing.masks import read_masks


def test_a_mask_of_another_size_is_resized_without_greys_and_cropped_to_its_centre(tmp_path):
    wide = np.zeros((4, 8))
    wide[:, :2] = wide[:, 7:] = 1  # cropped away
    wide[1, 2] = wide[2, 5] = 1  # the corners of what is left
    mask = read_masks(save_mask(tmp_path / "m.png", wide), (8, 8), ["a"])
    expected = np.zeros((4, 4), bool)
    expected[1, 0] = expected[2, 3] = True
    np.testing.assert_array_equal(mask, expected.repeat(2, 0).repeat(2, 1)[None])
    shrunk = read_masks(save_mask(tmp_path / "n.png", expected.repeat(9, 0).repeat(9, 1)), (4, 4), ["a"])
    np.testing.assert_array_equal(shrunk, expected[None])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_masks_of_any_mode(tmp_path, mode):
    image = Image.new("L", (4, 4), 0)
    image.paste(255, (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "m.png")
    mask = read_masks(str(tmp_path / "m.png"), (4, 4), ["a"])
    np.testing.assert_array_equal(mask[0], np.array([[True, True, False, False]] * 4))


def test_masks_go_with_images_by_name_else_in_order(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        save_mask(tmp_path / "masks" / f"{name}.png", np.eye(4) == (np.arange(4) == i))
    folder = str(tmp_path / "masks")
    of_all = read_masks(folder, (4, 4), ["x", "y", "z"])  # a, b, c
    of_some = read_masks(folder, (4, 4), ["c", "a"])
    np.testing.assert_array_equal(of_some, of_all[[2, 0]])
    with pytest.raises(UserError, match=r"masks has 3 masks for 2 images"):
        read_masks(folder, (4, 4), ["c", "d"])


def test_a_mask_of_nothing_is_an_error(tmp_path):
    path = save_mask(tmp_path / "m.png", np.zeros((4, 4)))
    with pytest.raises(UserError, match=rf"--mask {path}"):
        read_masks(path, (4, 4), ["a"])
    with pytest.raises(UserError, match=r"--mask nowhere\.png does not exist"):
        read_masks("nowhere.png", (4, 4), ["a"])
    with pytest.raises(UserError, match="--mask is missing"):
        read_masks("", (4, 4), ["a"])
