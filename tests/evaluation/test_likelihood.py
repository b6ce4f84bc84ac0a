"""Evaluating the bound of a data set: known answers, estimates from a few timesteps, several at once, the files."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion, stand_in_network

from improved_diffusion.bound import BoundSummary
from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config import NLLConfig, UserError
from improved_diffusion.config.settings import Likelihood
from improved_diffusion.data.dataset import selection
from improved_diffusion.evaluation import likelihood
from improved_diffusion.evaluation.likelihood import (
    PIXELS_PER_PASS,
    BoundEvaluation,
    timesteps_per_pass,
    write_results,
)
from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.logs import logger
from improved_diffusion.unet import SuperResModel

MU, S = 0.1, 0.3  # of the data's pixels


@pytest.fixture(autouse=True)
def folder(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["log"])
    yield tmp_path
    logger.reset()


def images_of(count, shape=(1, 16, 16), seed=0):
    """A data set of 256 levels, its images of different contrast, and no keyword arguments."""
    rng = np.random.default_rng(seed)
    pixels = MU + S * rng.uniform(0.7, 1.3, (count, 1, 1, 1)) * rng.standard_normal((count, *shape))
    levels = np.rint(127.5 * (pixels + 1)).clip(0, 255)
    return [(image, {}) for image in (levels / 127.5 - 1).astype(np.float32)]


def exact_network(diffusion):
    """What predicts the noise best where the pixels are independent N(MU, S^2), in closed form."""
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod).float()

    def model(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * S**2 + 1 - a)

    return model


def evaluation(diffusion, dataset, seed=0, **options):
    return BoundEvaluation(NLLConfig(**{"batch_size": 16, **options}), seed, diffusion, dataset)


# Estimates


def test_estimates_from_25_of_1000_timesteps_lie_within_their_errors():
    n = 48
    diffusion, dataset = make_diffusion(1000, var=ModelVarType.FIXED_LARGE), images_of(n)
    model = exact_network(diffusion)
    whole = evaluation(diffusion, dataset, batch_size=n, seed=10**6).run(model)
    whole_terms = whole.terms["vb"][:, ::-1].astype(np.float64)
    deviations, errors, deviations_of_timesteps, parts = [], [], [], []
    for seed in range(20):
        result = evaluation(diffusion, dataset, batch_size=n, seed=seed, nll_timesteps=25).run(model)
        deviations.append(result.mean - whole.mean)
        errors.append(result.standard_error)
        # With the whole bound's noise, what differs comes from the timesteps alone.
        weights, terms = result.terms["weights"], np.take_along_axis(whole_terms, result.terms["timesteps"], axis=1)
        sums = (weights * terms).sum(axis=1)
        deviations_of_timesteps.append((sums - whole_terms.sum(axis=1)).mean())
        parts.append(BoundSummary(sums, {"vb": terms, "weights": weights}).timesteps_error)
        assert result.timesteps_error == pytest.approx(parts[-1], rel=0.2)
    assert np.max(errors) < 0.02 * whole.mean
    assert np.mean(errors) == pytest.approx(whole.standard_error, rel=0.3)
    assert (np.abs(deviations) < 2 * np.array(errors)).sum() >= 18
    assert np.mean(parts) < np.mean(errors)
    assert (np.abs(deviations_of_timesteps) < 2 * np.array(parts)).sum() >= 18
    # The spread of twenty is known to 16%.
    assert np.std(deviations_of_timesteps, ddof=1) == pytest.approx(np.mean(parts), rel=0.4)


def test_an_image_has_its_own_noise_and_timesteps_whatever_the_others_and_the_batch():
    diffusion, dataset = make_diffusion(100), images_of(7, (1, 4, 4))
    model = stand_in_network(False)
    results = [evaluation(diffusion, dataset, batch_size=size, nll_timesteps=9).run(model).terms for size in (7, 3, 1)]
    first = evaluation(diffusion, dataset[:2], nll_timesteps=9).run(model).terms
    assert len(np.unique(results[0]["timesteps"], axis=0)) > 4
    for other in (*results[1:], first):
        n = len(other["vb"])
        np.testing.assert_array_equal(other["timesteps"], results[0]["timesteps"][:n])
        np.testing.assert_allclose(other["vb"], results[0]["vb"][:n], rtol=1e-5)


def test_no_image_has_the_noise_of_another_or_of_another_seed():
    diffusion, dataset = make_diffusion(12), images_of(1, (1, 4, 4)) * 7
    found = [evaluation(diffusion, dataset, seed=seed).run(stand_in_network(False)).terms["mse"] for seed in (0, 1)]
    assert len(np.unique(np.concatenate(found), axis=0)) == 14


def test_some_of_the_images_are_a_fixed_selection():
    chosen = evaluation(make_diffusion(12), images_of(50, (1, 4, 4)), num_samples=10).numbers
    assert chosen == selection(50, 10).tolist() and chosen != list(range(0, 50, 5))


def test_with_all_timesteps_asked_for_the_sum_is_whole():
    diffusion, dataset = make_diffusion(12), images_of(3, (1, 4, 4))
    result = evaluation(diffusion, dataset, nll_timesteps=12).run(stand_in_network(False))
    total = result.terms["vb"].sum(axis=1) + result.terms["prior_bpd"]
    np.testing.assert_allclose(result.total_bpd, total, rtol=1e-6)
    assert result.timesteps_error == 0


@pytest.mark.parametrize(("count", "message"), [(13, "give at most 12"), (1, "give at least 2")])
def test_a_number_of_timesteps_that_cannot_be(count, message):
    with pytest.raises(UserError, match=rf"--nll_timesteps {count} .*{message}, or 0 for the whole bound"):
        evaluation(make_diffusion(12), images_of(1), nll_timesteps=count)


def test_one_of_one_timestep_is_the_whole():
    result = evaluation(make_diffusion(1), images_of(2), nll_timesteps=1).run(stand_in_network(False))
    assert (result.terms["weights"] == 1).all() and result.timesteps_error == 0


# Several timesteps at once


@pytest.mark.parametrize("per_pass", [2, 5, 9, 100])
@pytest.mark.parametrize("kept", [None, [0, 3, 4, 9, 11, 15, 16, 18, 19]], ids=["all", "spaced"])
def test_several_timesteps_at_once_give_what_one_at_a_time_does(per_pass, kept):
    diffusion = make_diffusion(20, kept, var=ModelVarType.LEARNED_RANGE, rescale=True)
    model, x = stand_in_network(True), th.from_numpy(np.stack([x for x, _ in images_of(3, (3, 8, 8))]))
    th.manual_seed(1)
    one = diffusion.calc_bpd_loop(model, x)
    after = th.rand(1)
    th.manual_seed(1)
    several = diffusion.calc_bpd_loop(model, x, timesteps_per_pass=per_pass)
    assert after == th.rand(1)  # as many numbers were drawn
    for name, values in one.items():
        assert several[name].shape == values.shape
        th.testing.assert_close(several[name], values, rtol=1e-5, atol=1e-5)


def test_each_image_keeps_its_class_and_its_low_resolution_in_a_larger_pass():
    th.manual_seed(0)
    network = SuperResModel(
        in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(), channel_mult=(1,),
        num_classes=3,
    ).eval()  # fmt: skip
    for p in network.parameters():
        p.data += 0.05 * th.randn_like(p)  # the output would be 0
    rng = np.random.default_rng(0)
    x, low_res = (th.from_numpy(rng.uniform(-1, 1, (3, 3, side, side)).astype(np.float32)) for side in (8, 4))
    kwargs = {"low_res": low_res, "y": th.tensor([2, 0, 1])}
    diffusion, results = make_diffusion(8), []
    timesteps = th.tensor([[0, 2, 5, 7], [0, 1, 3, 6], [0, 1, 4, 5]])
    for per_pass in (1, 3, 4):
        th.manual_seed(1)
        results.append(
            diffusion.calc_bpd_loop(
                network, x, model_kwargs=kwargs, timesteps=timesteps, timesteps_per_pass=per_pass,
                weights=th.full((3, 4), 2.0),
            )
        )  # fmt: skip
    for result in results[1:]:
        for name, values in results[0].items():
            th.testing.assert_close(result[name], values, rtol=1e-5, atol=1e-5)
    turned = {"low_res": low_res.roll(1, 0), "y": kwargs["y"]}
    th.manual_seed(1)
    other = diffusion.calc_bpd_loop(network, x, model_kwargs=turned, timesteps=timesteps, timesteps_per_pass=4)
    assert (other["mse"] - results[0]["mse"]).abs().max() > 1e-4  # low_res does matter


def test_the_pass_is_as_large_as_is_fast_and_never_larger_than_the_whole():
    assert timesteps_per_pass((1, 3, 256, 256), 1000) == 1
    assert timesteps_per_pass((64, 3, 64, 64), 1000) == 1
    assert timesteps_per_pass((1, 1, 16, 16), 1000) == PIXELS_PER_PASS["cpu"] // 256
    assert timesteps_per_pass((1, 1, 16, 16), 20) == 20
    n, t = 4, timesteps_per_pass((4, 3, 32, 32), 1000)
    assert t > 1 and n * t * 32 * 32 <= PIXELS_PER_PASS["cpu"]


@pytest.mark.parametrize(("flag", "largest"), [(0, 12), (1, 1), (5, 5), (50, 12)])
def test_the_flag_says_how_many_timesteps_a_pass_has(flag, largest):
    sizes = []

    def model(x, t):
        sizes.append(len(x))
        return x

    evaluation(make_diffusion(12), images_of(2, (1, 4, 4)), timesteps_per_pass=flag, batch_size=2).run(model)
    assert max(sizes) == 2 * largest and sum(sizes) == 2 * 12


# Files


@pytest.fixture
def checkpoint(folder):
    (folder / "model.pt").write_bytes(b"parameters")
    return folder / "model.pt"


def written(folder, checkpoint, count=0, images=5):
    """The results of an evaluation and what was written of them."""
    diffusion = make_diffusion(12, mean=ModelMeanType.EPSILON)
    settings = Likelihood.of({
        "model_path": str(checkpoint), "data_dir": "images", "diffusion_steps": 12, "noise_schedule": "cosine",
        "nll_timesteps": count, "batch_size": 2,
    })  # fmt: skip
    loaded = LoadedModel(str(checkpoint), settings, frozenset(), stand_in_network(False), diffusion, {"step": 7})
    result = BoundEvaluation(settings.nll, 0, diffusion, images_of(images, (1, 4, 4))).run(loaded.model)
    write_results(str(folder), result, loaded)
    with np.load(folder / "per_image.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    return result, arrays, json.loads((folder / "nll.json").read_text())


def test_every_image_has_its_terms_in_a_file(folder, checkpoint):
    result, arrays, content = written(folder, checkpoint)
    assert arrays.keys() == {"total_bpd", "prior_bpd", "vb", "mse", "xstart_mse"}
    assert arrays["total_bpd"].shape == arrays["prior_bpd"].shape == (5,)
    assert arrays["vb"].shape == arrays["mse"].shape == arrays["xstart_mse"].shape == (5, 12)
    np.testing.assert_allclose(arrays["vb"].sum(axis=1) + arrays["prior_bpd"], arrays["total_bpd"], rtol=1e-5)
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(folder / f"{name}_terms.npz") as published:
            assert published.files == ["arr_0"] and published["arr_0"].dtype == np.float32
            np.testing.assert_allclose(published["arr_0"], arrays[name].mean(axis=0), rtol=1e-6)
    assert content["bits_per_dim"] == result.mean == pytest.approx(arrays["total_bpd"].mean())
    assert content["standard_error"] == pytest.approx(arrays["total_bpd"].std(ddof=1) / math.sqrt(5))
    assert content["standard_error_of_timesteps"] == 0
    assert (content["images"], content["timesteps"], content["nll_timesteps"], content["model_step"]) == (5, 12, 0, 7)
    assert content["model_path"] == str(checkpoint)
    assert content["model_sha256"] == hashlib.sha256(b"parameters").hexdigest()
    assert (folder / "nll_terms.png").read_bytes().startswith(b"\x89PNG")


def test_an_estimates_file_has_its_timesteps_and_no_means_over_the_images(folder, checkpoint):
    result, arrays, content = written(folder, checkpoint, count=5)
    assert arrays["vb"].shape == arrays["timesteps"].shape == arrays["weights"].shape == (5, 5)
    total = (arrays["vb"] * arrays["weights"]).sum(axis=1) + arrays["prior_bpd"]
    np.testing.assert_allclose(arrays["total_bpd"], total, rtol=1e-6)
    assert not list(folder.glob("*_terms.npz"))
    assert "no vb_terms.npz" in (folder / "log.txt").read_text()
    assert content["standard_error_of_timesteps"] == pytest.approx(result.timesteps_error)
    assert content["standard_error_of_timesteps"] > 0 and content["nll_timesteps"] == 5


def test_of_one_image_the_json_has_no_error(folder, checkpoint):
    _, _, content = written(folder, checkpoint, images=1)
    assert content["standard_error"] is None


def test_without_matplotlib_the_numbers_are_written_all_the_same(folder, checkpoint, monkeypatch):
    def missing(*args):
        raise UserError("plots are drawn by a package that is missing")

    monkeypatch.setattr(likelihood, "write_terms_plot", missing)
    written(folder, checkpoint)
    assert not (folder / "nll_terms.png").exists()
    assert "nll_terms.png: plots are drawn by a package that is missing" in (folder / "log.txt").read_text()


def test_a_write_that_fails_leaves_the_older_file(folder, checkpoint, monkeypatch):
    written(folder, checkpoint)
    before = (folder / "per_image.npz").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(UserError, match=r"cannot write .*npz: No space left"):
        written(folder, checkpoint)
    assert (folder / "per_image.npz").read_bytes() == before
