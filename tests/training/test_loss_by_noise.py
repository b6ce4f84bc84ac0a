"""The floor of a data set and a model's loss beside it: which images and draws, brute force, error bars, ranks."""

import math

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion
from PIL import Image
from script_helpers import write_images

from improved_diffusion import distributed
from improved_diffusion.config import ReadingConfig, UserError
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images
from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.training import loss_by_noise
from improved_diffusion.training.loss_by_noise import Draws, FiniteSet, measure_floor, model_errors

T = 40


@pytest.fixture(autouse=True)
def folder(tmp_path):
    logger.configure(dir=str(tmp_path / "log"), format_strs=["log"])
    return write_images(tmp_path / "photos", 12, size=(4, 4), classes=("cat", "dog", "owl"))


def dataset_of(folder, classes=False, **reading):
    source = open_images(str(folder))
    labels = [i % 3 for i in range(len(source))] if classes else None
    return ImageDataset(4, source, labels, channels=3, reading=ReadingConfig(**reading))


def finite_set(folder, most=1000, mirror=False, classes=False):
    dataset = dataset_of(folder, classes)
    return FiniteSet(dataset, np.arange(len(dataset)), most, mirror)


def draws_of(images, count=100, diffusion=None):
    return Draws.of(images, (diffusion or make_diffusion(T)).alphas_cumprod, count)


def points_of(images):
    """All images, and the mirror images where they belong to the set: float64 [N, C, H, W]."""
    pixels = images.pixels.numpy() / 127.5 - 1
    return np.concatenate([pixels, pixels[..., ::-1]]) if images.mirror else pixels


def best_predictions(images, x_t, alpha_bar, classes=None):
    """The mean of the posterior of each noisy image, by the definition: [M, C, H, W]."""
    points = points_of(images)
    labels = np.tile(images.classes, 1 + images.mirror) if images.classes is not None else None
    found = []
    for k, (x, ab) in enumerate(zip(x_t, alpha_bar)):
        log_w = -((x - np.sqrt(ab) * points) ** 2).sum((1, 2, 3)) / (2 * (1 - ab))
        if classes is not None:
            log_w[labels != classes[k]] = -np.inf
        w = np.exp(log_w - log_w.max())
        found.append(np.tensordot(w / w.sum(), points, 1))
    return np.stack(found)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("classes", [False, True])
def test_the_floor_is_the_variance_around_the_best_prediction(folder, mirror, classes, monkeypatch):
    monkeypatch.setattr(loss_by_noise, "PART_BYTES", 8 * 48 * 5)  # parts and batches of five images
    images = finite_set(folder, mirror=mirror, classes=classes)
    draws = draws_of(images)
    measured = measure_floor(draws)
    x_0 = images.pick(draws.rows, draws.mirrored).numpy()
    ab = draws.alpha_bar[draws.t]
    root = [np.sqrt(each)[:, None, None, None] for each in (ab, 1 - ab)]
    x_t = root[0] * x_0 + root[1] * SeededNoise(loss_by_noise.SEED, range(100))(th.from_numpy(x_0)).numpy()
    labels = images.classes[draws.rows] if classes else None
    best = best_predictions(images, x_t, ab, labels)
    points = points_of(images)
    members = np.tile(images.classes, 1 + mirror) if classes else None
    for k in range(100):
        log_w = -((x_t[k] - np.sqrt(ab[k]) * points) ** 2).sum((1, 2, 3)) / (2 * (1 - ab[k]))
        if classes:
            log_w[members != labels[k]] = -np.inf
        w = np.exp(log_w - log_w.max())
        variance = (w / w.sum()) @ ((points - best[k]) ** 2).mean((1, 2, 3))
        assert measured.floor[k] == pytest.approx(variance, rel=1e-6, abs=1e-12)
    assert mirror == bool(draws.mirrored.any())


def test_a_class_is_easier_than_all_and_mirror_images_make_it_harder(folder):
    def mean(**options):
        return measure_floor(draws_of(finite_set(folder, **options), 400)).floor.mean()

    assert mean(classes=True) < 0.8 * mean() < 0.8 * mean(mirror=True)


@pytest.mark.parametrize("count", [7, 40, 100])
def test_each_image_and_each_stratum_of_the_timesteps_has_its_share(folder, count):
    draws = draws_of(finite_set(folder), count)
    assert np.ptp(np.bincount(draws.rows, minlength=12)) <= 1
    t = np.sort(draws.t)
    assert ((t >= np.floor(np.arange(count) * T / count)) & (t < np.ceil((np.arange(count) + 1) * T / count))).all()
    again = draws_of(finite_set(folder), count)
    assert (again.t == draws.t).all() and (again.rows == draws.rows).all()


