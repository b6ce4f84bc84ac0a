"""From options to a report: what is read once, what is known of the samples, and what the options mean."""

import json
from argparse import Namespace

import numpy as np
import pytest
from feature_helpers import write_script
from script_helpers import write_images

from improved_diffusion import config
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import UserError
from improved_diffusion.evaluation import evaluator
from improved_diffusion.utils import files

GROUPS = (config.JudgedConfig, config.FeaturesConfig, config.SampleConfig, config.SamplerConfig, config.RunConfig)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a network."""
    folder = tmp_path_factory.mktemp("judging")
    for seed, name in enumerate(("real", "other", "fakes")):
        write_images(folder / name, 40 + seed, size=(8, 8), seed=seed)
    write_script(folder / "features.pt")
    return folder


def parse(*argv):
    return parse_options(GROUPS, "Judge.", list(map(str, argv)))


def options_of(place, **paths):
    flags = (word for name, path in paths.items() for word in (f"--{name}", place / path))
    return parse("--features", place / "features.pt", *flags)


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
    judge = evaluator.Judge(options_of(place, **paths))
    assert extracted == []
    judge.prepare()
    assert extracted == read
    assert judge.train.about["images"] == str(place / paths.get("train_dir", "real"))
    if "held_out" in paths:
        assert judge.held_out.about["images"] == str(place / paths["held_out"])
    else:
        assert judge.held_out is None


def test_several_sets_of_samples_are_judged_by_one_reference(place, tmp_path, extracted):
    judge = evaluator.Judge(options_of(place, reference="real", samples="fakes"))
    judge.prepare()
    reports = [judge.judge(judge.open_samples(str(place / name)), str(tmp_path)) for name in ("fakes", "real")]
    assert extracted == ["--reference", "--samples", "--samples"]
    assert reports[0]["metrics"]["fid"]["value"] > reports[1]["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "report.json").read_text()) == reports[1]


def test_what_was_asked_is_noted(place, tmp_path):
    judge = evaluator.Judge(options_of(place, reference="real", samples="fakes"))
    judge.prepare()
    report = judge.judge(judge.open_samples(str(place / "fakes")), str(tmp_path), {"steps": 3})
    assert report["asked"] == {"steps": 3}


# How the samples were made


REQUEST = {"model_path": "/runs/a/ema_0.99_000100.pt", "sampler": "heun", "steps": 10, "seed": 3}


@pytest.mark.parametrize("name", ["samples_50x8x8x3.npz", "samples"])
def test_what_image_sample_wrote_is_described_beside_it(name, tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(REQUEST))
    assert evaluator.made_by(str(tmp_path / name)) == {**REQUEST, "average": "0.99", "evaluations": 19}


@pytest.mark.parametrize("name", ["mine.npz", "samples.zip", "samples_old.npz", "fakes"])
def test_other_files_beside_a_description_are_not_what_it_is_of(name, tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(REQUEST))
    assert evaluator.made_by(str(tmp_path / name)) is None


@pytest.mark.parametrize("wrong", ["{", "3", "[1]", "null"])
def test_a_description_that_is_damaged_is_named(wrong, tmp_path):
    assert evaluator.made_by(str(tmp_path / "samples")) is None
    (tmp_path / "samples.json").write_text(wrong)
    with pytest.raises(UserError, match=r"samples\.json is damaged: remove it, if how the samples were made"):
        evaluator.made_by(str(tmp_path / "samples"))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"model_path": "a/ema_0.9999_000100.pt"}, {"average": "0.9999"}),
        ({"model_path": "a/ema_posthoc_0.15_000100.pt"}, {"average": "posthoc_0.15"}),
        ({"model_path": "a/model000100.pt"}, {"average": "none: the model itself"}),
        ({"model_path": "a/mine.pt"}, {}),
        ({"sampler": "ddim", "steps": 25}, {"evaluations": 25}),
        ({"sampler": "plms", "steps": 25}, {"evaluations": 26}),
        ({"sampler": "another", "steps": 25}, {}),
        ({"sampler": "ddim", "steps": "25"}, {}),
        ({}, {}),
    ],
)
def test_what_a_request_implies(request_, expected):
    assert evaluator.implied_by(request_) == expected


# What the options mean


def test_a_report_goes_beside_the_samples(tmp_path):
    (tmp_path / "v1.5").mkdir()
    for path, expected in (("v1.5", "v1.5_report"), ("v1.5/", "v1.5_report"), ("a.npz", "a_report"),
                           ("v1.5/a.zip", "v1.5/a_report")):  # fmt: skip
        assert evaluator.report_folder(f"{tmp_path}/{path}") == f"{tmp_path}/{expected}"


def test_samples_behind_a_url_are_reported_here(monkeypatch):
    monkeypatch.setattr(files, "is_dir", lambda path: not path.endswith(".npz"))
    for path in ("gs://bucket/a/samples/", "gs://bucket/a/samples.npz"):
        assert evaluator.report_folder(path) == "runs/samples_report"
    beside = {"gs://bucket/a/samples.json": json.dumps(REQUEST).encode()}
    monkeypatch.setattr(files, "exists", beside.__contains__)
    monkeypatch.setattr(files, "read_bytes", beside.__getitem__)
    assert evaluator.made_by("gs://bucket/a/samples/")["average"] == "0.99"


def test_real_images_are_prepared_as_the_models_training_did():
    for model, given, expected in (
        (dict(image_size=8, channels=3), [], ("8", True)),
        (dict(image_size="8x12", channels=1), [], ("8x12", False)),
        (dict(image_size=8, channels=3), ["--resize", 16], ("16", True)),
        (dict(image_size=8, channels=1), ["--colour", True], ("8", True)),
    ):
        options = parse(*given)
        evaluator.settle_for(options, Namespace(**model))
        assert (options.resize, options.colour) == expected


@pytest.mark.parametrize(
    ("given", "channels", "message"),
    [
        (["--num_samples", 39], 3, "--num_samples 39: at least 40 are needed"),
        (["--print_steps"], 3, "--print_steps draws nothing"),
        ([], 4, r"draws an alpha channel \(--channels 4\)"),
    ],
)
def test_samples_that_could_not_be_judged_are_not_drawn(given, channels, message):
    with pytest.raises(UserError, match=message):
        evaluator.settle_for(parse(*given), Namespace(image_size=8, channels=channels))


def test_samples_are_either_given_or_drawn():
    evaluator.check_options(parse("--samples", "a", "--num_samples", 50, "--out_dir", "b", "--resize", 8))
    evaluator.check_options(parse("--model_path", "a", "--steps", 5, "--seed", 3))
    for argv in ([], ["--samples", "a", "--model_path", "b"]):
        with pytest.raises(UserError, match=r"give --samples, .*, or --model_path, .*: one of the two"):
            evaluator.check_options(parse(*argv))
    with pytest.raises(UserError, match="--seed is for drawing samples, and --samples a are drawn already"):
        evaluator.check_options(parse("--samples", "a", "--seed", 3))


def test_a_network_is_tried_on_what_the_model_will_draw(place, monkeypatch):
    options = options_of(place, reference="real", model_path="a.pt")
    evaluator.settle_for(options, Namespace(image_size=8, channels=3))
    judge = evaluator.Judge(options)
    seen, plain = [], evaluator.FeatureNetwork.__call__
    monkeypatch.setattr(
        evaluator.FeatureNetwork,
        "__call__",
        lambda *args, **kwargs: (seen.append(args[1].shape), plain(*args, **kwargs))[1],
    )
    judge.expect_drawn()
    assert seen == [(3, 8, 8, 3), (1, 8, 8, 3), (2, 8, 8, 3)]


def test_options_of_judging_have_values_that_can_be():
    for argv, message in (
        (["--feature_batch", 0], "--feature_batch 0 must be at least 1"),
        (["--feature_size", "0"], "--feature_size 0 must be auto, native, or a number of pixels such as 299"),
        (["--feature_size", "-3"], "--feature_size -3 must be"),
        (["--resize", "8x8x8"], "--resize '8x8x8': expected a size such as 64, or 48x64 for height x width"),
        (["--resize", "0"], "--resize '0': expected a size"),
    ):
        with pytest.raises(UserError, match=message):
            parse(*argv)
    assert np.all([parse("--feature_size", size).feature_size == size for size in ("auto", "native", "299")])
