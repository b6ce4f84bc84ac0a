"""The tabs that edit and that enlarge images."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web_helpers import ASKING, drawn_of, png_files, run, run_command, run_python, status_of

from improved_diffusion.utils.images import to_image
from improved_diffusion.web.pictures import enlarged, painted_mask


@pytest.fixture
def file(image, tmp_path):
    """An uploaded image."""
    to_image(image).save(tmp_path / "upload.png")
    return str(tmp_path / "upload.png")


def painted(image, rows, columns):
    """What the editor gives for an image on which a part is painted."""
    background = to_image(enlarged(image))
    layer = np.zeros((*np.asarray(background).shape[:2], 4), np.uint8)
    factor = len(layer) // len(image)
    layer[rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor] = (
        99,
        102,
        241,
        255,
    )
    return {"background": background, "layers": [Image.fromarray(layer)], "composite": background}


PART = (slice(2, 5), slice(3, 8))


def inpaint(place, file, editor, n=2, label="3", seed=0):
    return run(place.edit.inpaint(ASKING, "digits", "", file, label, seed, editor, n, 10, 2, 5))


def vary(place, file, label="3", n=2, strength=0.5):
    return run(place.edit.vary(ASKING, "digits", "", file, label, 0, strength, n, 10))


def interpolate(place, file, last, last_label="5"):
    return run(place.edit.interpolate(ASKING, "digits", "", file, "3", 0, last, last_label, 4, 10))


def transform(place, file, others=("1", "2")):
    return run(place.edit.transform(ASKING, "digits", "", file, "3", 0, list(others), 10))


def jobs(place, file, image):
    """Each kind of edit, by name."""
    return {
        "inpaint": lambda: inpaint(place, file, painted(image, *PART)),
        "variations": lambda: vary(place, file),
        "interpolate": lambda: interpolate(place, file, file),
        "transform": lambda: transform(place, file),
    }


def shown(drawn):
    return [Path(path).read_bytes() for path in drawn.downloads.pngs]


def test_the_painted_part_is_the_mask(image):
    mask = painted_mask(painted(image, *PART), (8, 8))
    assert mask[PART].all() and mask.sum() == 15
    assert not painted_mask(None, (8, 8)).any()


def test_inpainting_keeps_what_is_not_painted(place, file, image):
    drawn = drawn_of(inpaint(place, file, painted(image, *PART)))
    outside = np.ones((8, 8), bool)
    outside[PART] = False
    for made in drawn.images.array:
        assert np.array_equal(made[outside], image[outside])
        assert not np.array_equal(made[PART], image[PART])


@pytest.mark.parametrize("kind", ["inpaint", "variations", "interpolate", "transform"])
@pytest.mark.parametrize("form", [0, 1], ids=["command", "python"])
def test_the_shown_code_edits_the_files_of_the_zip_to_the_same_bytes(place, file, image, tmp_path, kind, form):
    drawn = drawn_of(jobs(place, file, image)[kind]())
    with zipfile.ZipFile(drawn.downloads.zip) as archive:
        archive.extractall(tmp_path)
    (run_command, run_python)[form](drawn.codes()[form], tmp_path)
    assert list(png_files(tmp_path / "images").values()) == shown(drawn)


def test_an_interpolation_has_a_film(place, file):
    drawn = drawn_of(interpolate(place, file, file))
    with Image.open(drawn.downloads.gif) as gif:
        assert gif.n_frames in range(1, 7)
    assert not drawn_of(vary(place, file)).downloads.gif


@pytest.mark.parametrize(
    "steps, named",
    [
        (lambda place, file, image: inpaint(place, file, {"layers": []}), "nothing is painted"),
        (lambda place, file, image: inpaint(place, None, painted(image, *PART)), "Give an image"),
        (lambda place, file, image: vary(place, file, label=None), "needs the class"),
        (lambda place, file, image: vary(place, file, strength=0), "Strength"),
        (lambda place, file, image: vary(place, file, n=17), "Num samples"),
        (lambda place, file, image: interpolate(place, file, None), "Give an image"),
        (lambda place, file, image: transform(place, file, ()), "choose one new class"),
    ],
)
def test_what_is_missing_is_said(place, file, image, steps, named):
    *_, last = steps(place, file, image)
    assert "bad" in status_of(last) and named in status_of(last)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"<svg/>"],
                         ids=["empty", "text", "cut", "svg"])  # fmt: skip
def test_a_file_that_is_no_image_is_refused_without_its_path(place, tmp_path, content):
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(content)
    *_, last = vary(place, str(wrong))
    assert "cannot be read" in status_of(last) and str(tmp_path) not in status_of(last)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(place, tmp_path):
    Image.new("L", (20_000, 20_000)).save(tmp_path / "bomb.png")
    *_, last = vary(place, str(tmp_path / "bomb.png"))
    assert "pixels" in status_of(last)


def test_super_resolution_enlarges_and_is_drawn_again(place, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "small.png")
    steps = run(place.upscale.upscale(ASKING, "super", "", str(tmp_path / "small.png"), [], 2, 0, "dpmpp_2m", 4))
    drawn = drawn_of(steps)
    assert drawn.images.array.shape == (2, 16, 16, 3)
    with zipfile.ZipFile(drawn.downloads.zip) as archive:
        archive.extractall(tmp_path)
    run_command(drawn.codes()[0], tmp_path)
    assert list(png_files(tmp_path / "images").values()) == shown(drawn)


@pytest.mark.parametrize(
    "model, can", [("digits", [True] * 4), ("plain", [True] * 3 + [False]), ("super", [False] * 4)]
)
def test_buttons_say_what_the_model_cannot_do(place, model, can):
    *_, a, b, c, d = place.edit.fit(model, None, None, [])
    assert [button["interactive"] for button in (a, b, c, d)] == can
    assert all(button["value"].startswith("Needs") is not button["interactive"] for button in (a, b, c, d))
