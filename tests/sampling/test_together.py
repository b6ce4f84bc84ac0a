"""Images of several requests in one batch: each has the bytes that it has alone, whatever is beside it."""

import numpy as np
import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.models.build import build_model
from improved_diffusion.sampling.steady import Steady

REQUESTS = [
    dict(n=1, seed=3, classes=["dog"]),
    dict(seeds="5,17", seed=1),
    dict(n=4, classes=["cat", "dog", 1]),
    dict(),
    dict(n=17, seed=8),
]
SAMPLERS = [
    dict(steps=3),
    dict(sampler="ddim", steps=4),
    dict(sampler="ddim", steps=3, ddim_eta=0.5),
    dict(sampler="dpmpp_2m", steps=4),
    dict(sampler="dpmpp_2m_sde", steps=3),
    dict(sampler="unipc", steps=4),
    dict(sampler="renoise", steps=3),
    dict(sampler="heun", steps=4, churn=4),
    dict(sampler="plms", steps=4),
    dict(timestep_respacing="ddim5"),
    dict(sampler="ddim", steps=3, guidance_scale=2.5),
    dict(sampler="dpmpp_2m", steps=3, guidance_scale=2, guidance_rescale=0.5, dynamic_threshold=0.99),
    dict(sampler="ddim", steps=2, precision="bf16"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A class-conditional model with attention and 1x1 convolutions, trained with its class hidden."""
    path = tmp_path_factory.mktemp("together") / "model000000.pt"
    settings = tiny_settings(class_cond=True, channel_mult="1,2", attention_resolutions="4,8")
    save_checkpoint(path, settings, class_names=CLASSES)
    state, metadata = checkpoint.load(str(path))
    metadata["config"]["label_drop"] = 0.1
    checkpoint.save_state_dict(state, str(path), metadata)
    return idf.load(path)


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_each_request_gets_the_bytes_that_it_gets_alone(model, options):
    together = model.sample_together(REQUESTS, **options)
    for request, found in zip(REQUESTS, together):
        alone = model.sample(**request, **options, progress=False)
        assert np.array_equal(found.array, alone.array) and np.array_equal(found.labels, alone.labels)
        assert list(found.numbers) == list(alone.numbers) and found.class_names == alone.class_names


def test_the_bytes_do_not_depend_on_the_batch(model):
    options = dict(sampler="ddim", steps=4, seed=1, progress=False)
    whole = model.sample(9, batch_size=9, **options).array
    for size in (1, 4):
        assert np.array_equal(model.sample(9, batch_size=size, **options).array, whole)


@pytest.mark.parametrize("options", [
    dict(), dict(channel_mult="1,2", attention_resolutions="8,4", use_scale_shift_norm=True), dict(image_size="8x12"),
    dict(num_channels=64, channel_mult="1,2,2", resblock_updown=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_steady_network_gives_every_image_the_same_bits_and_the_same_numbers(options, precision):
    settings = tiny_settings(**options)
    network = build_model(settings.model, settings.diffusion.learn_sigma).eval()
    for p in network.parameters():
        if not p.any():
            p.data.normal_(std=0.05)
    if precision == "bf16":
        network.convert_to_bf16()
    height, width = (8, 12) if "x" in str(options.get("image_size")) else (8, 8)
    x, t, steady = th.randn(19, 3, height, width), th.full((19,), 7.0), Steady(network)
    with th.no_grad():
        whole = steady(x, t)
        assert th.allclose(whole, network(x, t), atol=0.1 if precision == "bf16" else 1e-5)
        for size in (1, 7, 16):
            parts = [steady(x[i : i + size], t[i : i + size]) for i in range(0, len(x), size)]
            assert th.equal(th.cat(parts), whole)


@pytest.mark.parametrize("count", [1, 3])
def test_a_steady_networks_output_is_a_tensor_like_any_other_and_the_network_can_be_trained_afterwards(count):
    settings = tiny_settings()
    network = build_model(settings.model, settings.diffusion.learn_sigma).eval()
    steady, x, t = Steady(network), th.randn(count, 3, 8, 8), th.full((count,), 3)
    with th.no_grad():
        out = steady(x, t)
    assert not out.is_inference() and not out.requires_grad
    out.mul_(2)
    (out.requires_grad_() ** 2).sum().backward()
    for call in (network, steady):
        network.zero_grad()
        call(x, t).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_a_steady_network_has_the_attributes_of_its_own():
    settings = tiny_settings()
    network = build_model(settings.model, settings.diffusion.learn_sigma)
    network.of_a_subclass = 5
    steady = Steady(network)
    assert (steady.of_a_subclass, steady.num_res_blocks) == (5, network.num_res_blocks)
    assert not hasattr(steady, "no_such_thing")


def test_steps_show_all_images_in_the_order_of_the_requests(model):
    seen = []
    model.sample_together([dict(n=2), dict(seeds="7")], sampler="ddim", steps=3, on_step=seen.append)
    assert [step.index for step in seen] == [0, 1, 2] and {step.steps for step in seen} == {3}
    assert all(list(step.numbers) == [0, 1, 7] and len(step.images) == 3 for step in seen)


def test_what_is_wrong_with_one_request_is_one_error(model):
    assert model.sample_together([]) == []
    for request, named in ((dict(classes=["cow"]), "cow"), (dict(n=3, seeds="1"), "seeds"), (dict(steps=3), "steps")):
        with pytest.raises(UserError, match=named):
            model.sample_together([dict(n=1), request], sampler="ddim", steps=2)
    with pytest.raises(UserError, match="stepz"):
        model.sample_together([dict(n=1)], stepz=2)


def test_a_super_resolution_model_needs_images(tmp_path):
    settings = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    model = idf.load(save_checkpoint(tmp_path / "model000000.pt", settings))
    with pytest.raises(UserError, match="upscale"):
        model.sample_together([dict(n=1)])
