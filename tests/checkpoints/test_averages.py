"""How much of an average is still the initial weights, from its file."""

import pytest
from model_helpers import tiny_settings

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.averages import initial_share, initial_share_of, warn_of_initial_weights
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_model_and_diffusion

AVERAGE = {"ema_rate": 0.9999, "step": 2000, "config": {"ema_warmup": False}}


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("steps", [0, 1, 10, 3000])
def test_the_share_is_the_product_of_the_rates(rate, steps):
    plain = with_warmup = 1.0
    for s in range(steps):
        plain *= rate
        with_warmup *= min(rate, (1 + s) / (10 + s))
    assert initial_share(rate, steps) == pytest.approx(plain, rel=1e-9, abs=1e-300)
    assert initial_share(rate, steps, warmup=True) == pytest.approx(with_warmup, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    "name, metadata, share",
    [
        ("ema_0.9999_002000.pt", AVERAGE, 0.9999**2000),
        ("renamed.pt", AVERAGE, 0.9999**2000),
        ("runs/a/ema_0.9999_002000.pt", {}, 0.9999**2000),  # of published code: its name alone
        ("best.pt", {"best": {"ema": "0.99", "step": 50}, "step": 50}, 0.99**50),
        ("best.pt", {"best": {"ema": "", "step": 50}, "step": 50}, 0),
        ("model002000.pt", {"step": 2000}, 0),
        ("ema_sigma_rel0.1_002000.pt", {"ema_sigma_rel": 0.1, "step": 2000}, 0),
        ("ema_posthoc_sigma_rel0.1_002000.pt", {"ema_sigma_rel": 0.1, "posthoc": True, "step": 2000}, 0),
        ("cifar10_uncond_50M_500K.pt", {}, 0),
        ("odd.pt", {"ema_rate": "x", "step": None}, 0),
        ("odd.pt", {"ema_rate": 7, "step": 3}, 0),
    ],
)
def test_the_share_follows_from_the_description_or_the_name(name, metadata, share):
    assert initial_share_of(name, metadata) == pytest.approx(share)


def test_warm_up_forgets_at_once():
    assert initial_share_of("ema.pt", {**AVERAGE, "config": {"ema_warmup": True}}) < 1e-6


@pytest.mark.parametrize("metadata, warned", [(AVERAGE, True), ({**AVERAGE, "step": 100_000}, False), ({}, False)])
def test_an_average_that_is_still_noise_is_warned_of(tmp_path, metadata, warned):
    logger.configure(str(tmp_path), format_strs=["log"])
    warn_of_initial_weights("some.pt", metadata)
    text = (tmp_path / "log.txt").read_text()
    assert ("warning: some.pt" in text and "81.9%" in text and "--ema_warmup" in text) == warned


@pytest.mark.parametrize("rate, warned", [(0.9999, True), (0.01, False)])
def test_loading_such_an_average_warns_whatever_loads_it(tmp_path, rate, warned):
    settings = tiny_settings()
    model, _ = build_model_and_diffusion(settings.model, settings.diffusion)
    metadata = {"config": settings.values(), "step": 5, "ema_rate": rate}
    path = str(tmp_path / f"ema_{rate}_000005.pt")
    checkpoint.save_state_dict(model.state_dict(), path, metadata)
    logger.configure(str(tmp_path), format_strs=["log"])
    load_model(ImageModel.of({}), (), path)
    idf.load(tmp_path)
    assert (tmp_path / "log.txt").read_text().count("warning: ") == (2 if warned else 0)
