"""The picture of the bound's terms."""

import sys

import numpy as np
import pytest

from improved_diffusion.bound import BoundSummary, stratified_timesteps
from improved_diffusion.config import UserError
from improved_diffusion.evaluation.likelihood_plot import (
    figure_of,
    share_up_to,
    spread_over_timesteps,
    write_terms_plot,
)

T, N = 200, 40
SCALE = np.linspace(0.5, 1.5, N)[:, None]  # of each image's terms
TERMS = SCALE * np.arange(1.0, T + 1) ** -1.2  # of t = 0 up to T-1


def whole():
    vb = TERMS[:, ::-1].astype(np.float32)
    return BoundSummary(vb.sum(axis=1) + 0.01, {"vb": vb, "prior_bpd": np.full(N, 0.01)})


def estimate(count=20):
    t, weights = stratified_timesteps(T, count, np.random.default_rng(0).random(N))
    vb = np.take_along_axis(TERMS, t, axis=1)
    total = (vb * weights).sum(axis=1) + 0.01
    return BoundSummary(total, {"vb": vb, "prior_bpd": np.full(N, 0.01), "timesteps": t, "weights": weights})


def test_the_whole_bound_shows_each_timesteps_quartiles_and_mean():
    x, quartiles, mean = spread_over_timesteps(whole(), T)
    assert x.tolist() == list(range(1, T + 1))
    np.testing.assert_allclose(mean, TERMS.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(quartiles, np.quantile(TERMS, (0.25, 0.5, 0.75), axis=0), rtol=1e-5)


def test_an_estimate_shows_bins_of_timesteps_that_lie_on_the_same_curve():
    x, quartiles, mean = spread_over_timesteps(estimate(), T)
    assert x[0] == 1 and (np.diff(x) > 0).all() and x[-1] < T + 1
    np.testing.assert_allclose(mean, x**-1.2, rtol=0.25)
    assert (quartiles[0] < quartiles[1]).all() and (quartiles[1] < quartiles[2]).all()
    np.testing.assert_allclose(quartiles[1] / mean, 1, atol=0.2)


@pytest.mark.parametrize("result", [whole(), estimate()], ids=["whole", "estimate"])
def test_the_shares_add_up_to_all_but_the_priors(result):
    x, share = share_up_to(result, T)
    assert x.tolist() == list(range(1, T + 1))
    assert (np.diff(share) >= 0).all()
    assert share[-1] == pytest.approx(1 - 0.01 / result.mean)
    exact = TERMS.mean(axis=0).cumsum() / (TERMS.mean(axis=0).sum() + 0.01)
    np.testing.assert_allclose(share, exact, atol=0.02)


@pytest.mark.parametrize("result", [whole(), estimate()], ids=["whole", "estimate"])
def test_the_figure_has_both_panels_on_logarithmic_timesteps(result):
    figure = figure_of(result, T)
    terms, shares = figure.axes
    assert terms.get_xscale() == terms.get_yscale() == shares.get_xscale() == "log"
    assert [text.get_text() for text in terms.get_legend().get_texts()] == ["quartiles", "median of the images", "mean"]
    assert "40 images" in figure.get_suptitle() and "200 timesteps" in figure.get_suptitle()


def test_a_png_is_written_of_one_image_and_of_one_timestep(tmp_path):
    write_terms_plot(
        tmp_path / "one.png", BoundSummary(np.ones(1), {"vb": np.ones((1, 1)), "prior_bpd": np.zeros(1)}), 1
    )
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_term_that_is_not_positive_does_not_break_the_picture(tmp_path):
    vb = np.array([[0.0, -1e-9, 1.0]])
    write_terms_plot(tmp_path / "some.png", BoundSummary(np.ones(1), {"vb": vb, "prior_bpd": np.zeros(1)}), 3)
    assert (tmp_path / "some.png").exists()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figure_of(whole(), T)
