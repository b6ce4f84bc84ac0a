"""The published networks as UNet2DModel: every tensor has its place."""

import diffusers
import pytest
import torch as th

from improved_diffusion.checkpoints import diffusers_network
from improved_diffusion.config import UserError
from improved_diffusion.config.presets import options_for
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.models.build import build_model


def published(preset):
    """(settings, the network without numbers) of a preset."""
    options = options_for(preset, ImageModel)
    settings = ImageModel.of({name: value for name, value in options.items() if name in ImageModel.options()})
    with th.device("meta"):
        return settings, build_model(settings.model, settings.diffusion.learn_sigma)


@pytest.mark.parametrize("preset", ["cifar10-hybrid", "lsun-bedroom", "adm-imagenet64", "adm-imagenet256"])
def test_published_networks_are_networks_of_diffusers(preset):
    settings, network = published(preset)
    config = diffusers_network.config_of(settings.model, settings.diffusion, network)
    table = diffusers_network.rows(network, diffusers_network.sines_first(config))
    ours = {name: tensor.shape for name, tensor in diffusers_network.to_theirs(network.state_dict(), table).items()}
    with th.device("meta"):
        theirs = {name: tensor.shape for name, tensor in diffusers.UNet2DModel(**config).state_dict().items()}
    theirs.pop(diffusers_network.TIMESTEPS, None)  # made of the timesteps, not of a tensor
    assert ours == theirs


@pytest.mark.parametrize(
    ("preset", "culprit"),
    [("imagenet64-hybrid", "--num_heads 4 "), ("adm-imagenet128", "--num_heads 4 "), ("adm-imagenet512", "0.5,1,1")],
)
def test_networks_that_are_none_of_diffusers_are_refused(preset, culprit):
    settings, network = published(preset)
    with pytest.raises(UserError, match=culprit):
        diffusers_network.config_of(settings.model, settings.diffusion, network)
