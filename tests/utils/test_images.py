"""Arrays and image files."""

import io
import itertools
import os
import random
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch as th
from helpers import small_disk
from PIL import Image, ImageOps, PngImagePlugin

from improved_diffusion.config import ReadingConfig, UserError
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
    np.testing.assert_array_equal(images.load_npz(path), samples)
    np.testing.assert_array_equal(images.read_npz(path, ["arr_1"])["arr_1"], labels)
    images.save_npz(path, samples[..., 0])
    assert images.load_npz(path).shape == (3, 4, 5, 1)
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
    np.testing.assert_array_equal(images.load_npz(path), older)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_an_npz_on_a_full_disk_leaves_the_older_file_and_no_rubbish():
    with small_disk(200) as disk:
        path, older = str(disk / "x.npz"), random_uint8(10, 32, 32, 3)
        images.save_npz(path, older)
        with pytest.raises(UserError, match=r"cannot write .*x\.npz: No space left on device: free some space"):
            images.save_npz(path, images.Rows((100, 32, 32, 3), random_uint8(100, 32, 32, 3)))
        np.testing.assert_array_equal(images.load_npz(path), older)
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
        ([np.zeros((2, 3, 8, 8), np.uint8)], ["(2, 3, 8, 8)", "transpose(0, 2, 3, 1)"]),
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
    with pytest.raises(UserError, match=r"x\.npz has no arr_0 but images"):
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
        ("plain", "single array, not an npz"),
        ("text", "arr_0 is not an array"),
        ("flat", r"arr_0 of uint8 \(50, 0, 0, 3\), which holds no values"),
        ("header", "not a readable npz"),
        ("huge", "not a readable npz"),
    ):
        with pytest.raises(UserError, match=culprit):
            images.load_npz(str(tmp_path / f"{name}.npz"))


def array_file(descr, shape, data=b""):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


EMPTY_ROWS = [(10**9, 0), (2, 10**9, 0)]


@pytest.mark.parametrize(
    "descr, shape",
    [
        *itertools.product(["|S0", "|V0", "<U0", [("a", "|V0")]], [(), (2,), (2 * 10**8,), *EMPTY_ROWS]),
        *itertools.product(["|u1", "<f8"], EMPTY_ROWS),
    ],
)
def test_an_array_of_no_bytes_is_refused_whatever_its_shape(tmp_path, descr, shape):
    path = str(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", array_file(descr, shape))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.npz has arr_0 of .*no values"):
        images.read_npz(path, ("arr_0",))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "array", [np.zeros(0), np.zeros((0, 5), np.uint8), np.array([], str), np.array(""), np.array(7)]
)
def test_empty_arrays_and_single_values_are_read(tmp_path, array):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", array)
        found = images.read_npz(str(tmp_path / "x.npz"), ("arr_0",))["arr_0"]
        np.testing.assert_array_equal(found, array, strict=True)


def test_a_compressed_npz_unpacks_to_a_bounded_size(tmp_path, monkeypatch):
    path, blank = str(tmp_path / "x.npz"), np.zeros((10, 64, 64, 3), np.uint8)
    np.savez_compressed(path, blank)
    np.testing.assert_array_equal(images.load_npz(path), blank)  # a small one may be as compressible as it likes
    monkeypatch.setattr(images, "MAX_EXPANDED_BYTES", blank.nbytes - 1)
    with pytest.raises(UserError, match=r"x\.npz unpacks arr_0 from"):
        images.load_npz(path)
    np.savez(path, blank)
    np.testing.assert_array_equal(images.load_npz(path), blank)
    photos = np.stack([random_uint8(64, 64, 3)] * 10)
    np.savez_compressed(path, photos)
    np.testing.assert_array_equal(images.load_npz(path), photos)


# Image files as viewers show them


DEFAULT = ReadingConfig()
COLOURS = random_uint8(12, 20, 3)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def shown(data, channels=3, **options):
    """(pixels uint8 [H, W, C], what was done to them) of an encoded image."""
    reading = ReadingConfig(**options)
    image = images.load(io.BytesIO(data))
    decoded = images.with_channels(images.as_shown(image, reading), channels, reading, "a.png")
    return images.to_array(decoded.image, channels), decoded.done


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOURS), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    array, done = shown(data)
    np.testing.assert_array_equal(array, np.asarray(expected))
    assert array.shape == ((12, 20, 3) if orientation < 5 else (20, 12, 3))
    if form != "TIFF":  # which Pillow itself turns
        assert bool(done) == (orientation > 1)


def test_a_phones_pair_of_pictures_is_its_first():
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
    array, _ = shown(encoded(first, "MPO", save_all=True, append_images=[second], exif=exif))
    assert array.shape == (24, 16, 3) and array[0, 0, 0] > 250 and array[0, 0, 2] < 5


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert shown(encoded(Image.fromarray(COLOURS), "JPEG", exif=exif))[0].shape == COLOURS.shape


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(form):
    values = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    array, done = shown(encoded(Image.fromarray(values), form), 1)
    assert np.abs(array[..., 0] - values / 257).max() <= 0.5 and array.min() == 0 and array.max() == 255
    assert done == ("16-bit",)


