"""Networks without numbers."""

import pytest
import torch as th
from helpers import set_golden_weights

from improved_diffusion.unet import UNetModel
from improved_diffusion.utils.outline import outline


def network():
    return UNetModel(3, 32, 6, 1, (1,), channel_mult=(1,), num_classes=3)


def test_an_outline_has_the_shapes_of_the_network_and_takes_its_numbers():
    whole = set_golden_weights(network())
    with outline():
        shapes = network()
    assert all(p.is_meta for p in shapes.parameters())
    assert {name: p.shape for name, p in shapes.state_dict().items()} == {
        name: p.shape for name, p in whole.state_dict().items()
    }
    shapes.load_state_dict(whole.state_dict(), assign=True)
    x, t, y = th.randn(2, 3, 8, 8), th.tensor([1, 2]), th.tensor([0, 2])
    assert th.equal(shapes(x, t, y), whole(x, t, y))


@pytest.mark.parametrize("kind", [th.nn.Embedding, th.nn.Linear])
def test_afterwards_networks_are_initialised_again(kind):
    with outline():
        kind(3, 4)
    assert kind(3, 4).weight.std() > 0 and not kind(3, 4).weight.is_meta
