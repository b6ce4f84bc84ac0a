"""Images to the model's size."""

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.config import RESIZE_MODES, ReadingConfig
from improved_diffusion.utils import resizing
from improved_diffusion.utils.resizing import fitting, random_crop, resize, resize_crop, resize_pad, stretch

RNG = np.random.default_rng(0)


def random_uint8(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def random_image(width, height):
    return Image.fromarray(random_uint8(height, width, 3))


# Crop


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24), (7, 5)])
@pytest.mark.parametrize("source", [(32, 32), (100, 37), (31, 90), (3, 3), (256, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA"])
def test_images_are_made_to_cover_the_size_and_cropped(size, source, mode):
    assert resize_crop(Image.new(mode, source), size).size == size[::-1]


def test_an_image_of_the_size_is_left_as_it_is():
    array = random_uint8(20, 30, 3)
    np.testing.assert_array_equal(np.asarray(resize_crop(Image.fromarray(array), (20, 30))), array)


def test_the_crop_is_central():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 200
    assert (np.asarray(resize_crop(Image.fromarray(array), (10, 10))) == 200).all()


def test_large_images_are_halved_by_a_box_filter_first():
    array = random_uint8(64, 64, 3)
    boxes = array.reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    got = np.asarray(resize_crop(Image.fromarray(array), (16, 16))).astype(float)
    assert np.abs(got - boxes).max() <= 2  # each of two halvings rounds once a direction


def as_published(image, side):
    """guided-diffusion's and improved-diffusion's own lines: halve, scale, crop."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = side / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (63, 200), (500, 70), (20, 30), (3, 170), (1, 1), (1000, 31)])
def test_ordinary_images_are_cropped_bit_by_bit_as_published(size):
    image = random_image(*size)
    np.testing.assert_array_equal(np.asarray(resize_crop(image, (32, 32))), as_published(image, 32))


@pytest.mark.parametrize("size", [(30_000, 3), (3, 30_000), (20_001, 7)])
def test_elongated_images_are_cropped_first_and_look_the_same(size, monkeypatch):
    image = random_image(*size)
    monkeypatch.setattr(resizing, "MANY_PIXELS", 10**12)
    whole = np.asarray(resize_crop(image, (64, 64))).astype(int)
    monkeypatch.undo()
    assert np.abs(np.asarray(resize_crop(image, (64, 64))).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000)])
def test_an_elongated_image_takes_little_memory(size, mode, monkeypatch):
    image, largest = Image.new("L", size, 200), []
    plain = Image.Image.resize

    def resized(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        largest.append(out.size[0] * out.size[1])
        return out

    monkeypatch.setattr(Image.Image, "resize", resized)
    out = resize(image, (64, 64), ReadingConfig(resize_mode=mode), key=(0,))
    assert out.size == (64, 64) and max(largest) <= 1_000_000
    assert np.asarray(out)[31, 31] == 200


# Pad and stretch


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA"])
@pytest.mark.parametrize(
    "size, inner", [((40, 20), (16, 8)), ((20, 40), (8, 16)), ((7, 7), (16, 16)), ((400, 3), (16, 1))]
)
def test_a_padded_image_is_whole_on_its_background(size, inner, mode):
    pixel = {"RGB": (0, 0, 255), "RGBA": (0, 0, 255, 255), "L": 10, "LA": (10, 255)}[mode]
    out = resize_pad(Image.new(mode, size, pixel), (16, 16), "#ff8000")
    assert out.size == (16, 16) and out.mode == mode and fitting(size, (16, 16))[0] == inner
    array = np.asarray(out.convert("RGB"))
    left, top = (16 - inner[0]) // 2, (16 - inner[1]) // 2
    inside = np.zeros((16, 16), bool)
    inside[top : top + inner[1], left : left + inner[0]] = True
    background = np.array([255, 128, 0] if mode[0] == "R" else [151] * 3)
    assert (np.abs(array[~inside] - background.astype(int)) <= 1).all()
    assert (array[inside] == ([0, 0, 255] if mode[0] == "R" else [10] * 3)).all()


def test_a_stretched_image_shows_its_corners():
    corners = np.zeros((20, 60, 3), np.uint8)
    corners[:10, :30], corners[10:, 30:] = 250, 120
    out = np.asarray(stretch(Image.fromarray(corners), (8, 8)))
    assert out.shape == (8, 8, 3)
    assert out[0, 0, 0] == 250 and out[7, 7, 0] == 120 and out[0, 7, 0] == out[7, 0, 0] == 0


@pytest.mark.parametrize("function", [stretch, lambda image, size: resize_pad(image, size, "white"), resize_crop])
def test_images_of_the_size_stay_as_they_are(function):
    image = random_image(24, 16)
    np.testing.assert_array_equal(np.asarray(function(image, (16, 24))), np.asarray(image))


# Random crops


def test_random_crops_are_parts_of_the_image_and_follow_from_the_key():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    crops = [np.asarray(resize(ramp, (50, 50), ReadingConfig(resize_mode="random_crop"), (3, i))) for i in range(30)]
    again = [np.asarray(resize(ramp, (50, 50), ReadingConfig(resize_mode="random_crop"), (3, i))) for i in range(30)]
    assert all((one == two).all() for one, two in zip(crops, again))
    starts, widths = np.array([(crop[0, 0], int(crop[0, -1]) - crop[0, 0]) for crop in crops]).T
    assert starts.min() < 20 and starts.max() > 80 and len(set(starts)) > 20
    assert widths.min() >= 78 and widths.max() <= 100  # at least four fifths of the shorter side, at most all


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (30, 400), (3, 3), (128, 127)])
def test_a_random_crop_has_the_size(size):
    for seed in range(5):
        assert random_crop(random_image(*size), (24, 48), np.random.default_rng(seed)).size == (48, 24)
