"""The evaluator: what is read once, what the options mean, and the call from Python."""

import json

import numpy as np
import pytest
import torch as th
from feature_helpers import write_script
from script_helpers import pixels, write_images

from improved_diffusion.cli.evaluate import check_source
from improved_diffusion.cli.parsing import parse
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Scoring
from improved_diffusion.evaluation import evaluator, feature_sets
from improved_diffusion.evaluation.evaluator import Inputs, evaluate, prepare_like_training
from improved_diffusion.evaluation.report import Report


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a network."""
    folder = tmp_path_factory.mktemp("evaluator")
    for seed, name in enumerate(("real", "other", "fakes")):
        write_images(folder / name, 40 + seed, size=(8, 8), seed=seed)
    write_script(folder / "features.pt")
    return folder


def inputs_of(place, **paths):
    settings = Scoring.of({"features": str(place / "features.pt"), **{k: str(place / v) for k, v in paths.items()}})
    return Inputs.of(settings.evaluation, settings.features, settings.reading)


# Where metrics are computed


def test_metrics_that_do_not_fit_an_accelerators_memory_are_computed_on_the_cpu(monkeypatch):
    monkeypatch.setattr(evaluator, "metrics_device", lambda: th.device("cuda:0"))
    monkeypatch.setattr(evaluator.distributed, "empty_cache", lambda device: None)
    said, tried = [], []
    monkeypatch.setattr(evaluator.logger, "log", said.append)

    def metric(a, b, device):
        tried.append(str(device))
        if device != "cpu":
            raise th.cuda.OutOfMemoryError
        return a + b

    assert evaluator._computed(metric, 1, 2) == 3 and tried == ["cuda:0", "cpu"]
    assert len(said) == 1 and "CPU" in said[0]

    def broken(device):
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        evaluator._computed(broken)


@pytest.mark.parametrize("kind, chosen", [("cuda:0", "cuda:0"), ("mps", "cpu"), ("cpu", "cpu")])
def test_metrics_are_computed_where_there_is_float64(kind, chosen, monkeypatch):
    monkeypatch.setattr(evaluator.distributed, "dev", lambda: th.device(kind))
    assert feature_sets.metrics_device() == th.device(chosen)


# What is read


@pytest.fixture
def extracted(monkeypatch):
    """The flags of the sets whose features are extracted."""
    flags, plain = [], evaluator.extract
    monkeypatch.setattr(
        evaluator, "extract", lambda images, *rest: (flags.append(images.flag), plain(images, *rest))[1]
    )
    return flags


@pytest.mark.parametrize(
    ("paths", "read"),
    [
        (dict(reference="real"), ["--reference"]),
        (dict(reference="real", train_dir="real"), ["--reference"]),
        (dict(reference="real", held_out="other"), ["--reference", "--held_out"]),
        (dict(reference="real", train_dir="other"), ["--reference", "--train_dir"]),
        (dict(reference="real", train_dir="other", held_out="real"), ["--reference", "--train_dir"]),
    ],
)
def test_each_set_is_read_once(paths, read, place, extracted):
    inputs = inputs_of(place, **paths)
    assert extracted == []
    found = inputs.prepare()
    assert extracted == read
    assert found.train.about["images"] == str(place / paths.get("train_dir", "real"))
    if "held_out" in paths:
        assert found.held_out.about["images"] == str(place / paths["held_out"])
    else:
        assert found.held_out is None


def test_several_sets_of_samples_are_compared_with_one_reference(place, tmp_path, extracted):
    inputs = inputs_of(place, reference="real")
    found = inputs.prepare()
    reports = [
        found.evaluate(inputs.open_samples(str(place / name)), str(tmp_path), {"steps": 3})
        for name in ("fakes", "real")
    ]
    assert extracted == ["--reference", "--samples", "--samples"]
    assert reports[0].fid.value > reports[1].fid.value == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "report.json").read_text()) == reports[1].to_dict()
    assert reports[1].asked == {"steps": 3}


# From Python


def arrays(place, name):
    return np.stack([pixels(path) for path in sorted((place / name).iterdir())])


def test_arrays_give_the_numbers_of_their_files_and_nothing_is_written(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = str(place / "features.pt")
    ours = evaluate(arrays(place, "fakes"), arrays(place, "real"), features=features, held_out=arrays(place, "other"))
    assert list(tmp_path.iterdir()) == []
    theirs = evaluate(
        place / "fakes", str(place / "real"), features=features, held_out=place / "other", out_dir=tmp_path / "out"
    )
    assert ours.metrics == theirs.metrics and ours.real == theirs.real and ours.copies is not None
    assert Report.read(str(tmp_path / "out")).to_dict() == theirs.to_dict()
    assert "| FID |" in ours._repr_markdown_()


def test_options_from_python_are_those_of_the_command(place):
    features = str(place / "features.pt")
    report = evaluate(place / "fakes", place / "real", features=features, resize=6, feature_batch=7)
    assert report.samples["image_size"] == "6x6"
    with pytest.raises(UserError, match="at least 40 are needed"):
        evaluate(arrays(place, "fakes")[:3], place / "real", features=features)
    real = arrays(place, "real")
    with pytest.raises(UserError, match="is the same as --reference"):
        evaluate(arrays(place, "fakes"), real, features=features, held_out=real)
    with pytest.raises(UserError, match="whose images are all read: choose another"):
        evaluate(place / "fakes", place / "real", features=features, out_dir=place / "fakes")


# What the options mean


def test_real_images_are_prepared_as_in_the_models_training():
    for model, given, expected in (
        (dict(image_size=8, channels=3), {}, ("8", True)),
        (dict(image_size="8x12", channels=1), {}, ("8x12", False)),
        (dict(image_size=8, channels=3), {"resize": "16"}, ("16", True)),
        (dict(image_size=8, channels=1), {"colour": True}, ("8", True)),
        (dict(image_size=8, channels=4), {}, ("8", True)),
    ):
        features = prepare_like_training(Scoring.of({**model, **given}), "m.pt", 40)
        assert (features.resize, features.colour) == expected


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({}, 39, "--num_samples 39: at least 40 are needed"),
        ({"print_steps": True}, 50, "--print_steps draws no samples"),
    ],
)
def test_samples_that_could_not_be_evaluated_are_not_drawn(options, count, message):
    with pytest.raises(UserError, match=message):
        prepare_like_training(Scoring.of({"image_size": 8, **options}), "m.pt", count)


def test_samples_are_either_given_or_drawn():
    def check(*argv):
        check_source(parse(Scoring, list(map(str, argv))))

    check("--samples", "a", "--num_samples", 50, "--out_dir", "b", "--resize", 8)
    check("--model_path", "a", "--steps", 5, "--seed", 3)
    for argv in ([], ["--samples", "a", "--model_path", "b"]):
        with pytest.raises(UserError, match=r"give --samples, .*, or --model_path, .*: one of the two"):
            check(*argv)
    with pytest.raises(UserError, match="--seed is for drawing samples, but --samples a are given"):
        check("--samples", "a", "--seed", 3)


def test_a_network_is_tried_on_what_the_model_will_draw(place, monkeypatch):
    settings = Scoring.of({
        "features": str(place / "features.pt"), "reference": str(place / "real"), "image_size": 8, "channels": 3,
    })  # fmt: skip
    inputs = Inputs.of(settings.evaluation, prepare_like_training(settings, "a.pt", 40), settings.reading)
    seen, plain = [], evaluator.FeatureNetwork.__call__
    monkeypatch.setattr(
        evaluator.FeatureNetwork,
        "__call__",
        lambda *args, **kwargs: (seen.append(args[1].shape), plain(*args, **kwargs))[1],
    )
    inputs.check_model("a.pt", 40)
    assert seen == [(3, 8, 8, 3), (1, 8, 8, 3), (2, 8, 8, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_batch": 0}, "--feature_batch 0 must be at least 1"),
        ({"feature_size": "0"}, "--feature_size 0 must be auto, native, or a number of pixels such as 299"),
        ({"feature_size": "-3"}, "--feature_size -3 must be"),
        ({"resize": "8x8x8"}, "--resize '8x8x8': expected a size such as 64, or 48x64 for height x width"),
        ({"resize": "0"}, "--resize '0': expected a size"),
    ],
)
def test_values_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Scoring.of(options)


@pytest.mark.parametrize("size", ["auto", "native", "299"])
def test_sizes_for_the_network_are_taken(size):
    assert Scoring.of({"feature_size": size}).features.feature_size == size
