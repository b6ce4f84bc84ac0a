"""References on disk, published ones too, and what can be compared with what."""

import json
from dataclasses import replace

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.evaluation.feature_sets import FeatureSet
from improved_diffusion.evaluation.metrics.frechet import Moments, moments
from improved_diffusion.evaluation.references import (
    check_comparable,
    check_form,
    check_network,
    load_reference,
    save_reference,
)
from improved_diffusion.utils import files

NETWORK = {"features": "f.pt2", "features_sha256": "a" * 64, "feature_size": 16, "resized_by": "x"}
IMAGES = {
    "images": "/data/real", "count": 20_000, "image_size": "16x16", "channels": 3, "prepared": "as they are",
    "lossy_files": False,
}  # fmt: skip


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def a_set(flag="--samples", width=6, spatial=4, **about):
    features = numbers(50, width).astype(np.float32)
    return FeatureSet(
        flag, {**IMAGES, **NETWORK, **about}, features, None, moments(features),
        moments(numbers(50, spatial)) if spatial else None,
    )  # fmt: skip


def without(given, *keys):
    """The set with a description that lacks keys."""
    return FeatureSet(
        given.flag, {k: v for k, v in given.about.items() if k not in keys}, given.features, None, given.moments,
        given.spatial_moments,
    )  # fmt: skip


# On disk


@pytest.mark.parametrize("spatial", [4, 0])
@pytest.mark.parametrize("features", [True, False])
def test_a_reference_survives_the_way_to_disk(tmp_path, spatial, features):
    saved, path = a_set(spatial=spatial), str(tmp_path / "r.npz")
    saved = replace(saved, features=saved.features if features else None)
    save_reference(path, saved, "digits")
    found = load_reference(path, "--reference")
    of_file = {"file": path, "file_sha256": files.sha256(path)}
    assert found.flag == "--reference" and found.about == {"name": "digits", **saved.about, **of_file}
    assert found.name == f"--reference {path}" and found.count == 20_000 and found.images is None
    np.testing.assert_array_equal(found.moments.mu, saved.moments.mu)
    np.testing.assert_array_equal(found.moments.sigma, saved.moments.sigma)
    assert (found.spatial_moments is None) == (not spatial) and found.probabilities is None
    if spatial:
        np.testing.assert_array_equal(found.spatial_moments.sigma, saved.spatial_moments.sigma)
    if features:
        np.testing.assert_array_equal(found.features, saved.features)
        assert found.features.dtype == np.float32
    else:
        assert found.features is None


def test_a_reference_is_an_npz_of_the_published_names_without_objects(tmp_path):
    save_reference(str(tmp_path / "r.npz"), a_set(), "digits")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["about", "features", "mu", "mu_s", "sigma", "sigma_s"]
        assert arrays["mu"].shape == (6,) and arrays["sigma_s"].shape == (4, 4)
        assert json.loads(str(arrays["about"]))["name"] == "digits"


def published(**changed):
    """The arrays of the published reference files: statistics, and some of the images."""
    arrays = {
        "mu": numbers(6), "sigma": np.eye(6), "mu_s": numbers(4), "sigma_s": np.eye(4),
        "arr_0": np.zeros((3, 8, 8, 3), np.uint8),
    }  # fmt: skip
    return {name: array for name, array in {**arrays, **changed}.items() if array is not None}


