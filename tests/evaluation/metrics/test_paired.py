"""PSNR and SSIM against the formulas (torchmetrics takes the logarithm of 10 in float32), and what is made of them."""

import math
import sys

import numpy as np
import pytest
from torchmetrics.functional import image as torchmetrics_image

from improved_diffusion.evaluation.metrics import paired
from improved_diffusion.evaluation.metrics.paired import agreement, load_torchmetrics


def random_images(n, height=16, width=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def disturbed(images, by, seed=1):
    noise = np.random.default_rng(seed).normal(0, by, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def psnr_by_hand(x, y):
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - y.astype(float)) ** 2))


def ssim_by_hand(x, y):
    """Wang et al. 2004, eq. 13, under Gaussian windows of 11x11, sigma 1.5, of images mirrored at the borders."""
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for c in range(x.shape[-1]):
        a, b = (np.pad(image[..., c].astype(float), 5, mode="reflect") for image in (x, y))
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                p, q = (image[row : row + 11, column : column + 11] for image in (a, b))
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                covariance = (window * (p - mu_p) * (q - mu_q)).sum()
                values.append(
                    (2 * mu_p * mu_q + c1) * (2 * covariance + c2)
                    / ((mu_p**2 + mu_q**2 + c1) * (var_p + var_q + c2))
                )  # fmt: skip
    return np.mean(values)


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (11, 14, 1), (13, 12, 4)])
def test_each_image_has_the_value_of_the_formula(height, width, channels, monkeypatch):
    monkeypatch.setattr(paired, "PIXELS", 2 * height * width * channels)  # in batches of 2, 2 and 1
    truth = random_images(5, height, width, channels)
    images = np.concatenate([disturbed(truth[i : i + 1], 4 * 2**i) for i in range(5)])
    found = agreement(images, truth)
    np.testing.assert_allclose(found.psnr, [psnr_by_hand(x, y) for x, y in zip(images, truth)], rtol=1e-7)
    np.testing.assert_allclose(found.ssim, [ssim_by_hand(x, y) for x, y in zip(images, truth)], atol=2e-6)
    assert found.identical == 0 and (np.diff(found.psnr) < 0).all() and (np.diff(found.ssim) < 0).all()


def test_smooth_images_lose_nothing_to_float32():
    """There the variances are small differences of large numbers."""
    slope = np.linspace(230, 250, 24)[None, :, None] + np.zeros((24, 24, 1))
    truth, image = slope.astype(np.uint8)[None], (slope + np.arange(24)[:, None, None] % 2).astype(np.uint8)[None]
    assert agreement(image, truth).ssim[0] == pytest.approx(ssim_by_hand(image[0], truth[0]), abs=2e-4)


def test_values_are_what_torchmetrics_says_by_itself():
    truth = random_images(3)
    images = disturbed(truth, 20)
    x, y = (paired.th.from_numpy(a).permute(0, 3, 1, 2).float() for a in (images, truth))
    for i, (psnr, ssim) in enumerate(zip(*agreement(images, truth)[:2])):
        one = x[i : i + 1], y[i : i + 1]
        assert psnr == pytest.approx(float(torchmetrics_image.peak_signal_noise_ratio(*one, data_range=255.0)))
        expected = float(torchmetrics_image.structural_similarity_index_measure(*one, data_range=255.0))
        assert ssim == pytest.approx(expected, abs=1e-6)


def test_samples_take_the_true_images_in_turn(monkeypatch):
    monkeypatch.setattr(paired, "PIXELS", 16 * 16 * 3 * 2)
    truth = random_images(3)
    samples = disturbed(np.concatenate([truth, truth, truth[:1]]), 10)
    expected = [psnr_by_hand(x, truth[i % 3]) for i, x in enumerate(samples)]
    np.testing.assert_allclose(agreement(samples, truth).psnr, expected, rtol=1e-7)


def test_identical_images_count_as_the_best_that_is_not_identical():
    truth = random_images(3)
    images = disturbed(truth, 10)
    images[0] = truth[0]
    images[1] = truth[1]
    images[1, 0, 0, 0] ^= 1
    found = agreement(images, truth)
    assert found.identical == 1
    assert found.psnr[0] == pytest.approx(found.psnr[1], rel=1e-7) and found.psnr[0] > found.psnr[2]
    assert found.ssim[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (10, 64)])
def test_images_smaller_than_the_window_have_a_psnr_alone(size):
    truth = random_images(2, *size)
    found = agreement(disturbed(truth, 10), truth)
    assert found.ssim is None and found.psnr.shape == (2,)


def test_arrays_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) cannot be compared with uint8 \(1, 16, 12, 3\)"):
        agreement(random_images(1), random_images(1, 16, 12))
    with pytest.raises(ValueError, match="float64"):
        agreement(random_images(1) / 255, random_images(1))


def test_torchmetrics_that_is_missing_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"torchmetrics: pip install -e '\.\[eval\]'"):
        load_torchmetrics()


def test_torchmetrics_that_fails_over_another_package_is_not_called_missing(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"cannot be imported \(operator torchvision::nms does not exist\): fix"):
        load_torchmetrics()
