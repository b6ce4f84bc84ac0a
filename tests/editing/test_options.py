"""What the editing commands fill in, and which options they refuse."""

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Decoding, Encoding, Inpainting, Interpolation, Variations
from improved_diffusion.editing.interpolate import settings_between_seeds
from improved_diffusion.editing.options import decoding_settings, inversion_settings, renoising_settings


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
    (inversion_settings, dict(sampler="renoise"), "--sampler renoise"),
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
    (dict(sampler="renoise"), "--sampler renoise"),
    (dict(use_ddim=True, ddim_eta=1), "--ddim_eta 1.0"),
    (dict(sampler="euler", churn=3), "--churn 3.0"),
])  # fmt: skip
def test_frames_between_samples_are_not_noisy(options, culprit):
    with pytest.raises(UserError, match=culprit):
        settings_between_seeds(Interpolation.of({"seeds": "3,7", **options}))