def write(tmp_path, **arrays):
    np.savez(tmp_path / "r.npz", **arrays)
    return str(tmp_path / "r.npz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_statistics_are_read(tmp_path, dtype):
    arrays = published(mu=numbers(6).astype(dtype))
    found = load_reference(write(tmp_path, **arrays), "--reference")
    path = str(tmp_path / "r.npz")
    assert (
        found.about == {"images": path, "file": path, "file_sha256": files.sha256(path)}
        and found.count is None
        and found.features is None
    )
    np.testing.assert_array_equal(found.moments.mu, arrays["mu"])
    np.testing.assert_array_equal(found.spatial_moments.sigma, np.eye(4))
    assert found.moments.mu.dtype == np.float64
    assert load_reference(write(tmp_path, **published(mu_s=None, sigma_s=None)), "--x").spatial_moments is None


def test_images_are_no_statistics(tmp_path):
    assert load_reference(write(tmp_path, arr_0=np.zeros((3, 8, 8, 3), np.uint8)), "--reference") is None
    assert load_reference(str(tmp_path), "--reference") is None
    assert load_reference(str(tmp_path / "absent.npz"), "--reference") is None


@pytest.mark.parametrize("arrays, culprit", [
    (published(sigma=None), "has no sigma: statistics are both mu [D] and sigma [D, D]"),
    (published(mu=None), "has no mu: statistics are both"),
    (published(sigma_s=None), "has no sigma_s: statistics are both mu_s [D] and sigma_s [D, D]"),
    (published(sigma=np.eye(5)), "has mu of (6,) and sigma of (5, 5): expected [D] and [D, D]"),
    (published(sigma=np.ones(6)), "has mu of (6,) and sigma of (6,)"),
    (published(mu=np.zeros((6, 1))), "has mu of (6, 1)"),
    (published(mu=np.float64(1)), "has mu of ()"),
    (published(mu=np.full(6, np.nan)), "has a mu that is not of finite real numbers"),
    (published(sigma=np.full((6, 6), np.inf)), "has a sigma that is not of finite real numbers"),
    (published(mu=np.zeros(6, complex)), "has a mu that is not of finite real numbers"),
    (published(mu=np.array(["a"] * 6)), "has a mu that is not of finite real numbers"),
    (published(features=numbers(10, 5)), "has features of (10, 5) beside mu of 6"),
    (published(features=numbers(6)), "has features of (6,) beside mu of 6"),
    (published(features=np.full((3, 6), np.nan)), "has features of (3, 6) beside mu of 6, or not finite: write it"),
    (published(features=np.array([["a"] * 6] * 3)), "has features of (3, 6) beside mu of 6, or not finite"),
    (published(about=np.array("{")), "has a damaged description: write it again with the command evaluate reference"),
    (published(about=np.array("[1]")), "has a damaged description"),
    (published(about=np.array('"text"')), "has a damaged description"),
    (published(about=np.zeros(3)), "has a damaged description"),
    *((published(about=np.array(about)), "has a damaged description") for about in (
        '{"count": NaN}', '{"count": 1.5}', '{"count": true}', '{"count": -1}', '{"count": 0}', '{"name": 3}',
        "[" * 200_000,
        '{"name": {"a": 1}}', '{"name": "\\ud800"}', '{"images": null}', '{"features": []}', '{"size": [[1]]}',
        '{"features_sha256": 1}', '{"count": ' + "9" * 5000 + "}",
    )),
    (published(mu=np.zeros(0), sigma=np.zeros((0, 0))), "has mu of (0,)"),
    ({"features": numbers(10, 6)}, "has neither mu and sigma, of features, nor arr_0, of images"),
])  # fmt: skip
def test_a_damaged_reference_is_named(tmp_path, arrays, culprit):
    path = write(tmp_path, **arrays)
    with pytest.raises(UserError) as caught:
        load_reference(path, "--reference")
    assert str(caught.value).startswith(f"--reference {path} {culprit}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mu", "about", "features"])
