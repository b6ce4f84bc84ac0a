"""Arrays and image files."""

import io
import os
import random
import zipfile

import numpy as np
import pytest
import torch as th
from helpers import small_disk
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.utils import images

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


def test_named_arrays_are_written_as_numpy_writes_them(tmp_path):
    named = {"mu": np.linspace(0, 1, 5), "sigma": np.eye(5, dtype=np.float32), "about": np.array('{"name": "x"}')}
    np.savez(tmp_path / "numpy.npz", random_uint8(2, 2), **named)
    images.save_npz(str(tmp_path / "ours.npz"), random_uint8(2, 2), **named)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert ours.files == ["arr_0", "mu", "sigma", "about"]
        for name, array in named.items():
            np.testing.assert_array_equal(ours[name], array)
            assert ours[name].dtype == array.dtype and ours[name].shape == array.shape
    with zipfile.ZipFile(tmp_path / "numpy.npz") as theirs, zipfile.ZipFile(tmp_path / "ours.npz") as ours:
        assert all(ours.read(f"{name}.npy") == theirs.read(f"{name}.npy") for name in named)
    found = images.read_npz(str(tmp_path / "ours.npz"), ("mu", "absent"))
    assert list(found) == ["mu"]


def test_a_named_array_of_objects_is_not_written(tmp_path):
    path = str(tmp_path / "x.npz")
    images.save_npz(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="Object arrays"):
        images.save_npz(path, mu=np.array([{}], dtype=object))
    np.testing.assert_array_equal(images.read_npz(path, ["mu"])["mu"], np.zeros(3))
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (1, 3, 3, 1), (12345, 2, 2, 2)])
def test_an_npz_written_row_by_row_is_what_numpy_writes(tmp_path, shape):
    array, labels = random_uint8(*shape), np.arange(shape[0])
    np.savez(tmp_path / "numpy.npz", array, labels)
    # However a row lies in memory, what counts is the order of its indices.
    rows = (np.asfortranarray(row) for row in array)
    images.save_npz(str(tmp_path / "ours.npz"), images.Rows(shape, rows), labels)
    with zipfile.ZipFile(tmp_path / "numpy.npz") as theirs, zipfile.ZipFile(tmp_path / "ours.npz") as ours:
        assert ours.namelist() == theirs.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert all(ours.read(name) == theirs.read(name) for name in ours.namelist())


@pytest.mark.parametrize(
    "rows", [random_uint8(2, 4, 4, 3), random_uint8(4, 4, 4, 3), random_uint8(3, 4, 4, 1), np.zeros((3, 4, 4, 3))]
)
def test_rows_that_are_not_of_the_array_leave_the_older_file(tmp_path, rows):
    path, older = str(tmp_path / "x.npz"), random_uint8(1, 4, 4, 3)
    images.save_npz(path, older)
    with pytest.raises(ValueError, match="row"):
        images.save_npz(path, images.Rows((3, 4, 4, 3), rows))
    np.testing.assert_array_equal(images.load_npz(path)["arr_0"], older)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_an_npz_on_a_full_disk_leaves_the_older_file_and_no_rubbish():
    with small_disk(200) as disk:
        path, older = str(disk / "x.npz"), random_uint8(10, 32, 32, 3)
        images.save_npz(path, older)
        with pytest.raises(UserError, match=r"cannot write .*x\.npz: No space left on device: free some space"):
            images.save_npz(path, images.Rows((100, 32, 32, 3), random_uint8(100, 32, 32, 3)))
        np.testing.assert_array_equal(images.load_npz(path)["arr_0"], older)
        assert os.listdir(disk) == ["x.npz"]


def test_a_damaged_png_is_told_from_a_whole_one():
    """Cut anywhere, or with any bit changed that could change the image."""
    array = random_uint8(9, 7, 3)
    data = images.encode_png(array)
    assert images.is_whole_png(data)
    np.testing.assert_array_equal(images.decode_png(data), array)
    generator = random.Random(0)
    end = len(data) - 12  # of what the image depends on: the last chunk is empty
    damaged = [data[:kept] for kept in range(end)] + [data[:kept] + bytes(len(data) - kept) for kept in range(end)]
    for position in range(end):
        changed = bytearray(data)
        changed[position] ^= 1 << generator.randrange(8)
        damaged.append(bytes(changed))
    for bad in damaged:
        assert not images.is_whole_png(bad)
        with pytest.raises(ValueError):
            images.decode_png(bad)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_is_decoded_to_what_was_encoded(channels):
    array = random_uint8(5, 7, channels)
    np.testing.assert_array_equal(images.decode_png(images.encode_png(array)), array)


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


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_step(tmp_path):
    rows = np.stack([np.full((50, 60, 3), 10 * r + k, np.uint8) for r in range(2) for k in range(3)])
    path = tmp_path / "strip.png"
    images.save_strip(str(path), rows.reshape(2, 3, 50, 60, 3))
    sheet = images.decode_png(path.read_bytes())
    assert sheet.shape == (2 * 52 + 2, 3 * 62 + 2, 3)
    assert sheet[25::52, 30::62, 0].tolist() == [[0, 1, 2], [10, 11, 12]]


