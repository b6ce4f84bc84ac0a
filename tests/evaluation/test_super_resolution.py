"""Samples of super-resolution against the true images: what the model gains over plain enlargement."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import SuperResSampling
from improved_diffusion.data.given import GivenImages
from improved_diffusion.evaluation import super_resolution
from improved_diffusion.evaluation.super_resolution import (
    bicubic,
    compare,
    describe,
    read_reference,
    write_comparison,
)
from improved_diffusion.utils import images


def random_images(n, height=16, width=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def disturbed(images, by, seed=1):
    noise = np.random.default_rng(seed).normal(0, by, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def psnr_by_hand(x, y):
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - y.astype(float)) ** 2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_bicubic_is_pillows(channels):
    """Of alpha it knows nothing: PSNR and SSIM do not either."""
    base = random_images(2, 6, 5, channels)
    large = bicubic(base, (18, 10))
    assert large.shape == (2, 18, 10, channels) and large.dtype == np.uint8
    for c in range(channels):
        expected = Image.fromarray(base[1, ..., c]).resize((10, 18), Image.Resampling.BICUBIC)
        assert np.array_equal(large[1, ..., c], np.asarray(expected))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (10, 64)])
def test_images_smaller_than_the_window_have_a_psnr_only(size):
    truth = random_images(2, *size)
    result = compare(disturbed(truth, 10), truth[:, ::2, ::2], truth)
    assert result["ssim"] is None and result["bicubic"]["ssim"] is None and result["gain"]["ssim"] is None
    assert describe(result)[1] == "SSIM: none, the images are smaller than its window of 11x11 pixels"


def test_the_result_says_what_the_model_gains():
    truth = random_images(6)
    base = truth.reshape(6, 8, 2, 8, 2, 3).mean(axis=(2, 4)).astype(np.uint8)
    samples = disturbed(truth, 12)
    result = compare(samples, base, truth)
    ours, theirs = (
        np.array([psnr_by_hand(x, y) for x, y in zip(images, truth)]) for images in (samples, bicubic(base, (16, 16)))
    )
    assert result["n"] == result["samples"] == 6 and result["identical"] == result["bicubic"]["identical"] == 0
    for found, values in ((result["psnr"], ours), (result["bicubic"]["psnr"], theirs)):
        np.testing.assert_allclose(found["values"], values, rtol=1e-7)
    for found, values in (
        (result["psnr"], ours), (result["bicubic"]["psnr"], theirs), (result["gain"]["psnr"], ours - theirs)
    ):  # fmt: skip
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-7)
        assert found["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(6), rel=1e-7)
    psnr, ssim = describe(result)
    assert psnr == (
        f"PSNR: {ours.mean():.2f} +- {ours.std(ddof=1) / 6**0.5:.2f} dB, "
        f"bicubic {theirs.mean():.2f} +- {theirs.std(ddof=1) / 6**0.5:.2f} dB, "
        f"gain +{(ours - theirs).mean():.2f} +- {(ours - theirs).std(ddof=1) / 6**0.5:.2f} dB "
        "(standard errors over 6 images)"
    )
    assert ssim.startswith(f"SSIM: {result['ssim']['mean']:.4f} +- ")


def test_samples_of_one_image_are_averaged_before_images_are():
    """Many samples of few images say little about other images."""
    truth = random_images(2)
    samples = np.concatenate([disturbed(truth, by, seed=i) for i, by in enumerate((5, 20, 40))])
    result = compare(samples, truth[:, ::2, ::2], truth)
    values = np.reshape(result["psnr"]["values"], (3, 2)).mean(axis=0)
    assert (result["n"], result["samples"], len(result["bicubic"]["psnr"]["values"])) == (2, 6, 2)
    assert result["psnr"]["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert result["psnr"]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-9)


def test_fewer_samples_than_images_are_compared_with_the_first_of_them():
    truth = random_images(5)
    result = compare(disturbed(truth[:2], 10), truth[:, ::2, ::2], truth)
    assert result["n"] == result["samples"] == len(result["bicubic"]["psnr"]["values"]) == 2


def test_a_perfect_model_and_a_single_image_still_make_json(tmp_path):
    truth = np.full((1, 16, 16, 1), 7, np.uint8)
    result = compare(truth, truth[:, ::2, ::2], truth)
    images.save_npz(str(tmp_path / "samples.npz"), truth)
    write_comparison("/true", str(tmp_path), str(tmp_path / "samples.npz"), truth[:, ::2, ::2], truth)
    read = json.loads((tmp_path / "psnr_ssim.json").read_text())
    assert read == {"reference": "/true", **result}
    assert read["psnr"]["mean"] == pytest.approx(20 * math.log10(255) + 10 * math.log10(256))
    assert read["psnr"]["standard_error"] is None and read["gain"]["psnr"]["mean"] == 0
    assert describe(result) == [
        "PSNR: 72.21 dB, bicubic 72.21 dB, gain +0.00 dB (a single image)",
        "SSIM: 1.0000, bicubic 1.0000, gain +0.0000 (a single image)",
        "1 samples equal the reference; each counts as if one byte were wrong by 1",
        "1 bicubic enlargements equal the reference; each counts as if one byte were wrong by 1",
    ]


def test_a_package_that_is_missing_is_one_error_before_anything_is_drawn(tmp_path, monkeypatch):
    def missing():
        raise ImportError("PSNR and SSIM need a package")

    monkeypatch.setattr(super_resolution, "load_torchmetrics", missing)
    base = GivenImages(random_images(1), None, ["a"])
    assert read_reference(SuperResSampling.of({}), base) is None
    with pytest.raises(UserError, match="PSNR and SSIM need a package"):
        read_reference(SuperResSampling.of({"reference": str(tmp_path)}), base)
