"""Arrays and image files."""

import io
import os

import numpy as np
import pytest
import torch as th
from PIL import Image

from improved_diffusion import images
from improved_diffusion.config import UserError

RNG = np.random.default_rng(0)


def random_uint8(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# Floats and bytes


def test_bytes_are_truncated_as_published():
    x = th.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 7.0]).view(1, 1, 1, 8)
    expected = [0, 0, 0, 127, 191, 254, 255, 255]  # clamp((x + 1) * 127.5, 0, 255), truncated
    assert images.to_uint8(x).ravel().tolist() == expected


def test_layout_goes_from_channels_first_to_last_and_back():
    x = th.rand(2, 3, 4, 5) * 2 - 1
    array = images.to_uint8(x)
    assert array.shape == (2, 4, 5, 3) and array.dtype == np.uint8 and array.flags["C_CONTIGUOUS"]
    assert array[1, 2, 3, 0] == int((x[1, 0, 2, 3] + 1) * 127.5)
    back = images.from_uint8(array)
    assert back.shape == (2, 3, 4, 5) and back.dtype == th.float32 and back.abs().max() <= 1
    assert (back - x).abs().max() <= 2 / 255 + 1e-6


def test_bytes_survive_the_way_there_and_back_within_the_truncation():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = images.from_uint8(levels)
    assert x.min() == -1 and x.max() == 1
    back = images.to_uint8(x + 1e-3)  # a hair above the level, so that truncation does not cross it
    np.testing.assert_array_equal(back, levels)


# Files


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_keeps_every_channel(channels, mode):
    array = random_uint8(5, 7, channels)
    image = Image.open(io.BytesIO(images.encode_png(array)))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image).reshape(array.shape), array)


def test_npz_is_the_published_form(tmp_path):
    path, samples, labels = str(tmp_path / "samples.npz"), random_uint8(3, 4, 5, 3), np.array([1, 0, 2])
    images.save_npz(path, samples, labels)
    with np.load(path) as data:
        assert data.files == ["arr_0", "arr_1"]
    arrays = images.load_npz(path)
    np.testing.assert_array_equal(arrays["arr_0"], samples)
    np.testing.assert_array_equal(arrays["arr_1"], labels)
    images.save_npz(path, samples[..., 0])
    arrays = images.load_npz(path)
    assert arrays["arr_0"].shape == (3, 4, 5, 1) and "arr_1" not in arrays
    assert os.listdir(tmp_path) == ["samples.npz"]


@pytest.mark.parametrize(
    "arrays, culprits",
    [
        ([np.zeros((2, 4, 4, 3))], ["float64", "uint8"]),
        ([np.zeros((4, 4), np.uint8)], ["(4, 4)", "uint8 [N, height, width, channels]"]),
        ([np.zeros((0, 4, 4, 3), np.uint8)], ["(0, 4, 4, 3)"]),
        ([np.zeros((2, 4, 4, 5), np.uint8)], ["(2, 4, 4, 5)", "1 to 4 channels"]),
        ([np.zeros((2, 4, 4, 3), np.uint8), np.array([1])], ["arr_1", "(1,)", "2 images"]),
        ([np.zeros((2, 4, 4, 3), np.uint8), np.array([1.0, 2.0])], ["arr_1", "float64"]),
        ([np.array([{"a": 1}], dtype=object)], ["could run code"]),
    ],
)
def test_an_npz_of_another_form_is_named(tmp_path, arrays, culprits):
    path = str(tmp_path / "x.npz")
    np.savez(path, *arrays)
    with pytest.raises(UserError) as error:
        images.load_npz(path)
    for culprit in ["x.npz", *culprits]:
        assert culprit in str(error.value)


