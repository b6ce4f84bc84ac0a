"""The reference that speed is compared with computes what the package does."""

import pytest
import torch as th

from benchmarks import published
from benchmarks.speed.training import our_loop
from benchmarks.speed.workloads import Workload, filled, published_network
from improved_diffusion.config.presets import preset_options
from improved_diffusion.config.settings import ImageTraining
from improved_diffusion.models.build import build_model_and_diffusion

TINY = Workload("tiny-4", "tiny", 4)
NETWORKS = {
    "cifar10": {**preset_options("cifar10-hybrid"), "num_channels": 32, "dropout": 0.0},
    "imagenet64": {**preset_options("imagenet64-hybrid"), "num_channels": 32, "num_res_blocks": 1},
    "demo": Workload("demo-32", "demo", 32).settings().values(),
}


def both(options):
    """(settings, our network, our diffusion, the published network with the same weights)."""
    settings = ImageTraining.of(options)
    th.manual_seed(0)
    model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
    theirs = published_network(settings)
    theirs.load_state_dict(filled(model).state_dict())
    return settings, model.eval(), diffusion, theirs.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_network_and_losses_are_ours(name):
    settings, ours, diffusion, theirs = both(NETWORKS[name])
    side = settings.model.size
    x, noise = th.rand(3, settings.model.channels, side, side) * 2 - 1, th.randn(3, settings.model.channels, side, side)
    t = th.tensor([0, 7, diffusion.num_timesteps - 1])
    kwargs = {"y": th.tensor([0, 3, 9])} if settings.model.class_cond else {}
    loss = published.HybridLoss(settings.diffusion.diffusion_steps)
    with th.no_grad():
        th.testing.assert_close(theirs(x, t, **kwargs), ours(x, t, **kwargs), rtol=1e-4, atol=1e-4)
        expected = diffusion.training_losses(ours, x, t, kwargs, noise)
        found = loss(theirs, x, t, noise, **kwargs)
    assert found.keys() == expected.keys()
    for term in expected:
        th.testing.assert_close(found[term], expected[term], rtol=1e-3, atol=1e-4)


class Draws:
    """Stands in for the schedule sampler: the same timesteps for both."""

    def sample(self, batch_size, device):
        return th.arange(batch_size, device=device) * 20, th.ones(batch_size, device=device)


def test_steps_change_the_weights_and_averages_as_ours(monkeypatch):
    loop = our_loop(TINY, dict(seed=3, ema_rate="0.9"))
    start = {name: value.clone() for name, value in loop.model.state_dict().items()}
    network = TINY.published()
    network.load_state_dict(start)
    training = published.Training(network, TINY.published_loss(), rate=0.9)
    images, kwargs = TINY.images(pinned=False)
    t, _ = Draws().sample(len(images), "cpu")
    noise = th.randn_like(images)
    loop.schedule_sampler = Draws()
    monkeypatch.setattr(th, "randn_like", lambda like: noise)
    monkeypatch.setattr(published.np.random, "choice", lambda *args, **options: t.numpy())
    for _ in range(3):
        loop.run_step(images, dict(kwargs))
        training.step(images, kwargs)
        loop.step += 1
    own = dict(loop.model.named_parameters())
    for name, value in network.named_parameters():
        th.testing.assert_close(value, own[name], rtol=1e-3, atol=1e-5, msg=name)
    average = th.cat([value.flatten() for value in loop.ema_params[0]])
    th.testing.assert_close(th.cat([value.flatten() for value in training.averages]), average, rtol=1e-3, atol=1e-5)
    assert training.means["loss"] == pytest.approx(loop.run_log.meter.read()["loss"], rel=0.1)


@pytest.mark.parametrize("finite", [True, False])
def test_float16_skips_steps_whose_gradient_is_not_finite(finite):
    training = published.Training(TINY.published(), TINY.published_loss(), fp16=True)
    before = training.masters[0].detach().clone()
    for p in training.params:
        p.grad = th.ones_like(p)
    if not finite:
        training.params[3].grad[0] = float("inf")
    assert training._collect_gradients() is finite
    assert (training.lg_scale > 20) is finite
    training._copy_to_model()
    th.testing.assert_close(training.params[3].float().flatten().sum(), _part(before, training.params, 3), rtol=1e-3,
                            atol=1e-3)  # fmt: skip


def _part(flat, params, index):
    return flat.split([p.numel() for p in params])[index].sum()


def test_images_are_those_of_our_loader(tmp_path):
    import numpy as np
    from PIL import Image

    from improved_diffusion.data.stream import load_data

    rng = np.random.default_rng(0)
    for i, size in enumerate([(50, 40), (33, 64), (100, 100)]):
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    theirs = th.stack([th.from_numpy(array) for array, _ in published.Images(tmp_path, 16)])
    with load_data(data_dir=str(tmp_path), batch_size=3, image_size=16, deterministic=True, num_workers=0) as data:
        ours, _ = next(data)
    assert th.equal(theirs, ours)
