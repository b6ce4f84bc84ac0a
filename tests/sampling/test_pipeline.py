"""Drawing from a checkpoint: the samples, their description and their folder's name follow from the options."""

import json

import numpy as np
import pytest
from script_helpers import TINY_IMAGE, call, contents, write_images

from improved_diffusion import config
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import UserError
from improved_diffusion.sampling.pipeline import Drawing

GROUPS = (
    config.SampleConfig, config.SamplerConfig, config.GuidanceConfig, config.ModelConfig, config.DiffusionConfig,
    config.RunConfig,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A class-conditional model of 8x8."""
    folder = tmp_path_factory.mktemp("drawing")
    args = ["--data_dir", write_images(folder / "data", 8), "--class_cond", "True", "--batch_size", 4, "--max_steps", 1]
    call("image_train", *TINY_IMAGE, *args, "--out_dir", folder / "run", cwd=folder).succeed()
    return folder / "run/model000000.pt"


def drawing(model, *argv):
    flags = ["--model_path", model, "--num_samples", 3, "--batch_size", 2, "--steps", 2, *argv]
    return Drawing(parse_options(GROUPS, "Draw.", list(map(str, flags))))


def test_what_is_drawn_is_described_and_drawn_once(model, tmp_path):
    first = drawing(model, "--sampler", "ddim", "--seed", 5, "--classes", "dog")
    assert first.name == "run_model000000_2ddimsteps_seed5"
    assert first.request["model_path"] == str(model) and first.request["sampler"] == "ddim"
    assert first.request["steps"] == 2 and first.request["classes"] == "dog" and first.request["seed"] == 5
    path = first.write(str(tmp_path))
    assert path == str(tmp_path / "samples_3x8x8x3.npz")
    assert json.loads((tmp_path / "samples.json").read_text()) == first.request
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3) and arrays["arr_1"].tolist() == [1, 1, 1]
    before = contents(tmp_path)
    # Other classes are other samples, whatever is there.
    with pytest.raises(UserError, match="holds samples made with classes dog, not cat"):
        drawing(model, "--sampler", "ddim", "--seed", 5, "--classes", "cat").write(str(tmp_path))
    second = drawing(model, "--sampler", "ddim", "--seed", 5, "--classes", "dog", "--batch_size", 3)
    assert second.write(str(tmp_path)) == path and contents(tmp_path) == before


def test_sample_i_follows_from_the_seed_plus_i(model, tmp_path):
    found = []
    for seed in (5, 6):
        with np.load(drawing(model, "--seed", seed, "--classes", "dog").write(str(tmp_path / str(seed)))) as arrays:
            found.append(arrays["arr_0"].astype(int))
    # A rounding apart: they were drawn in other batches.
    assert np.abs(found[0][1:] - found[1][:-1]).max() <= 1 < np.abs(found[0] - found[1]).max()


def test_the_steps_are_shown_where_that_is_asked(model, tmp_path):
    drawing(model, "--save_steps", 2).write(str(tmp_path))
    assert (tmp_path / "steps.png").exists() and (tmp_path / "steps.gif").exists()


def test_options_that_the_checkpoint_contradicts_are_refused_before_anything_is_drawn(model, tmp_path):
    for flags, message in (
        (["--classes", "cow"], "--classes cow: the model has the classes 0..1: cat, dog"),
        (["--steps", 21], "--steps 21"),
        (["--image_size", 16], "image_size"),
        (["--guidance_scale", 2], "guidance_scale 2"),
    ):
        with pytest.raises(UserError, match=message):
            drawing(model, *flags)