def test_an_npz_without_images_and_damaged_ones_are_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"x\.npz has no arr_0"):
        images.load_npz(str(path))
    data = path.read_bytes()
    for damaged in (b"", b"text", data[: len(data) // 2], data[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.npz"):
            images.load_npz(str(path))


def test_sample_names_hold_the_class_where_labels_are_read():
    assert images.sample_name(7, None) == "000007.png"
    assert images.sample_name(7, "cat") == "cat_000007.png"
    assert images.sample_name(1234567, "tabby cat/old_one") == "tabby-cat-old-one_1234567.png"
    assert images.sample_name(3, "big_cat").split("_")[0] == "big-cat"


def test_image_names():
    for name in ("a.jpg", "A.JPEG", "x/y.png", "b.GIF"):
        assert images.is_image_name(name)
    for name in ("a.txt", "png", "a.png.bak", "a.npz"):
        assert not images.is_image_name(name)


# Grids


def test_a_grid_is_as_square_as_it_gets_row_by_row():
    pictures = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(5)])
    sheet = images.grid(pictures, border=1)
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1, 3)  # 5 images: 3 columns, 2 rows
    assert [int(sheet[1 + 5 * (i // 3), 1 + 5 * (i % 3), 0]) for i in range(5)] == list(range(5))
    assert sheet[0].min() == 255 and sheet[6, 11:].min() == 255  # the border, and the place of the sixth
    assert images.grid(pictures, columns=5, border=0).shape == (4, 20, 3)


def test_small_images_are_enlarged_pixel_by_pixel():
    pictures = random_uint8(1, 3, 5, 1)
    sheet = images.grid(pictures, border=0, min_side=6)
    np.testing.assert_array_equal(sheet, pictures[0].repeat(2, axis=0).repeat(2, axis=1))
    np.testing.assert_array_equal(images.grid(pictures, border=0, min_side=3), pictures[0])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_saved_grid_is_a_png(tmp_path, channels):
    path = tmp_path / "grid.png"
    images.save_grid(str(path), random_uint8(4, 60, 50, channels), columns=2)
    with Image.open(path) as image:
        assert image.size == (2 * 52 + 2, 2 * 62 + 2)


# Channels


@pytest.mark.parametrize(
    "mode, channels", [("L", 1), ("L", 3), ("LA", 2), ("LA", 3), ("LA", 1), ("LA", 4), ("RGB", 3), ("RGBA", 4),
                       ("RGBA", 3), ("1", 1), ("CMYK", 3), ("P", 3)],
)  # fmt: skip
def test_conversions_that_lose_no_colour_are_done(mode, channels):
    image = images.convert(Image.new(mode, (4, 4)), channels, "a.png")
    assert image.mode == images.MODES[channels]


@pytest.mark.parametrize(
    "mode, channels, has", [("RGB", 1, 3), ("RGBA", 1, 4), ("L", 4, 1), ("L", 2, 1), ("RGB", 4, 3)]
)
def test_conversions_that_lose_colour_or_make_up_alpha_are_named(mode, channels, has):
    with pytest.raises(UserError, match=rf"dir/a\.png has {has} channel.*--channels {channels}.*--channels {has}"):
        images.convert(Image.new(mode, (4, 4)), channels, "dir/a.png")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_named(mode):
    with pytest.raises(UserError, match=rf"dir/a\.png has more than 8 bits.*{mode}.*8 bits"):
        images.convert(Image.new(mode, (4, 4)), 1, "dir/a.png")


# Sizes


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24), (7, 5)])
@pytest.mark.parametrize("source", [(32, 32), (100, 37), (31, 90), (3, 3), (256, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_images_are_made_to_cover_the_size_and_cropped(size, source, mode):
    assert images.resize_crop(Image.new(mode, source), size).size == size[::-1]


def test_an_image_of_the_size_is_left_as_it_is():
    array = random_uint8(20, 30, 3)
    np.testing.assert_array_equal(np.asarray(images.resize_crop(Image.fromarray(array), (20, 30))), array)


def test_the_crop_is_central():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 200
    assert (np.asarray(images.resize_crop(Image.fromarray(array), (10, 10))) == 200).all()


def test_large_images_are_halved_by_a_box_filter_first():
    array = random_uint8(64, 64, 3)
    boxes = array.reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    got = np.asarray(images.resize_crop(Image.fromarray(array), (16, 16))).astype(float)
    assert np.abs(got - boxes).max() <= 2  # each of two halvings rounds once a direction


def test_a_palette_is_resolved_before_filtering():
    image = Image.new("P", (8, 8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putdata([(x + y) % 2 for y in range(8) for x in range(8)])
    grey = np.asarray(images.resize_crop(image, (4, 4)).convert("L"))
    assert (np.abs(grey.astype(int) - 127) <= 1).all()
