"""From noise to images."""

import numpy as np
import pytest
from editing_helpers import gaussian_images, gaussian_model
from gaussian_world import GaussianWorld
from model_helpers import save_checkpoint, tiny_settings

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Decoding, Encoding
from improved_diffusion.editing.decode import Decode
from improved_diffusion.editing.encode import Encode
from improved_diffusion.editing.latents import Latents


def test_decoding_undoes_encoding_and_repeats_in_turn():
    world = GaussianWorld(100, 30, grid="karras")
    encode = Encode(gaussian_model(world, "ddim", kind=Encoding), gaussian_images(3))
    decode = Decode(gaussian_model(world, "ddim", kind=Decoding, num_samples=4), encode.latents())
    assert decode.count == 4
    np.testing.assert_array_equal(decode.draw([0, 1, 2, 3])[[0, 1, 2, 0]], encode.draw([0, 1, 2])[[0, 1, 2, 0]])
    np.testing.assert_array_equal(decode.draw([3])[0], decode.draw([0])[0])


def test_noise_of_another_shape_is_refused():
    model = gaussian_model(GaussianWorld(100, 3), "ddim", kind=Decoding)
    with pytest.raises(UserError, match=r"\(3, 16, 16\).*m\.pt makes images of\s\(1, 16, 16\)"):
        Decode(model, Latents(np.zeros((2, 3, 16, 16), np.float32), None, {}, ""))


def test_the_steps_of_encoding_are_taken_unless_others_are_given(tmp_path):
    path = str(save_checkpoint(tmp_path / "m.pt", tiny_settings()))
    steps = dict(sampler="heun", steps=7, timestep_grid="karras", timestep_respacing="")

    def prepared(step_options=steps, **options):
        return Decode.prepare(load_model(Decoding.of(options), options, path), step_options).sampler

    assert (prepared().name, prepared().steps, prepared().grid) == ("heun", 7, "karras")
    assert (prepared(sampler="unipc").name, prepared(sampler="unipc").steps) == ("unipc", 20)
    assert prepared(use_ddim=True).name == "ddim" and prepared({}).steps == 20
    respaced = prepared(dict(sampler="ddim", steps=0, timestep_grid="auto", timestep_respacing="ddim5"))
    assert respaced.steps == 5 and respaced.diffusion.num_timesteps == 5


def test_missing_latents_are_named(tmp_path):
    path = str(save_checkpoint(tmp_path / "m.pt", tiny_settings()))
    for latents, culprit in (("", "--latents is missing"), ("nowhere.npz", "--latents nowhere.npz")):
        with pytest.raises(UserError, match=culprit):
            Decode.prepare(load_model(Decoding.of({"latents": latents}), (), path))
