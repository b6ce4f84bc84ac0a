"""Few-step samples while a student trains: how far they are from held-out images, and how they look."""

import numpy as np
import pytest
import torch as th
from watch_worker import IMAGES, Images, Loop, make_diffusion

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageDistillation
from improved_diffusion.gaussian_diffusion import last_sample
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.training.distillation.watching import (
    FewStepGrid,
    FewStepValidation,
    energy_terms,
    few_steps,
)
from improved_diffusion.utils import images


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(str(tmp_path / "log"), format_strs=["log"])


def sampler(to=2):
    settings = ImageDistillation.of({"image_size": 8, "to": to, "noise_schedule": "cosine", "diffusion_steps": 20})
    return few_steps(settings, make_diffusion(), "renoise")


def validation(count=IMAGES, batch_size=3, **options):
    return FewStepValidation(
        make_diffusion(), Images(IMAGES), sampler=sampler(), num_images=count, batch_size=batch_size, **options
    )


def pairs_of(x, y):
    return np.stack([x, y], axis=1).clip(0, 255).astype(np.uint8)


def test_the_energy_distance_is_0_for_the_same_distribution_and_grows_with_shift_and_blur():
    rng = np.random.default_rng(0)
    real, same = (rng.normal(128, 40, (400, 64)) for _ in range(2))
    terms = energy_terms(pairs_of(same, real))
    error = terms.std(ddof=1) / 20
    assert abs(terms.mean()) < 4 * error and error < 0.003
    for worse in (same + 30, 128 + 0.5 * (same - 128), np.full_like(same, 128)):
        assert energy_terms(pairs_of(worse, real)).mean() > 0.01


def test_the_energy_distance_is_that_of_all_pairs_but_ones_own():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 256, (5, 2, 12), dtype=np.uint8)
    x, y = pairs[:, 0] / 127.5, pairs[:, 1] / 127.5

    def mean(one, other):
        return np.mean([np.sqrt(np.mean((one[i] - other[j]) ** 2)) for i in range(5) for j in range(5) if i != j])

    expected = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert energy_terms(pairs).mean() == pytest.approx(expected, rel=1e-5)


def test_samples_of_as_many_steps_are_compared_with_the_held_out_images():
    loop, hook = Loop(labels=("0.9",)), validation()
    hook(loop)
    shown = dict(logger.getkvs())
    with loop.using(loop.parameter_sets[""]):
        samples = last_sample(
            sampler().trajectory(loop.model, (3, 8, 8), hook.noise_of(range(IMAGES)), {"y": th.arange(IMAGES) % 3})
        )
    real = np.stack([Images(IMAGES)[i][0] for i in range(IMAGES)])
    pairs = np.stack([images.to_uint8(samples), images.to_uint8(th.from_numpy(real) + 0.5 / 127.5)], axis=1)
    assert shown["val_loss"] == pytest.approx(energy_terms(pairs.reshape(IMAGES, 2, -1)).mean(), rel=0.02)
    assert shown.keys() >= {"val_loss", "val_loss_se", "val_loss_ema_0.9", "val_loss_ema_0.9_se"}
    assert [(name, best["best"]["ema"]) for name, _, best in loop.written] == [("best.pt", "0.9")]
    assert hook.best["val_loss"] == pytest.approx(shown["val_loss_ema_0.9"])


def test_the_batch_changes_rounding_at_most_and_one_image_is_too_few():
    values = []
    for batch_size in (1, 7):
        validation(batch_size=batch_size)(Loop(labels=()))
        values.append(logger.getkvs()["val_loss"])
    assert values[0] == pytest.approx(values[1], rel=0.02)
    with pytest.raises(UserError, match="--val_images 1"):
        validation(count=1)


def test_grids_show_samples_in_as_many_steps(tmp_path):
    loop, shown = Loop(labels=()), {}
    grid = FewStepGrid(sampler(), (3, 8, 8), 4, {"y": th.arange(4) % 3}, str(tmp_path), 5)
    grid._show = lambda view, image, *names: shown.update(image=image)
    grid(loop)
    with loop.using(loop.parameter_sets[""]):
        outs = list(sampler().trajectory(loop.model, (3, 8, 8), SeededNoise(5, range(4)), {"y": th.arange(4) % 3}))
    assert len(outs) == 2
    expected = images.grid(images.to_uint8(outs[-1]["sample"]), min_side=48)
    assert np.abs(shown["image"].astype(int) - expected).max() <= 1
