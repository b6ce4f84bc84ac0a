"""What the editing commands do unless told, what they refuse, and which samplers draw noise."""

import numpy as np
import pytest
import torch as th
from editing_helpers import gaussian_model
from gaussian_world import GaussianWorld

from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config import SAMPLERS, UserError
from improved_diffusion.config.settings import (
    Decoding,
    Encoding,
    Inpainting,
    Interpolation,
    Variations,
)
from improved_diffusion.editing.base import (
    INVERTIBLE,
    NOISY,
    EditingModel,
    ImageEdit,
    decoding_settings,
    inversion_path,
    inversion_settings,
    read_given,
    renoising_settings,
)
from improved_diffusion.editing.interpolate import settings_between_seeds
from improved_diffusion.sampling.labels import Classes
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.sampling.solvers import RULES


def filled_in(settings):
    sampler = settings.sampler
    return sampler.sampler, sampler.steps, sampler.timestep_grid, sampler.clip_denoised


def test_what_inversion_does_unless_told():
    def of(**options):
        return inversion_settings(Encoding.of(options), options)

    assert filled_in(of()) == ("ddim", 200, "karras", False)
    assert of(diffusion_steps=50).sampler.steps == 50
    assert of(timestep_respacing="ddim25").sampler.steps == 0
    assert of(timestep_grid="0,10.5,800").sampler.steps == 0
    assert of(clip_denoised=True).sampler.clip_denoised is True
    assert filled_in(of(sampler="heun", steps=7, timestep_grid="logsnr")) == ("heun", 7, "logsnr", False)


def test_what_decoding_does_unless_told():
    assert filled_in(decoding_settings(Decoding.of({}), ())) == ("ddim", 200, "karras", False)
    assert filled_in(decoding_settings(Decoding.of({"sampler": "unipc", "steps": 5}), ()))[:2] == ("unipc", 5)


def test_between_samples_the_steps_are_those_of_sampling():
    assert filled_in(settings_between_seeds(Interpolation.of({"seeds": "3,7"}))) == ("ddim", 0, "auto", True)


@pytest.mark.parametrize("kind", [Inpainting, Variations])
def test_what_commands_that_add_noise_do_unless_told(kind):
    def of(**options):
        return filled_in(renoising_settings(kind.of(options), "it"))[:2]

    assert of() == ("auto", 100) and of(diffusion_steps=50) == ("auto", 50)
    assert of(sampler="unipc") == ("unipc", 0) and of(steps=7) == ("auto", 7)


def test_settings_are_new_objects():
    settings = Encoding.of({})
    assert inversion_settings(settings, ()) is not settings and filled_in(settings) == ("auto", 0, "auto", True)


@pytest.mark.parametrize("resolve, options, culprit", [
    (inversion_settings, dict(guidance_scale=2), "--guidance_scale 2.0"),
    (inversion_settings, dict(classifier_path="c.pt"), "--classifier_path c.pt"),
    (inversion_settings, dict(sampler="unipc"), "--sampler unipc"),
    (inversion_settings, dict(sampler="ddim", ddim_eta=1), "--ddim_eta 1.0"),
    (inversion_settings, dict(sampler="heun", churn=5), "--churn 5.0"),
    (inversion_settings, dict(dynamic_threshold=0.9), "--dynamic_threshold 0.9"),
    (renoising_settings, dict(sampler="heun", churn=5), "--churn 5.0"),
])  # fmt: skip
def test_what_a_command_cannot_do_is_refused(resolve, options, culprit):
    with pytest.raises(UserError, match=culprit):
        resolve(Encoding.of(options), ())


@pytest.mark.parametrize("options, culprit", [
    (dict(sampler="ancestral"), "--sampler ancestral"),
    (dict(sampler="dpmpp_2m_sde"), "--sampler dpmpp_2m_sde"),
    (dict(use_ddim=True, ddim_eta=1), "--ddim_eta 1.0"),
    (dict(sampler="euler", churn=3), "--churn 3.0"),
])  # fmt: skip
def test_frames_between_samples_are_not_noisy(options, culprit):
    with pytest.raises(UserError, match=culprit):
        settings_between_seeds(Interpolation.of({"seeds": "3,7", **options}))


def test_one_step_has_no_way_back():
    world = GaussianWorld(100, 1)
    with pytest.raises(UserError, match="at least two steps"):
        gaussian_model(world, "ddim", inversion_path)


def test_every_rule_is_known_to_draw_noise_or_not():
    world = GaussianWorld(100, 10)
    noise, ends = world.start(1), {}
    for rule in RULES:
        for seed in (0, 1):
            *_, last = gaussian_model(world, rule, seed=seed).trajectory([0], {}, noise=noise)
            ends[rule, seed] = last["sample"]
    assert {rule for rule in RULES if not th.equal(ends[rule, 0], ends[rule, 1])} == set(NOISY)
    assert set(INVERTIBLE) < set(RULES) == set(SAMPLERS) - {"auto"}


def model_with_classes(names, num=None, kind=Encoding, **options):
    """A model that knows its options and classes, and cannot draw."""
    settings = kind.of({"image_size": 8, "class_cond": True, **options})
    loaded = LoadedModel("m.pt", settings, frozenset(options), None, None, {})
    return EditingModel(loaded, None, None, Classes(num or len(names), names))


def test_labels_are_the_wanted_ones_else_those_of_the_images():
    images, model = np.zeros((3, 8, 8, 3), np.uint8), model_with_classes(["cat", "dog"], images="a")
    assert [ImageEdit(model, images, [0, 1, 1]).labels.index(i) for i in range(4)] == [0, 1, 1, 0]
    wanted = model_with_classes(["cat", "dog"], images="a", classes="dog")
    assert [ImageEdit(wanted, images, [0, 0, 0]).labels.index(i) for i in range(3)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"--images a has no classes among cat, dog, which m\.pt needs.*--classes"):
        ImageEdit(model, images)
    with pytest.raises(UserError, match=r"--images a has the label 2, but the model has the classes 0\.\.1"):
        ImageEdit(model, images, [0, 2, 0])


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 8, 9, 3), np.uint8), ((2, 8, 8, 3), np.float32), ((0, 8, 8, 3), np.uint8), ((8, 8, 3), np.uint8)],
)
def test_images_that_do_not_fit_the_model_are_refused(shape, dtype):
    with pytest.raises(UserError, match=r"m\.pt takes uint8 \[N, 8, 8, 3\]"):
        ImageEdit(model_with_classes(["cat", "dog"], classes="cat"), np.zeros(shape, dtype))


def test_output_among_the_images_is_refused(tmp_path):
    model = model_with_classes(["cat"], images=str(tmp_path), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="--out_dir"):
        read_given(model)


def test_respacing_that_decoding_takes_from_the_latents_reaches_the_diffusion():
    settings = Decoding.of({"diffusion_steps": 50, "noise_schedule": "cosine"})
    world = GaussianWorld(50)
    loaded = LoadedModel("m.pt", settings, frozenset(), th.nn.Identity(), world.diffusion, {})
    respaced = settings.replace(timestep_respacing="ddim25", sampler="ddim")
    model = EditingModel.build(loaded, respaced, lambda settings, sampler: sampler.path)
    assert model.sampler.diffusion.num_timesteps == 25 == len(model.sampler.path) - 1
    assert model.sampler.steps == build_sampler(respaced, model.loaded.diffusion).steps