def test_floats_from_zero_to_one_are_scaled_and_others_are_no_images():
    values = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)
    array, _ = shown(encoded(Image.fromarray(values), "TIFF"), 1)
    assert np.abs(array[..., 0] - values * 255).max() <= 0.5
    for wrong in (values * 255, values - 0.1, values * np.nan):
        with pytest.raises(ValueError, match="outside of 0 to 1"):
            shown(encoded(Image.fromarray(wrong), "TIFF"))
    with pytest.raises(ValueError, match="outside of 0 to 65535"):
        shown(encoded(Image.fromarray((values * 1e6).astype(np.int32)), "TIFF"))


def half_transparent(mode, hidden):
    """An image that is opaque and (200, 30, 30), or 100, on its left, and transparent on its right."""
    if mode in ("L", "I;16"):
        array = np.full((8, 8), 100 * (257 if mode == "I;16" else 1), np.uint16 if mode == "I;16" else np.uint8)
        array[:, 4:] = hidden[0] * (257 if mode == "I;16" else 1)
        return Image.fromarray(array), {"transparency": int(array[0, 7])}
    array = np.zeros((8, 8, 4), np.uint8)
    array[:, :4], array[:, 4:] = (200, 30, 30, 255), (*hidden, 0)
    image = Image.fromarray(array)
    if mode == "P":
        image = Image.fromarray((np.arange(8) // 4).astype(np.uint8)[None].repeat(8, 0), "P")
        image.putpalette([200, 30, 30, *hidden])
        return image, {"transparency": 1}
    if mode == "RGB":
        return image.convert("RGB"), {"transparency": tuple(hidden)}
    if mode == "LA":
        grey = np.full((8, 8, 2), (100, 255), np.uint8)
        grey[:, 4:] = hidden[0], 0
        return Image.fromarray(grey, "LA"), {}
    return image, {}


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("background, pixel", [("white", 255), ("black", 0), ("#808080", 128)])
def test_what_is_transparent_shows_the_background_whatever_it_hides(mode, background, pixel):
    for hidden in ((10, 240, 10), (255, 255, 255), (0, 0, 0)):
        image, options = half_transparent(mode, hidden)
        array, done = shown(encoded(image, "PNG", **options), background=background)
        assert (array[:, 4:] == pixel).all() and done[-1] == f"transparent on {background}"
        assert (array[:, :4] == ([100] * 3 if mode in ("L", "LA", "I;16") else [200, 30, 30])).all()


def test_partly_transparent_pixels_are_mixed_with_the_background():
    data = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG")
    assert shown(data, background="#0000ff")[0][0, 0].tolist() == [51, 0, 204]
    assert shown(encoded(Image.new("LA", (4, 4), (0, 51)), "PNG"), 1, background="#808080")[0][0, 0].tolist() == [102]


def test_an_opaque_alpha_channel_is_dropped_without_a_word():
    assert shown(encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG"))[1] == ()
    array, done = shown(encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 100)), "PNG"), 4)
    assert array[0, 0].tolist() == [9, 8, 7, 100] and done == ()


@pytest.mark.parametrize("name", ["red-ish", "#12345", "", "#11223344", "white; drop"])
def test_a_background_that_is_no_colour_is_named(name):
    with pytest.raises(UserError, match=f"--background '?{name}"):
        ReadingConfig(background=name)


@pytest.mark.parametrize("mode, form", [("CMYK", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("P", "PNG"), ("YCbCr", "JPEG")])
def test_other_modes_are_converted_as_pillow_does(mode, form):
    data = encoded(Image.fromarray(COLOURS).convert(mode), form)
    np.testing.assert_array_equal(shown(data)[0], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "BMP", "GIF", "JPEG2000", "ICO", "TGA", "QOI"])
def test_formats_are_recognised_by_content(form):
    if form not in images.formats() or form not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {form}")
    array, _ = shown(encoded(Image.new("RGB", (16, 16), (200, 30, 30)), form))
    assert np.abs(array.astype(int) - (200, 30, 30)).max() < 12


