"""Masks: their sizes and modes, and which image each belongs to."""

import numpy as np
import pytest
from PIL import Image
from script_helpers import save_mask

from improved_diffusion.config import ReadingConfig, UserError
from improved_diffusion.editing.masks import as_masks, read_masks


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


LEFT = np.array([[True, True, False, False]] * 4)


def painted_on_transparency(paint, hidden, rest=None):
    """RGBA: opaque paint on the left half; on the right transparent, or an opaque colour in the last column."""
    array = np.full((4, 4, 4), (*hidden, 0), np.uint8)
    array[:, :2] = (*paint, 255)
    if rest is not None:
        array[:, 3] = (*rest, 255)
    return array


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (10, 240, 10)])
@pytest.mark.parametrize("paint", [(255, 255, 255), (0, 0, 0), (200, 30, 30)])
@pytest.mark.parametrize("form", ["RGBA", "LA", "P", "npz"])
def test_on_a_transparent_mask_the_paint_says_where(tmp_path, paint, hidden, form):
    array = painted_on_transparency(paint, hidden)
    path = tmp_path / ("m.npz" if form == "npz" else "m.png")
    if form == "npz":
        np.savez(path, array[None])
    elif form == "P":
        image = Image.fromarray((~LEFT).astype(np.uint8), "P")
        image.putpalette([*paint, *hidden])
        image.save(path, transparency=1)
    else:
        Image.fromarray(array).convert(form).save(path)
    np.testing.assert_array_equal(read_masks(str(path), (4, 4), ["a"])[0], LEFT)


def test_black_paint_beside_white_on_a_transparent_mask_keeps_the_image(tmp_path):
    array = painted_on_transparency((255, 255, 255), (255, 255, 255), rest=(0, 0, 0))
    Image.fromarray(array).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_masks(str(tmp_path / "m.png"), (4, 4), ["a"])[0], LEFT)


def test_an_empty_transparent_mask_is_an_error(tmp_path):
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match="nothing would be painted"):
        read_masks(str(tmp_path / "m.png"), (4, 4), ["a"])


def test_a_mask_is_turned_as_exif_says_and_may_have_sixteen_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    white = Image.fromarray(LEFT.astype(np.uint8) * 255)
    white.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "m.png", exif=exif)
    Image.fromarray(LEFT.astype(np.uint16) * 65535).save(tmp_path / "n.png")
    for name in "mn":
        np.testing.assert_array_equal(read_masks(str(tmp_path / f"{name}.png"), (4, 4), ["a"])[0], LEFT)


@pytest.mark.parametrize("mode, expected", [
    ("pad", [[0] * 8] * 2 + [[1, 1, 0, 0, 0, 0, 0, 0]] * 4 + [[0] * 8] * 2),
    ("stretch", [[1, 1, 0, 0, 0, 0, 0, 0]] * 8), ("crop", [[0] * 8] * 8), ("random_crop", [[0] * 8] * 8),
])  # fmt: skip
def test_masks_are_resized_like_the_images(tmp_path, mode, expected):
    path = save_mask(tmp_path / "m.png", np.arange(16)[None].repeat(8, 0) < 4)
    reading = ReadingConfig(resize_mode=mode)
    if not np.any(expected):
        with pytest.raises(UserError, match=rf"m\.png has no white in the part that --resize_mode {mode} keeps"):
            read_masks(path, (8, 8), ["a"], reading)
        return
    np.testing.assert_array_equal(read_masks(path, (8, 8), ["a"], reading)[0], np.array(expected, bool))


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
    with pytest.raises(UserError, match=rf"--mask {path} has no white, "):
        read_masks(path, (4, 4), ["a"])
    red = np.zeros((4, 4, 3), np.uint8)
    red[1:3, 1:3] = 255, 0, 0
    Image.fromarray(red).save(tmp_path / "red.png")
    with pytest.raises(UserError, match=r"red\.png has no white, "):
        read_masks(str(tmp_path / "red.png"), (4, 4), ["a"])
    with pytest.raises(UserError, match=r"--mask nowhere\.png does not exist"):
        read_masks("nowhere.png", (4, 4), ["a"])
    with pytest.raises(UserError, match="--mask is missing: name an image, white where"):
        read_masks("", (4, 4), ["a"])


# Given in Python

FORMS = {
    "bool": lambda mask: mask, "uint8": lambda mask: mask.astype(np.uint8) * 255,
    "bool [1, H, W]": lambda mask: mask[None], "uint8 [1, H, W]": lambda mask: mask[None].astype(np.uint8) * 200,
    "PIL": lambda mask: Image.fromarray(mask.astype(np.uint8) * 255), "PIL 1": lambda mask: Image.fromarray(mask),
    "PIL RGB": lambda mask: Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"),
    "PIL transparent": lambda mask: Image.fromarray(np.stack([mask.astype(np.uint8) * 255] * 2, -1), "LA"),
    "PIL list": lambda mask: [Image.fromarray(mask.astype(np.uint8) * 255)],
}  # fmt: skip


@pytest.mark.parametrize("resize_mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(4, 4), (20, 20), (8, 12)])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_in_python_is_that_of_a_file(form, size, resize_mode, tmp_path):
    mask = np.zeros(size, bool)
    mask[: size[0] // 2, size[1] // 4 : -1] = True
    reading = ReadingConfig(resize_mode=resize_mode)
    expected = read_masks(save_mask(tmp_path / "m.png", mask), (4, 4), ["a"], reading)
    found = as_masks(FORMS[form](mask), (4, 4), ["a"], reading)
    assert found.dtype == bool and found.any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(as_masks(tmp_path / "m.png", (4, 4), ["a"], reading), expected)


@pytest.mark.parametrize("given", [
    np.ones((4, 4)), np.ones((4, 4), int), np.ones(4, bool), np.ones((1, 4, 4, 1), bool), np.ones((0, 4, 4), bool),
    None, 3, [], [np.ones((4, 4), bool)],
], ids=lambda given: type(given).__name__)  # fmt: skip
def test_what_is_no_mask_is_an_error(given):
    with pytest.raises(UserError, match="mask: expected the path of an image, a PIL image, or an array"):
        as_masks(given, (4, 4), ["a"])


def test_a_pil_mask_without_white_is_an_error():
    with pytest.raises(UserError, match=r"mask\[0\] has no white"):
        as_masks(Image.new("L", (4, 4)), (4, 4), ["a"])
