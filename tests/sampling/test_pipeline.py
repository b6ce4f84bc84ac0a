"""Drawing from a checkpoint: the samples, their description and their folder's name follow from the options."""

import json

import numpy as np
import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import contents, write_images

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageSampling, SuperResModel, SuperResSampling
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SEED_SCHEME
from improved_diffusion.sampling.pipeline import SamplingPipeline, SuperResPipeline
from improved_diffusion.sampling.request import describe_request


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A class-conditional model of 8x8."""
    folder = tmp_path_factory.mktemp("pipeline")
    return save_checkpoint(folder / "run/model000000.pt", tiny_settings(class_cond=True), class_names=CLASSES)


def pipeline(model, **options):
    options = {"num_samples": 3, "batch_size": 2, "steps": 2, **options}
    return SamplingPipeline(load_model(ImageSampling.of(options), options, str(model)))


def test_what_is_drawn_is_described_and_drawn_once(model, tmp_path):
    first = pipeline(model, sampler="ddim", seed=5, classes="dog")
    request = describe_request(first.loaded, first.sampler)
    assert first.name == "run_model000000_ddim_2steps_classes-dog_seed5"
    assert request["model_path"] == str(model) and request["sampler"] == "ddim" and request["steps"] == 2
    assert request["classes"] == "dog" and request["seed"] == 5 and request["seed_scheme"] == SEED_SCHEME
    path = first.write(str(tmp_path))
    assert path == str(tmp_path / "samples_3x8x8x3.npz")
    assert json.loads((tmp_path / "samples.json").read_text()) == request
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3) and arrays["arr_1"].tolist() == [1, 1, 1]
    before = contents(tmp_path)
    # Other classes are other samples, whatever is there.
    with pytest.raises(UserError, match="holds samples of --classes dog, but this command has --classes cat"):
        pipeline(model, sampler="ddim", seed=5, classes="cat").write(str(tmp_path))
    second = pipeline(model, sampler="ddim", seed=5, classes="dog", batch_size=3)
    assert second.write(str(tmp_path)) == path and contents(tmp_path) == before


def test_the_steps_are_shown_where_that_is_asked(model, tmp_path):
    pipeline(model, save_steps=2).write(str(tmp_path))
    assert (tmp_path / "steps.png").exists() and (tmp_path / "steps.gif").exists()


@pytest.mark.parametrize("options, culprit", [
    (dict(classes="cow"), "--classes cow: the model has the classes 0..1: cat, dog"),
    (dict(steps=21), "--steps 21"),
    (dict(image_size=16), "image_size"),
    (dict(guidance_scale=2), "guidance_scale 2"),
    (dict(seeds="3-1"), "--seeds"),
    (dict(seeds="3,1,3"), "--seeds"),
    (dict(seeds="x"), "--seeds"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_before_anything_is_drawn(model, options, culprit):
    with pytest.raises(UserError, match=culprit):
        pipeline(model, **options)


# Super-resolution of images of another size


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A super-resolution model from 8x8 to 16x16, of three levels, trained on padded images."""
    settings = tiny_settings(
        SuperResModel, image_size=None, large_size=16, small_size=8, channel_mult="1,1,1", resize_mode="pad",
        background="black",
    )  # fmt: skip
    return save_checkpoint(tmp_path_factory.mktemp("upscaler") / "run/model000000.pt", settings)


def enlarging(upscaler, base, **options):
    options = {"base_samples": str(base), "batch_size": 2, "steps": 2, **options}
    return SuperResPipeline(load_model(SuperResSampling.of(options), options, str(upscaler)))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (10, 24), (4, 2)])
@pytest.mark.parametrize("kind", ["folder", "npz", "file"])
def test_images_of_any_size_that_the_levels_divide_are_enlarged(upscaler, tmp_path, size, kind):
    folder = write_images(tmp_path / "base", 1 if kind == "file" else 3, size=size)
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    np.savez(tmp_path / "base.npz", arrays)
    base = {"folder": folder, "npz": tmp_path / "base.npz", "file": next(folder.iterdir())}[kind]
    pipe = enlarging(upscaler, base, any_size=True)
    np.testing.assert_array_equal(pipe.base.arrays, arrays)
    path = pipe.write(str(tmp_path / "out"))
    with np.load(path) as found:
        assert found["arr_0"].shape == (len(arrays), 2 * size[0], 2 * size[1], 3)
    assert (
        json.loads((tmp_path / "out/samples.json").read_text())["large_size"] == pipe.loaded.settings.model.large_size
    )
    if size == (8, 8):  # that of training: nothing differs
        plain = enlarging(upscaler, base)
        np.testing.assert_array_equal(pipe.draw([0]), plain.draw([0]))


@pytest.mark.parametrize("size, message", [((7, 8), "multiples of 2"), ((8, 9), "multiples of 2")])
def test_a_size_that_the_levels_do_not_divide_is_named(upscaler, tmp_path, size, message):
    with pytest.raises(UserError, match=f"base images of {size[0]}x{size[1]} .*{message}"):
        enlarging(upscaler, write_images(tmp_path / "base", 2, size=size), any_size=True)


def test_base_images_of_several_sizes_are_named(upscaler, tmp_path):
    write_images(tmp_path / "base", 2, size=(8, 8))
    write_images(tmp_path / "base", 2, size=(8, 16), classes=("x",))
    with pytest.raises(UserError, match="--any_size True needs images of one size, found 8x8, 8x16"):
        enlarging(upscaler, tmp_path / "base", any_size=True)
    np.savez(tmp_path / "wide.npz", np.zeros((2, 8, 16, 3), np.uint8))
    with pytest.raises(UserError, match="--any_size True"):  # is among the remedies
        enlarging(upscaler, tmp_path / "wide.npz")


def test_base_images_are_resized_as_the_model_was_trained_unless_told_otherwise(upscaler, tmp_path):
    Image.new("RGB", (32, 8), "red").save(tmp_path / "wide.png")
    padded = enlarging(upscaler, tmp_path / "wide.png")
    assert padded.base.arrays[0, 0, 0].tolist() == [0, 0, 0] and padded.base.arrays[0, 4, 4].tolist() == [255, 0, 0]
    assert enlarging(upscaler, tmp_path / "wide.png", resize_mode="stretch").base.arrays.min(axis=(0, 1, 2))[0] == 255
    request = describe_request(padded.loaded, padded.sampler)
    assert request["resize_mode"] == "pad" and request["background"] == "black" and "published_decoding" not in request


@pytest.mark.parametrize("given, told", [({"steps"}, True), ({"steps", "num_samples"}, False), ({"seeds"}, False)])
def test_a_number_of_samples_that_was_not_given_is_said_aloud(model, tmp_path, given, told):
    logger.configure(str(tmp_path), format_strs=["log"])
    options = dict(num_samples=3, steps=2, seeds="0-2" if "seeds" in given else "")
    SamplingPipeline(load_model(ImageSampling.of(options), given, str(model))).write(str(tmp_path))
    text = (tmp_path / "log.txt").read_text()
    assert ("drawing 3 images" in text and "--num_samples 16" in text) == told
