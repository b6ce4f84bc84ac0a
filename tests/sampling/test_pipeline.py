"""Drawing from a checkpoint: the samples, their description and their folder's name follow from the options."""

import json

import numpy as np
import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import contents

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.sampling.noise import SEED_SCHEME
from improved_diffusion.sampling.pipeline import SamplingPipeline
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
    assert first.name == "run_model000000_2ddimsteps_classes-dog_seed5"
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