def test_objects_are_not_unpickled(tmp_path, name):
    path = write(tmp_path, **published(**{name: np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(UserError, match=r"r\.npz holds Python objects, which could run code when loaded"):
        load_reference(path, "--reference")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_cut_reference_is_named(tmp_path, share):
    save_reference(str(tmp_path / "r.npz"), a_set(), "digits")
    data = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "r.npz").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"r\.npz is not a readable npz"):
        load_reference(str(tmp_path / "r.npz"), "--reference")


# What can be compared


@pytest.mark.parametrize("changed, message", [
    ({"image_size": "32x32"}, "ours has images of 16x16, theirs 32x32: give --resize 16x16 to resize"),
    ({"channels": 1}, "ours has 3 channels, theirs 1: convert one of them, or give --colour True"),
])  # fmt: skip
@pytest.mark.parametrize("written", [False, True])
def test_images_of_another_form_cannot_be_compared(changed, message, written):
    with pytest.raises(UserError) as caught:
        check_form(("ours", IMAGES), ("theirs", {**IMAGES, **changed}), written)
    assert str(caught.value).startswith(message)
    assert ("write the reference again with the command evaluate reference" in str(caught.value)) == written


def test_images_of_one_form_can_be_compared_and_what_is_unknown_is_not():
    check_form(("ours", IMAGES), ("theirs", {**IMAGES, "count": 3}), False)
    check_form(("ours", IMAGES), ("theirs", {}), True)


def test_the_network_has_to_be_the_one_of_the_reference():
    check_network(NETWORK, a_set("--reference"))
    check_network(NETWORK, without(a_set("--reference"), *NETWORK))
    with pytest.raises(UserError) as caught:
        check_network(NETWORK, a_set("--reference", features="g.pt2", features_sha256="b" * 64))
    assert str(caught.value) == (
        "--reference /data/real was made with the features g.pt2 (SHA-256 bbbbbbbbbbbb), not f.pt2 "
        "(SHA-256 aaaaaaaaaaaa): give the same --features, or write it again"
    )


@pytest.mark.parametrize("kwargs, message", [
    ({"image_size": "32x32"}, "--samples /data/real has images of 16x16, --reference /data/real 32x32"),
    ({"features_sha256": "b" * 64}, "was made with the features"),
    ({"width": 7}, "--reference /data/real has 7 features, --features f.pt2 gives 6: give the features that it was"),
    ({"spatial": 5}, "--reference /data/real has 5 spatial features, --features f.pt2 gives 4"),
])  # fmt: skip
def test_what_would_mean_nothing_is_an_error(kwargs, message):
    with pytest.raises(UserError) as caught:
        check_comparable(a_set(), a_set("--reference", **kwargs))
    assert message in str(caught.value)


@pytest.mark.parametrize("ours, theirs, warnings", [
    ({}, {}, []),
    ({}, {"spatial": 0}, []),
    ({"count": 10_000}, {"count": 10_000}, []),
    ({"count": 9_999}, {}, ["only 9,999 samples: FID depends on their number"]),
    ({}, {"count": 500}, ["only 500 images in the reference: FID"]),
    ({"feature_size": "native"}, {}, ["samples were resized to native for the features, images of the reference to"]),
    ({"prepared": "resized and centre-cropped"}, {}, ["the samples were resized to the size of the reference"]),
    ({}, {"lossy_files": True}, ["the reference is of JPEGs and the samples are not: compression alone"]),
    ({"count": 50}, {"lossy_files": True}, ["only 50 samples", "JPEG"]),
])  # fmt: skip
def test_doubts_are_told(ours, theirs, warnings):
    found = check_comparable(a_set(**ours), a_set("--reference", **theirs))
    assert len(found) == len(warnings)
    assert all(part in warning for part, warning in zip(warnings, found))


def test_published_statistics_that_do_not_say_how_they_were_made_are_doubted():
    theirs = FeatureSet("--reference", {"images": "r.npz"}, moments=Moments(np.zeros(6), np.eye(6)))
    (warning,) = check_comparable(a_set(), theirs)
    assert "do not say which network, which resizing and how many images" in warning
    assert "--features inception --feature_size native" in warning


@pytest.mark.parametrize("changed, culprit", [
    (dict(sigma=np.triu(np.ones((6, 6)) + np.eye(6))), "sigma that is not a covariance"),
    (dict(sigma=-np.eye(6)), "sigma that is not a covariance"),
    (dict(sigma=np.zeros((6, 6))), "numbers that are out of range"),
    (dict(mu=np.full(6, 1e200)), "numbers that are out of range"),
    (dict(features=np.zeros((9, 6), np.float32)), "has the features of 9 images: at least 40"),
    (dict(features=np.full((50, 6), 9, np.float32)), "features that are not those of its mu"),
    (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "has mu of (0,) and sigma of (0, 0): expected [D] and [D, D]"),
    (dict(mu_s=np.zeros(0), sigma_s=np.zeros((0, 0))), "has mu_s of (0,) and sigma_s of (0, 0)"),
    *(
        (dict(about=np.array(about)), "has a damaged description")
        for about in (
            '{"count": null}', '{"count": -1}', '{"count": true}', '{"count": NaN}', '{"x": 1e999}', "[" * 10**5,
            '{"name": 5}', '{"images": []}', '{"features": {}}', '{"features_sha256": 1}', '{"name": "\\ud800"}', "5",
        )
    ),
])  # fmt: skip
def test_statistics_that_cannot_be_are_refused(tmp_path, changed, culprit):
    with pytest.raises(UserError) as caught:
        load_reference(write(tmp_path, **published(**changed)), "--reference")
    assert culprit in str(caught.value)