def test_postscript_is_never_opened(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was called"))
    with pytest.raises(Image.UnidentifiedImageError):
        images.load(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"))


# Channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("stored", ["L", "LA", "RGB", "RGBA", "P"])
def test_grey_is_grey_however_it_is_stored(stored, channels):
    level = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    array, done = shown(encoded(Image.fromarray(level).convert(stored), "PNG"), channels)
    assert (array[..., : 1 if channels < 3 else 3] == level[..., None]).all()
    assert channels in (1, 3) or (array[..., -1] == 255).all()
    assert done == (("grey stored as colour",) if channels < 3 and stored in ("RGB", "RGBA", "P") else ())


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_grey_jpeg_stored_as_colour_is_grey(quality):
    image = Image.fromarray(random_uint8(16, 16)).convert("RGB")
    array, done = shown(encoded(image, "JPEG", quality=quality), 1)
    assert array.shape == (16, 16, 1) and done == ("grey stored as colour",)


@pytest.mark.parametrize("mode, has", [("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("channels", [1, 2])
def test_colour_is_not_lost(mode, has, channels):
    image = Image.new(mode, (8, 8), "grey")
    image.putpixel((3, 5), (100, 100, 101, 255)[:has])
    with pytest.raises(UserError, match=rf"a\.png has {has} channels.*--channels {channels}.*give --channels {has}"):
        shown(encoded(image, "PNG"), channels)


@pytest.mark.parametrize("channels", [1, 2])
def test_colour_that_nobody_sees_does_not_matter(channels):
    array = np.full((4, 4, 4), (90, 90, 90, 255), np.uint8)
    array[0, 0] = (250, 3, 3, 0)
    pixels, _ = shown(encoded(Image.fromarray(array), "PNG"), channels, background="red")
    assert pixels[1, 1, 0] == 90
    assert pixels[0, 0].tolist() == [76] if channels == 1 else pixels[0, 0, 1] == 0  # red is as light as grey 76


# Large files


def large_texts():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 300_000, zip=True)
    info.add_text("plain", "x" * 2_000_000)
    info.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    return info


@pytest.mark.parametrize("form, options", [
    ("PNG", {"icc_profile": bytes(3_000_000)}), ("JPEG", {"icc_profile": bytes(3_000_000)}),
    ("TIFF", {"icc_profile": bytes(3_000_000)}), ("WEBP", {"icc_profile": bytes(3_000_000)}),
    ("PNG", {"pnginfo": large_texts()}), ("JPEG", {"comment": b"x" * 60_000}),
    ("JPEG", {"extra": b"".join(b"\xff\xeb\xff\xff" + bytes(65533) for _ in range(100))}),
])  # fmt: skip
def test_texts_and_profiles_of_any_size_leave_the_pixels_alone(form, options):
    options = dict(options, lossless=True) if form == "WEBP" else options
    array, _ = shown(encoded(Image.fromarray(COLOURS), form, **options))
    plain, _ = shown(encoded(Image.fromarray(COLOURS), form, **({"lossless": True} if form == "WEBP" else {})))
    np.testing.assert_array_equal(array, plain)


def test_a_png_cut_inside_its_texts_is_unreadable():
    data = encoded(Image.fromarray(COLOURS), "PNG", pnginfo=large_texts())
    with pytest.raises((OSError, SyntaxError)):
        shown(data[:1000])


def sparse_png(width, height):
    """A PNG of one bit per pixel, all black, that is small for its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_large_scan_is_read_and_pillows_limit_is_as_before(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert images.load(io.BytesIO(sparse_png(400, 300))).size == (400, 300)
    assert Image.MAX_IMAGE_PIXELS == 10_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(sparse_png(400, 300)))


@pytest.mark.parametrize("size", [(20_000, 15_001), (2**31 - 1, 2**31 - 1)])
def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(size, monkeypatch):
    data = sparse_png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", *size))
    crc = struct.pack(">I", zlib.crc32(data[12:29]))
    data = data[:29] + crc + data[33:]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="--max_image_pixels 300000000"):
        images.load(io.BytesIO(data))


def icon(form, png):
    """An icon that says 16 x 16 or 128 x 128 pixels, whatever the PNG in it is."""
    if form == "ICO":
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    part = b"ic07" + struct.pack(">I", 8 + len(png)) + png
    return b"icns" + struct.pack(">I", 8 + len(part)) + part


@pytest.mark.parametrize("form", ["ICO", "ICNS"])
@pytest.mark.parametrize("size, limit", [((20_000, 15_001), 300_000_000), ((20_000, 8_000), 10**8), ((40, 40), 1598)])
def test_a_large_image_in_an_icon_is_refused_before_it_is_decoded(form, size, limit, monkeypatch):
    data = icon(form, sparse_png(*size))
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=f"--max_image_pixels {limit}"):
        images.load(io.BytesIO(data), limit)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", ["ICO", "ICNS"])
def test_an_icon_up_to_the_limit_is_read(form):
    side = 16 if form == "ICO" else 128
    pixels = random_uint8(side, side, 3)
    image = images.load(io.BytesIO(icon(form, images.encode_png(pixels))), side**2)
    np.testing.assert_array_equal(np.asarray(image), pixels)


# The published way


def test_published_decoding_ignores_orientation_and_alpha():
    exif = Image.Exif()
    exif[0x0112] = 6
    reading = ReadingConfig(published_decoding=True)
    for mode, options in (("RGB", {"exif": exif}), ("RGBA", {}), ("P", {}), ("L", {}), ("CMYK", {})):
        form = "JPEG" if mode == "CMYK" else "PNG"
        data = encoded(Image.fromarray(random_uint8(12, 20, 4 if mode == "RGBA" else 3)).convert(mode), form, **options)
        array, done = shown(data, published_decoding=True)
        np.testing.assert_array_equal(array, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert done == ()
    with pytest.raises(UserError, match="--channels 1"):
        images.with_channels(images.Decoded(Image.new("L", (4, 4))), 1, reading, "a.png")
