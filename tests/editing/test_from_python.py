"""Every command from Python, on arrays: the same bytes as the command line's."""

import numpy as np
import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call, save_mask

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import Decoding, Encoding, Inpainting, Interpolation, Variations
from improved_diffusion.editing.decode import Decode
from improved_diffusion.editing.encode import Encode
from improved_diffusion.editing.inpaint import Inpaint
from improved_diffusion.editing.interpolate import Interpolate
from improved_diffusion.editing.variations import Vary

LABELS = [0, 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A class-conditional model, and two images of its size with their classes."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(folder / "model.pt", tiny_settings(class_cond=True), class_names=CLASSES)
    np.savez(folder / "images.npz", pair(), np.array(LABELS))
    save_mask(folder / "mask.png", mask())
    return folder


def pair():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def mask():
    return np.arange(8)[:, None].repeat(8, 1) >= 4


def by_command(place, name, *args):
    """The samples of a command, uint8 [N, H, W, C]."""
    args = ["--model_path", "model.pt", "--steps", 4, "--seed", 3, *args, "--out_dir", f"out_{name}"]
    call("image_edit", name, *args, cwd=place).succeed()
    (path,) = (place / f"out_{name}").glob("samples_*.npz")
    with np.load(path) as arrays:
        return arrays["arr_0"]


def prepared(command, kind, place, *args, **options):
    """The model for a command, with options by name."""
    options = {"steps": 4, "seed": 3, **options}
    return command.prepare(load_model(kind.of(options), options, str(place / "model.pt")), *args)


def test_encode_and_decode(place):
    latents = Encode(prepared(Encode, Encoding, place), pair(), LABELS).latents()
    assert latents.arrays.shape == (2, 3, 8, 8) and latents.labels == LABELS and latents.step_options["steps"] == 4
    expected = by_command(place, "encode", "--images", "images.npz")
    with np.load(place / "out_encode/latents.npz") as arrays:
        np.testing.assert_array_equal(latents.arrays, arrays["arr_0"])
    back = Decode(prepared(Decode, Decoding, place, latents.step_options), latents)
    np.testing.assert_array_equal(back.draw(range(back.count)), expected)
    decoded = by_command(place, "decode", "--latents", "out_encode/latents.npz", "--classes", "dog")
    changed = Decode(prepared(Decode, Decoding, place, latents.step_options, classes="dog"), latents)
    np.testing.assert_array_equal(changed.draw(range(changed.count)), decoded)


def test_interpolate_between_images_and_between_samples(place):
    between = Interpolate(prepared(Interpolate, Interpolation, place, frames=3), pair(), LABELS)
    expected = by_command(place, "interpolate", "--images", "images.npz", "--frames", 3)
    np.testing.assert_array_equal(between.draw(range(between.count)), expected)
    samples = Interpolate(prepared(Interpolate, Interpolation, place, seeds="3,7"))
    frames = samples.draw(range(samples.count))
    assert frames.shape == (9, 8, 8, 3)
    call("image_sample", "--model_path", "model.pt", "--steps", 4, "--seed", 3, "--sampler", "ddim", "--seeds", "3,7",
         "--out_dir", "samples", cwd=place).succeed()  # fmt: skip
    with np.load(place / "samples/samples_2x8x8x3.npz") as arrays:
        assert np.abs(frames[[0, -1]].astype(int) - arrays["arr_0"]).max() <= 1  # batches of other sizes


def test_inpaint(place):
    paint = Inpaint(prepared(Inpaint, Inpainting, place, resamplings=2), pair(), mask()[None], LABELS)
    expected = by_command(place, "inpaint", "--images", "images.npz", "--mask", "mask.png", "--resamplings", 2)
    np.testing.assert_array_equal(paint.draw(range(paint.count)), expected)
    np.testing.assert_array_equal(expected[:, :4], pair()[:, :4])


def test_variations(place):
    vary = Vary(prepared(Vary, Variations, place, num_samples=3), pair(), LABELS)
    expected = by_command(place, "variations", "--images", "images.npz", "--num_samples", 3)
    np.testing.assert_array_equal(vary.draw(range(vary.count)), expected)