@pytest.mark.parametrize("count", [1, 4, 7, 40, 200])
def test_levels_are_the_quarters_of_the_log_and_finer(folder, count):
    draws = draws_of(finite_set(folder), 400)
    levels = draws.levels(count)
    assert len(levels) == min(count, T) and sum(len(level.chosen) for level in levels) == 400
    assert [level.first for level in levels][1:] == [level.last + 1 for level in levels][:-1]
    for level in levels:
        t = draws.t[level.chosen]
        assert (len(levels) * t // T == level.index).all() and level.first <= t.min() and t.max() <= level.last


def test_the_error_bar_covers_the_exact_value(folder, monkeypatch):
    images = finite_set(folder)
    draws = draws_of(images, 8000)
    exact = [measure_floor(draws).floor_at(level, "epsilon").value for level in draws.levels(4)]
    scores = []
    for seed in range(30):
        monkeypatch.setattr(loss_by_noise, "SEED", seed)
        measured = measure_floor(draws_of(images, 120))
        for level in measured.draws.levels(4)[2:]:  # with less noise, nearly all of the floor is that of rare draws
            mean = measured.floor_at(level, "epsilon")
            scores.append((mean.value - exact[level.index]) / mean.error)
    assert np.abs(scores).max() < 4 and abs(np.mean(scores)) < 0.5 and np.std(scores) < 1.3


def test_the_floor_of_fewer_images_is_lower(folder):
    few = finite_set(folder, most=5)
    assert len(few) == 5 and not few.is_whole and few.total == 12
    of_few, of_all = (measure_floor(draws_of(images, 400)).floor.mean() for images in (few, finite_set(folder)))
    assert of_few < of_all


def test_the_set_takes_no_more_memory_than_there_is_for_it(folder, monkeypatch):
    monkeypatch.setattr(loss_by_noise, "MAX_BYTES", 48 * 7)
    images = finite_set(folder)
    assert len(images) == 7 and not images.is_whole


def test_random_crops_are_no_finite_set(folder):
    with pytest.raises(UserError, match="--resize_mode random_crop"):
        FiniteSet(dataset_of(folder, resize_mode="random_crop"), np.arange(12), 100)


def test_a_few_unreadable_images_are_left_out_and_more_refused(folder, tmp_path):
    (folder / "cat_00.png").write_bytes(b"no image")
    images = finite_set(folder, classes=True)
    assert len(images) == 11 and len(images.classes) == 11
    assert "cat_00.png" in (tmp_path / "log/log.txt").read_text()
    for path in folder.glob("dog*"):
        path.write_bytes(b"no image")
    for path in folder.glob("owl*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="9 of 12 images are unreadable"):
        finite_set(folder)


def test_ranks_share_the_draws(folder, monkeypatch):
    draws, diffusion = draws_of(finite_set(folder, classes=True)), predicting(ModelMeanType.START_X)
    alone = measure_floor(draws).floor, model_errors(shrinking, diffusion, draws, 16, th.device("cpu"))
    parts = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda found: parts.append(found) or [found])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        measure_floor(draws)
        model_errors(shrinking, diffusion, draws, 16, th.device("cpu"))
    np.testing.assert_allclose(parts[0][0] + parts[2][0], alone[0], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(parts[1] + parts[3], alone[1], rtol=1e-5)


# A model beside the floor


def shrinking(x, t, **kwargs):
    """A bad prediction of x_0."""
    return 0.5 * x


def predicting(mean):
    return make_diffusion(T, mean=mean, var=ModelVarType.FIXED_SMALL)


@pytest.mark.parametrize("batch_size", [7, 100])
@pytest.mark.parametrize("mean", [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.VELOCITY])
def test_the_models_error_is_the_mse_of_training(folder, mean, batch_size):
    diffusion = predicting(mean)
    draws = draws_of(finite_set(folder), 100)
    errors = model_errors(shrinking, diffusion, draws, batch_size, th.device("cpu"))
    x_0 = draws.images.pick(draws.rows, draws.mirrored).float()
    noise = SeededNoise(loss_by_noise.SEED, range(100))(x_0)
    expected = diffusion.training_losses(shrinking, x_0, th.from_numpy(draws.t), noise=noise)["mse"].numpy()
    found = draws.in_units_of(loss_by_noise.target_of(diffusion), errors)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def measured_with(folder, predict, count=400, **options):
    diffusion, images = predicting(ModelMeanType.START_X), finite_set(folder, **options)
    draws = draws_of(images, count, diffusion)

    def model(x, t, **kwargs):
        labels = kwargs["y"].numpy() if "y" in kwargs else None
        return th.from_numpy(predict(images, x.numpy(), draws.alpha_bar[t.numpy()], labels)).float()

    errors = model_errors(model, diffusion, draws, 64, th.device("cpu"))
    return measure_floor(draws).with_model(errors)


@pytest.mark.parametrize("options", [{}, {"mirror": True}, {"classes": True}])
def test_the_best_model_is_at_the_floor_and_is_said_to_know_the_images(folder, options):
    measured = measured_with(folder, best_predictions, **options)
    for level in measured.draws.levels(4):
        excess = measured.excess_at(level, "x_0")
        assert abs(excess.value) < 4 * excess.error + 1e-12
    assert measured.below_floor("x_0", 4) == []
    assert measured.memorised("x_0", 40)


def test_a_model_that_is_worse_is_neither_below_nor_said_to_know_them(folder):
    measured = measured_with(folder, lambda images, x, ab, labels: 0.5 * x)
    assert measured.below_floor("x_0", 4) == measured.memorised("x_0", 40) == []
    assert measured.excess_at(measured.draws.levels(1)[0], "x_0").value > 0


def test_a_model_that_sees_more_is_below_the_floor(folder):
    """Such as the class, where the floor is that of a model that is not told."""
    told = finite_set(folder, classes=True)
    draws = draws_of(told, 400)
    knows = measure_floor(draws).floor  # what the best model with the class gets
    told.classes = None
    sentences = measure_floor(draws).with_model(knows).below_floor("x_0", 4)
    assert sentences and all("is below its floor" in sentence for sentence in sentences)


def test_a_single_draw_has_no_error_bar_and_no_verdict(folder):
    measured = measured_with(folder, lambda images, x, ab, labels: 0 * x, count=1)
    assert math.isnan(measured.excess_at(measured.draws.levels(1)[0], "x_0").error)
    assert measured.below_floor("x_0", 1) == []


def test_grey_images_in_a_colour_set_are_read_as_training_reads_them(tmp_path):
    (tmp_path / "grey").mkdir()
    Image.new("L", (4, 4), 51).save(tmp_path / "grey/a.png")
    images = finite_set(tmp_path / "grey")
    assert images.pick(np.array([0]), np.array([False])).unique().tolist() == pytest.approx([-0.6])
