"""Feature networks: what they give, what they are given, and what is refused."""

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from feature_helpers import export_module, trusted, write_program, write_script
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.evaluation.features import FeatureNetwork

SIDE = 8


def pictures(n=5, side=SIDE, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def to_tensor(images):
    return th.from_numpy(images.transpose(0, 3, 1, 2).copy())


def write_any(path, module, trace=True):
    """A module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = th.zeros(2, 3, SIDE, SIDE, dtype=th.uint8)
        (th.jit.trace(module, example, strict=False) if trace else th.jit.script(module)).save(str(path))
    return trusted(path)


class Mean(th.nn.Module):
    """The mean colour, of which the truth is plain."""

    def forward(self, x):
        return x.float().mean(dim=(2, 3))


class Pixels(th.nn.Module):
    """The pixels themselves, as they come."""

    def forward(self, x):
        return x.flatten(1).float()


class PixelDetector(th.nn.Module):
    """The pixels, of the form of the public Inception file."""

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        found = img.flatten(1).float()
        if return_features:
            return found
        even = th.ones_like(found) / found.shape[1]
        return even if no_output_bias else 1 - even  # which are no probabilities


class BiasedDetector(th.nn.Module):
    """Of that form, but with scores in place of probabilities."""

    def forward(self, img, return_features: bool = False):
        return img.flatten(1).float()


@pytest.mark.parametrize("form", ["script", "program"])
def test_features_are_what_the_program_computes(tmp_path, form):
    path = tmp_path / "mean"
    write_any(path, Mean()) if form == "script" else export_module(path, Mean(), SIDE)
    images = pictures()
    out = FeatureNetwork(str(path))(images)
    assert out.features.dtype == np.float32 and out.spatial is None and out.probabilities is None
    np.testing.assert_allclose(out.features, images.mean(axis=(1, 2)), rtol=1e-6)


def write(form, path, **kinds):
    return write_script(path, **kinds) if form == "script" else write_program(path, SIDE, **kinds)


@pytest.mark.parametrize("form", ["script", "program"])
def test_a_program_may_give_a_dict_of_all_kinds(tmp_path, form):
    out = FeatureNetwork(write(form, tmp_path / "all", spatial=True, logits=True))(pictures())
    assert out.features.shape == (5, 6) and out.spatial.shape == (5, 16) and out.probabilities.shape == (5, 5)
    np.testing.assert_allclose(out.probabilities.sum(axis=1), 1, atol=1e-12)
    alone = FeatureNetwork(write(form, tmp_path / "features"))(pictures())
    np.testing.assert_array_equal(alone.features, out.features)


@pytest.mark.parametrize("form", ["script", "program"])
def test_logits_come_from_a_second_program_where_there_is_one(tmp_path, form):
    first = write(form, tmp_path / "first", logits=True)
    second = write(form, tmp_path / "second", only_logits=True, seed=1)
    second = Path(second)
    network = FeatureNetwork(first, logits=str(second))
    logits = FeatureNetwork(str(second))(pictures()).features.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(network(pictures()).probabilities, expected, rtol=1e-5)
    both = FeatureNetwork(first, logits=write(form, tmp_path / "both", logits=True))(pictures())
    np.testing.assert_allclose(both.probabilities, FeatureNetwork(first)(pictures()).probabilities, rtol=1e-6)
    assert network.describe()["logits_sha256"] == hashlib.sha256(second.read_bytes()).hexdigest()


def test_the_public_inception_form_gives_features_and_probabilities_without_bias(tmp_path):
    network = FeatureNetwork(write_script(tmp_path / "detector.pt", detector=True), "native")
    alike = FeatureNetwork(write_script(tmp_path / "alike.pt", logits=True))
    out, expected = network(pictures()), alike(pictures())
    np.testing.assert_allclose(out.features, expected.features, rtol=1e-6)
    np.testing.assert_allclose(out.probabilities, expected.probabilities, rtol=1e-5)


def test_grey_images_are_repeated_in_three_channels(tmp_path):
    network, grey = FeatureNetwork(write_script(tmp_path / "f.pt")), pictures(channels=1)
    np.testing.assert_array_equal(network(grey).features, network(np.repeat(grey, 3, axis=3)).features)


def test_the_images_are_not_changed(tmp_path):
    images = pictures()
    before = images.copy()
    FeatureNetwork(write_script(tmp_path / "f.pt"), "16")(images)
    np.testing.assert_array_equal(images, before)


# Resizing


def pillow_resized(images, side):
    """float32 [N, 3, side, side]: each channel through Pillow's antialiased bicubic filter as float32."""
    return np.array([
        [np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
         for c in range(3)]
        for image in images
    ])  # fmt: skip


@pytest.mark.parametrize("source, side", [(8, 5), (8, 20), (33, 7)])
def test_resizing_is_pillows_antialiased_bicubic_rounded_to_bytes(tmp_path, source, side):
    images = pictures(side=source)
    images[0] = 255 * (np.arange(source) > source // 2)[:, None]  # an edge, where the filter overshoots
    network = FeatureNetwork(write_any(tmp_path / "f.pt", Pixels()), str(side))
    wanted = pillow_resized(images, side)
    assert wanted.min() < 0 or wanted.max() > 255
    found = network(images).features.reshape(5, 3, side, side)
    np.testing.assert_array_equal(found, np.rint(wanted.clip(0, 255)))


def test_the_public_inception_form_is_given_real_numbers(tmp_path):
    network = FeatureNetwork(write_any(tmp_path / "f.pt", PixelDetector(), trace=False), "5")
    out = network(pictures())
    wanted = pillow_resized(pictures(), 5).clip(0, 255)
    np.testing.assert_allclose(out.features.reshape(wanted.shape), wanted, rtol=1e-6)
    assert np.abs(out.features - out.features.round()).max() > 0.1
    np.testing.assert_allclose(out.probabilities, 1 / 75, rtol=1e-6)  # asked for without a bias


@pytest.mark.parametrize("feature_size", ["auto", "native"])
def test_images_go_as_they_are_to_a_program_that_takes_any_size(tmp_path, feature_size):
    network = FeatureNetwork(write_any(tmp_path / "f.pt", Pixels()), feature_size)
    images = pictures(side=11)
    np.testing.assert_array_equal(network(images).features, to_tensor(images).flatten(1).numpy())
    assert network.describe()["feature_size"] == "native"


def test_a_program_of_one_size_gets_it_unless_told_otherwise(tmp_path):
    path = export_module(tmp_path / "f.pt2", Pixels(), SIDE)
    images = pictures(side=12)
    automatic, told = FeatureNetwork(path), FeatureNetwork(path, str(SIDE))
    np.testing.assert_array_equal(automatic(images).features, told(images).features)
    assert automatic.describe() == told.describe() and automatic.describe()["feature_size"] == SIDE
    with pytest.raises(UserError, match=r"--feature_size 12 contradicts --features .*f\.pt2, which takes 8x8"):
        FeatureNetwork(path, "12")
    with pytest.raises(UserError, match=r"f\.pt2 cannot take uint8 images of \(5, 3, 12, 12\).* 8x8: give --feature_s"):
        FeatureNetwork(path, "native")(images)


def test_inception_is_resized_to_its_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr("improved_diffusion.evaluation.features.fetch", lambda *args: str(path))
    path = Path(write_script(tmp_path / "inception.pt", detector=True))
    assert FeatureNetwork("inception").describe() == {
        "features": "inception", "features_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "feature_size": 299, "resized_by": "antialiased bicubic (Pillow)",
    }  # fmt: skip
    assert FeatureNetwork("inception", "native").describe()["feature_size"] == "native"


def test_the_name_is_the_files(tmp_path):
    path = write_script(tmp_path / "f.pt")
    copy = shutil.copy(path, tmp_path / "g.pt")
    assert FeatureNetwork(path).describe()["features"] == "f.pt"
    assert FeatureNetwork(path).describe()["features_sha256"] == FeatureNetwork(copy).describe()["features_sha256"]


# What cannot be used


def loading_fails(path, *culprits, **kwargs):
    with pytest.raises(UserError) as caught:
        FeatureNetwork(str(path), **kwargs)
    for culprit in ("--features", str(path), *culprits):
        assert culprit in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_program_is_named(tmp_path):
    loading_fails(tmp_path / "absent.pt", "does not exist")
    (tmp_path / "text.pt").write_text("not a program")
    loading_fails(tmp_path / "text.pt", "neither an exported program", "TorchScript")
    th.save({"weight": th.zeros(3)}, tmp_path / "state.pt")
    loading_fails(trusted(tmp_path / "state.pt"), "a state dict alone does not say how to compute")
    with pytest.raises(UserError, match=f"--features {tmp_path} is a folder: name a file"):
        FeatureNetwork(str(tmp_path))
    with pytest.raises(UserError, match=r"--logits .*nothing\.pt does not exist"):
        FeatureNetwork(write_script(tmp_path / "f.pt"), logits=str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize("form", ["script", "program"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_cut_file_is_named(tmp_path, form, share):
    path = tmp_path / "whole"
    write(form, path)
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
    loading_fails(trusted(tmp_path / "cut"), "cut off")


@pytest.mark.parametrize("form", ["script", "program"])
def test_a_file_with_other_bytes_in_it_is_named(tmp_path, form):
    path = tmp_path / "whole"
    write(form, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = bytes(200)
    (tmp_path / "damaged").write_bytes(data)
    loading_fails(trusted(tmp_path / "damaged"), "cannot be loaded")


class Gives(th.nn.Module):
    """Something else than features."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        mean = x.float().mean(dim=(2, 3))
        return {
            "[N]": lambda: mean[:, 0],
            "[N, D, H, W]": lambda: x.float() / 255,
            "one row fewer": lambda: mean[1:],
            "a scalar": lambda: mean.sum(),
            "[N, 1]": lambda: mean[:, :1],
            "NaN": lambda: mean / (mean - mean),
            "a tuple": lambda: (mean, mean),
            "no features": lambda: {"feature": mean},
        }[self.what]()


@pytest.mark.parametrize("what, culprit", [
    ("[N]", r"gives a tensor of \(5,\) as features of 5 images: expected \[5, D\]"),
    ("[N, D, H, W]", r"gives features of \(5, 3, 8, 8\) for 5 images: .*average over positions"),
    ("one row fewer", r"gives a tensor of \(4, 3\) as features of 5 images"),
    ("a scalar", r"gives a tensor of \(\) as features"),
    ("[N, 1]", r"gives a tensor of \(5, 1\) as features"),
    ("NaN", r"gives features that are not finite numbers"),
    ("a tuple", r"gives tuple as features of 5 images"),
    ("no features", r"gives NoneType as features of 5 images"),
])  # fmt: skip
def test_output_of_another_form_is_named(tmp_path, what, culprit):
    network = FeatureNetwork(write_any(tmp_path / "bad.pt", Gives(what)))
    with pytest.raises(UserError, match=rf"^--features .*bad\.pt {culprit}"):
        network(pictures())


def test_logits_of_another_form_are_named(tmp_path):
    bad = write_any(tmp_path / "bad.pt", Gives("one row fewer"))
    with pytest.raises(UserError, match=r"--logits .*bad\.pt gives a tensor of \(4, 3\) as logits of 5 images"):
        FeatureNetwork(write_script(tmp_path / "f.pt"), logits=bad)(pictures())


@pytest.mark.parametrize("kwargs, culprit", [
    ({"dtype": th.float32}, "takes torch.float32 (s"),
    ({"channels": 1}, "1, 8, 8): expected uint8 [N, 3, H, W]"),
    ({"batch": 2}, "takes batches of 2 images only: export it with a dynamic first dimension"),
])  # fmt: skip
def test_a_program_that_takes_something_else_is_named(tmp_path, kwargs, culprit):
    loading_fails(export_module(tmp_path / "f.pt2", Mean(), SIDE, **kwargs), culprit)


class Two(th.nn.Module):
    def forward(self, x, y):
        return x.float() + y


class Raises(th.nn.Module):
    def forward(self, x):
        if x.shape[0] > 0:
            raise RuntimeError("not for me")
        return x.float()


def test_a_program_of_two_inputs_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (th.zeros(2, 3, 8, 8, dtype=th.uint8), th.zeros(2, 3, 8, 8))
        th.export.save(th.export.export(Two(), example), tmp_path / "two.pt2")
    loading_fails(trusted(tmp_path / "two.pt2"), "must take one tensor", "it takes 2 inputs")


def test_a_program_that_raises_is_named(tmp_path):
    network = FeatureNetwork(write_any(tmp_path / "raises.pt", Raises(), trace=False))
    with pytest.raises(UserError, match=r"raises\.pt cannot take uint8 images of \(5, 3, 8, 8\) on cpu \(.*not for me"):
        network(pictures())


def test_the_public_inception_form_gets_its_size_under_any_name(tmp_path):
    network = FeatureNetwork(write_script(tmp_path / "inception-2015-12-05.pt", detector=True))
    assert network.describe()["feature_size"] == 299


def test_a_program_that_gives_no_probabilities_is_named(tmp_path):
    network = FeatureNetwork(write_any(tmp_path / "f.pt", BiasedDetector(), trace=False), "native")
    assert network(pictures(), probabilities=False).probabilities is None
    with pytest.raises(UserError, match=r"f\.pt gives no probabilities without return_features: rows must sum to 1"):
        network(pictures())


def test_reduced_precision_is_off_while_a_program_runs(tmp_path, monkeypatch):
    network = FeatureNetwork(write_script(tmp_path / "f.pt"))
    seen, plain = [], network.program.module

    def module(*args, **kwargs):
        seen.append(th.backends.cudnn.allow_tf32)
        return plain(*args, **kwargs)

    network.program.module = module
    before = th.backends.cudnn.allow_tf32
    network(pictures())
    assert seen == [False] and th.backends.cudnn.allow_tf32 == before


class Among(th.nn.Module):
    """Features that depend on the other images of the batch."""

    def forward(self, x):
        x = x.flatten(1).float()
        return x[:, :4] - x.mean(dim=0)[:4]


class Dropping(th.nn.Module):
    """Features of a network in training mode."""

    def forward(self, x):
        return th.nn.functional.dropout(x.flatten(1).float()[:, :40], 0.5, True)


class Scaled(th.nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x.flatten(1).float()[:, :4] * self.factor


class Softmax(th.nn.Module):
    def forward(self, x):
        return x.flatten(1).float()[:, :4].softmax(dim=1)


def scripted(path, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.jit.script(module).save(str(path))
    return trusted(path)


@pytest.mark.parametrize("module", [Among(), Dropping()])
def test_features_that_are_not_of_the_image_alone_are_refused(tmp_path, module):
    network = FeatureNetwork(scripted(tmp_path / "f.pt", module))
    with pytest.raises(UserError, match=r"f\.pt gives different features for the same image .*eval\(\) mode"):
        network.check((8, 8), 3)
    FeatureNetwork(write_script(tmp_path / "g.pt")).check((8, 8), 3)


@pytest.mark.parametrize("factor", [1e19, 1e-30])
def test_features_out_of_the_reach_of_float32_are_refused(tmp_path, factor):
    with pytest.raises(UserError, match=r"out of float32's range: scale them to about 1"):
        FeatureNetwork(scripted(tmp_path / "f.pt", Scaled(factor)))(pictures())


def test_probabilities_are_no_logits(tmp_path):
    network = FeatureNetwork(write_script(tmp_path / "f.pt"), logits=scripted(tmp_path / "p.pt", Softmax()))
    with pytest.raises(UserError, match=r"--logits .*p\.pt gives probabilities where logits are expected"):
        network(pictures())


def test_too_many_spatial_features_are_refused(tmp_path):
    class Map(th.nn.Module):
        def forward(self, x):
            return {"features": x.flatten(1).float()[:, :4], "spatial": x.float()}

    path = export_module(tmp_path / "f.pt2", Map(), 40)
    with pytest.raises(UserError, match=r"4,800 spatial features of each image: at most 4,096 .*7 of 17x17"):
        FeatureNetwork(path)(pictures(side=40))