# Animations


def gif_frames(path):
    """(frames as RGB uint8 [K, H, W, 3], milliseconds of each, how often it runs: 0 is for ever)."""
    with Image.open(path) as gif:
        frames, milliseconds, loop = [], [], gif.info.get("loop")
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB")))
            milliseconds.append(gif.info["duration"])
    return np.stack(frames), milliseconds, loop


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_shows_each_frame_and_runs_for_ever(tmp_path, channels):
    path, frames = tmp_path / "steps.gif", random_uint8(5, 50, 60, channels) // 64 * 85  # 64 colours: none is lost
    images.save_gif(str(path), frames, milliseconds=70)
    shown, milliseconds, loop = gif_frames(path)
    np.testing.assert_array_equal(shown, frames.repeat(3, axis=3) if channels == 1 else frames)
    assert milliseconds == [70] * 5 and loop == 0
    assert os.listdir(tmp_path) == ["steps.gif"]


def test_a_gif_of_many_colours_stays_near_them(tmp_path):
    ramp = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 4), [128]), axis=-1).reshape(64, 64, 3)
    images.save_gif(str(tmp_path / "a.gif"), np.stack([ramp, ramp[::-1]]).astype(np.uint8))
    shown, _, _ = gif_frames(tmp_path / "a.gif")
    assert np.abs(shown[0].astype(int) - ramp).max() <= 16  # 4096 colours of a plane in 256: a 16th of each axis


def test_frames_that_do_not_change_take_their_time(tmp_path):
    frames = np.stack([np.full((48, 48, 1), grey, np.uint8) for grey in (0, 9, 9, 9, 0)])
    images.save_gif(str(tmp_path / "a.gif"), frames, milliseconds=40)
    assert gif_frames(tmp_path / "a.gif")[1] == [40, 120, 40]
    images.save_gif(str(tmp_path / "b.gif"), frames[1:4], milliseconds=40)
    assert gif_frames(tmp_path / "b.gif")[0].shape == (1, 48, 48, 3)


def test_small_gifs_are_enlarged_pixel_by_pixel(tmp_path):
    frames = random_uint8(2, 3, 5, 1)
    images.save_gif(str(tmp_path / "a.gif"), frames)
    shown, _, _ = gif_frames(tmp_path / "a.gif")
    np.testing.assert_array_equal(shown[..., :1], frames.repeat(16, axis=1).repeat(16, axis=2))


@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_transparent_is_white_in_a_gif(tmp_path, channels):
    frames = np.zeros((2, 48, 48, channels), np.uint8)
    frames[0, :, 16:, -1], frames[0, :, 32:, -1], frames[1, ..., -1] = 51, 255, 255  # black: none, a fifth, all of it
    images.save_gif(str(tmp_path / "a.gif"), frames)
    shown, _, _ = gif_frames(tmp_path / "a.gif")
    assert shown[0, 0, [0, 20, 40]].tolist() == [[255] * 3, [204] * 3, [0] * 3] and shown[1].max() == 0


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


def test_files_that_are_no_npz_of_images_are_named(tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "plain.npz").write_bytes((tmp_path / "plain.npy").read_bytes())
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("arr_0", "text")
    np.savez(tmp_path / "flat.npz", np.zeros((50, 0, 0, 3), np.uint8))
    np.savez(tmp_path / "whole.npz", np.zeros((2, 4, 4, 3), np.uint8))
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "header.npz").write_bytes(data.replace(b"(2, 4, 4, 3)", b"(2, '4, 4, )"))
    (tmp_path / "huge.npz").write_bytes(data.replace(b"(2, 4, 4, 3)", b"(2**60,4,99)"))
    for name, culprit in (
        ("plain", "single array, not an npz"), ("text", "arr_0 is not an array"),
        ("flat", r"arr_0 of uint8 \(50, 0, 0, 3\)"), ("header", "not a readable npz"), ("huge", "not a readable npz"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=culprit):
            images.load_npz(str(tmp_path / f"{name}.npz"))
