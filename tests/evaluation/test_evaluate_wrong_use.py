"""Each wrong use of evaluate.py ends in one message that names the culprit and the remedy, before anything is
written."""

import json
import os
import shutil

import numpy as np
import pytest
import torch as th
from feature_helpers import trusted, write_script
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, contents, cut, limited, python, refused, run, write_images


class NotANumber(th.nn.Module):
    def forward(self, x):
        return x.float().flatten(1)[:, :6] / 0


class Positions(th.nn.Module):
    def forward(self, x):
        return x.float()


class OneNumber(th.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=[1, 2, 3])


class FourChannels(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.conv(x.float()).mean(dim=[2, 3])


class Place:
    """Images of several forms, features, statistics, and a model of 8x8."""

    def __init__(self, folder):
        self.folder = folder
        self.real = write_images(folder / "real", 60, size=(8, 8))
        self.samples = write_images(folder / "fakes", 50, size=(8, 8), seed=2)
        self.grey = write_images(folder / "grey", 50, size=(8, 8), channels=1)
        self.large = write_images(folder / "large", 50, size=(12, 12))
        self.features = write_script(folder / "features.pt")
        self.run = folder / "run"
        train = ["--data_dir", self.real, "--batch_size", 4, "--max_steps", 1]
        call("image_train", *TINY_IMAGE, *train, "--out_dir", self.run, cwd=folder).succeed()
        self.model = self.run / "ema_0.9999_000000.pt"
        self.large_reference = self.reference("large.npz", self.large)
        self.real_images = ["--reference", self.real, "--features", self.features]
        self.given = ["--samples", self.samples, *self.real_images]
        self.drawing = ["--model_path", self.model, "--num_samples", 40, "--steps", 2, *self.real_images]

    def reference(self, name, images):
        args = ["reference", "--images", images, "--features", self.features, "--out", name]
        call("evaluate", *args, cwd=self.folder).succeed()
        return self.folder / name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def place(prepared):
    """The prepared folder; afterwards it is as it was, and has no reports."""
    before = contents(prepared.folder)
    yield prepared
    assert contents(prepared.folder) == before


@pytest.fixture
def evaluate(tmp_path):
    """evaluate.py in a folder of its own; a run that is refused has written nothing there."""

    def do(*args):
        before = contents(tmp_path)
        result = call("evaluate", *args, cwd=tmp_path)
        assert contents(tmp_path) == before and not (tmp_path / "runs").exists()
        assert not list(tmp_path.rglob("log.txt"))
        return result

    return do


# What is missing, and what contradicts


def test_what_is_missing_is_named(place, evaluate):
    refused(
        evaluate("--samples", place.samples, "--reference", place.real), "--features is missing", ".pt2", "inception"
    )
    refused(
        evaluate("--samples", place.samples, "--features", place.features), "--reference is missing: name real images"
    )
    both = "give --samples, to evaluate those, or --model_path, to draw them first: one of the two"
    refused(evaluate(*place.real_images), both)
    refused(evaluate("--samples", place.samples, *place.drawing), both)
    refused(evaluate("score", *place.given, "--features", "nowhere.pt"), "--features nowhere.pt does not exist")
    refused(evaluate(*place.given, "--logits", "nowhere.pt"), "--logits nowhere.pt does not exist")
    refused(evaluate("--samples", "nowhere", *place.real_images), "--samples nowhere does not exist")
    refused(evaluate(*place.given, "--reference", "nowhere.npz"), "--reference nowhere.npz does not exist")
    refused(evaluate(*place.given, "--held_out", "nowhere"), "--held_out nowhere does not exist")
    refused(evaluate("--model_path", "nowhere.pt", *place.real_images), "--model_path nowhere.pt does not exist")


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", 3],
        ["--guidance_scale=2"],
        ["--classes", "cat"],
        ["--save_steps", 2],
        ["--print_steps"],
        ["--seed", 1],
        ["--image_size", 8],
        ["--preset", "cifar10-vlb"],
    ],
)
def test_flags_of_drawing_for_samples_that_are_there(flags, place, evaluate):
    name = flags[0].partition("=")[0]
    result = evaluate(*place.given, *flags)
    refused(result, f"{name} is for drawing samples, but --samples {place.samples} are given: leave it out")


def test_a_command_or_a_flag_that_is_misspelt(place, evaluate):
    refused(evaluate("scroe", *place.given), "unknown command 'scroe': did you mean score?")
    refused(
        evaluate("--sampels", place.samples, *place.real_images), "unknown flag '--sampels': did you mean --samples?"
    )
    refused(evaluate("sweep", "--step", "2,4", *place.drawing), "unknown flag '--step': did you mean --steps?")
    refused(evaluate("compare", "a", "b", "--features", "c"), "unknown flag '--features'")
    refused(evaluate(), "the command comes first: evaluate.py with one of score, reference, sweep, compare")
    refused(evaluate("score", place.samples), f"unexpected argument '{place.samples}': every option is a flag")


def test_values_that_no_option_can_have(place, evaluate):
    refused(evaluate(*place.given, "--feature_batch", 0), "--feature_batch 0 must be at least 1")
    refused(evaluate(*place.given, "--feature_size", "big"), "--feature_size big must be auto, native, or a number")
    refused(evaluate(*place.given, "--resize", "big"), "--resize 'big': expected a size such as 64, or 48x64")
    refused(evaluate(*place.given, "--out_dir", "gs://bucket/a"), "--out_dir gs://bucket/a must be a local folder")


def test_numbers_of_samples_that_cannot_be(place, evaluate):
    refused(evaluate(*place.given, "--num_samples", 39), "--num_samples 39: at least 40 are needed")
    refused(evaluate(*place.given, "--num_samples", 51), f"--num_samples 51: --samples {place.samples} has 50 images")
    refused(evaluate(*place.given, "--num_samples", 0), "--num_samples 0 must be at least 1")
    refused(evaluate(*place.drawing, "--num_samples", 39), "--num_samples 39: at least 40 are needed")


def test_held_out_images_need_training_images_that_are_others(place, evaluate):
    result = evaluate(*place.given, "--held_out", f"{place.real}/")
    refused(result, "is the same as --reference: give images that the model was not trained on")
    result = evaluate(*place.given, "--held_out", place.grey, "--train_dir", place.grey)
    refused(result, f"--held_out {place.grey} is the same as --train_dir")


# Images


@pytest.mark.parametrize("flag", ["--samples", "--reference", "--train_dir", "--held_out"])
def test_too_few_images(flag, place, evaluate, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(evaluate(*place.given, flag, "empty"), f"{flag} empty holds no images", "it is empty")
    write_images(tmp_path / "one", 1, size=(8, 8))
    refused(evaluate(*place.given, flag, "one"), f"{flag} one has 1 image: at least 40 are needed")


def test_images_of_another_form_than_the_reference(place, evaluate):
    for flag in ("--samples", "--train_dir", "--held_out"):
        result = evaluate(*place.given, flag, place.large)
        refused(result, flag, "images of 12x12", f"--reference {place.real} 8x8", "give --resize 12x12 to resize")
        result = evaluate(*place.given, flag, place.grey)
        refused(
            result,
            flag,
            "1 channel",
            f"--reference {place.real} 3",
            "convert one of them, or give --colour True to treat grey images as RGB",
        )
    result = evaluate(*place.given, "--reference", place.large_reference)
    refused(result, "images of 8x8", "12x12", "and write the reference again with the command evaluate reference")


def test_a_corrupt_image_is_named(place, tmp_path):
    folder = shutil.copytree(place.samples, tmp_path / "corrupt")
    cut(folder / "cat_20.png")
    for flags in (place.given + ["--samples", folder], place.given + ["--reference", folder]):
        refused(
            call("evaluate", *flags, "--out_dir", "out", cwd=tmp_path), folder / "cat_20.png", "not a readable image"
        )
        assert set(contents(tmp_path / "out")) == set()


@pytest.mark.parametrize("mode", ["pad", "stretch", "random_crop"])
def test_a_way_of_resizing_needs_a_size(mode, place, evaluate):
    refused(
        evaluate(*place.given, "--resize_mode", mode), f"--resize_mode {mode}", "give --resize, such as --resize 64"
    )


def test_images_of_several_sizes(place, tmp_path):
    folder = shutil.copytree(place.samples, tmp_path / "mixed")
    write_images(folder, 1, size=(9, 8), classes=["zebra"])
    result = call("evaluate", *place.given, "--samples", folder, "--out_dir", "out", cwd=tmp_path)
    refused(result, folder / "zebra_00.png", "is 9x8, but the first image of --samples", "is 8x8: give --resize")


def test_images_with_an_alpha_channel_are_evaluated_on_their_background(place, tmp_path):
    folder = write_images(tmp_path / "alpha", 50, size=(8, 8), channels=4)
    call("evaluate", *place.given, "--samples", folder, "--out_dir", "out", cwd=tmp_path).succeed()


def test_files_that_are_cut_off(place, evaluate, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((50, 8, 8, 3), np.uint8))
    shutil.copy(place.large_reference, tmp_path / "statistics.npz")
    for name in ("images.npz", "statistics.npz"):
        cut(tmp_path / name)
        for flag in ("--samples", "--reference"):
            refused(evaluate(*place.given, flag, name), f"{name} is not a readable npz")
    shutil.copy(place.features, tmp_path / "features.pt")
    cut(tmp_path / "features.pt")
    trusted(tmp_path / "features.pt")
    refused(evaluate(*place.given, "--features", "features.pt"), "--features features.pt", "cut off")


def test_a_damaged_description_of_samples(place, evaluate, tmp_path):
    shutil.copytree(place.samples, tmp_path / "drawn/samples")
    (tmp_path / "drawn/samples.json").write_text('{"model_path": ')
    result = evaluate(*place.given, "--samples", "drawn/samples")
    refused(result, tmp_path / "drawn/samples.json", "is damaged: remove it, if the report need not say")


# Statistics


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "has no sigma: statistics are both mu [D] and sigma [D, D]"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "has a mu that is not of finite real numbers"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, "has mu of (6,) and sigma of (5, 5): expected [D] and [D, D]"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "has 7 features"),
        ({"other": np.zeros(3)}, "has neither mu and sigma, of features, nor arr_0, of images"),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_statistics_that_cannot_be_used(drawn, arrays, message, place, evaluate, tmp_path):
    np.savez(tmp_path / "ref.npz", **arrays)
    flags = place.drawing if drawn else place.given
    refused(evaluate(*flags, "--reference", "ref.npz"), "--reference", "ref.npz", message)


def test_statistics_of_objects_or_of_another_network(place, evaluate, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.array([{}], object), sigma=np.eye(6))
    refused(evaluate(*place.given, "--reference", "ref.npz"), "ref.npz holds Python objects, which could run code")
    other = write_script(tmp_path / "other.pt", seed=1)
    result = evaluate(*place.given, "--reference", place.large_reference, "--resize", 12, "--features", other)
    refused(result, "was made with the features features.pt", "not other.pt", "give the same --features, or write it")


def test_a_reference_is_written_to_an_npz(place, evaluate, tmp_path):
    args = ["reference", "--images", place.real, "--features", place.features]
    refused(evaluate(*args), "--out is missing: name an npz to write, such as reference.npz")
    refused(evaluate(*args, "--out", "reference"), "--out reference: name an npz to write")
    (tmp_path / "file").write_text("in the way")
    refused(
        evaluate(*args, "--out", "file/reference.npz"), "--out file/reference.npz: no file can be written into file"
    )
    refused(evaluate("reference", "--features", place.features, "--out", "a.npz"), "--images is missing")
    refused(evaluate("reference", "--images", place.real, "--out", "a.npz"), "--features is missing")


# Networks


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NotANumber, "gives features that are not finite numbers"),
        (Positions, "gives features of (3, 3, 8, 8) for 3 images: expected [3, D]"),
        (OneNumber, "gives a tensor of (3,) as features of 3 images: expected [3, D], one row for each"),
        (FourChannels, "cannot take uint8 images of (3, 3, 8, 8)"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is on its way out
def test_a_network_that_does_not_fit_is_found_before_anything_is_drawn(module, message, place, evaluate, tmp_path):
    th.jit.script(module().eval()).save(str(tmp_path / "network.pt"))
    trusted(tmp_path / "network.pt")
    for flags in (place.given, place.drawing, ["sweep", *place.drawing, "--steps", "2,4"]):
        refused(evaluate(*flags, "--features", "network.pt"), "--features network.pt", message)


def test_weights_alone_are_no_network(place, evaluate, tmp_path):
    trusted(place.model)
    refused(evaluate(*place.given, "--features", place.model), "--features", "a state dict alone does not say how")
    (tmp_path / "text.pt").write_text("weights")
    refused(evaluate(*place.given, "--features", "text.pt"), "neither an exported program (.pt2) nor TorchScript (.pt)")


# Models


def test_models_whose_samples_do_not_suit_the_reference(place, evaluate, tmp_path):
    data = write_images(tmp_path / "data", 4, size=(8, 8), channels=1)
    args = [*TINY_IMAGE, "--data_dir", data, "--channels", 1, "--batch_size", 4, "--max_steps", 1]
    call("image_train", *args, "--out_dir", "run", cwd=tmp_path).succeed()
    os.unlink(tmp_path / "run/log.txt")
    grey = "run/model000000.pt"
    for command in (["score"], ["sweep", "--sampler", "ddim,heun"]):
        result = evaluate(*command, *place.drawing, "--model_path", grey)
        refused(result, f"--model_path {grey} has 1 channel, --reference {place.real} 3: convert one of them")
    result = evaluate(*place.drawing, "--reference", place.large_reference)
    refused(result, f"--model_path {place.model} has images of 8x8", "12x12", "write the reference again")


def test_a_model_of_another_kind(place, evaluate, tmp_path):
    args = ["--data_dir", place.large, "--batch_size", 4, "--max_steps", 1, "--out_dir", "run"]
    call("super_res_train", *TINY_SUPER_RES, *args, cwd=tmp_path).succeed()
    os.unlink(tmp_path / "run/log.txt")
    refused(evaluate(*place.drawing, "--model_path", "run/model000000.pt"), "run/model000000.pt", "super-resolution")


def test_printing_the_steps_draws_no_samples_to_evaluate(place, evaluate):
    result = evaluate(*place.drawing, "--print_steps")
    refused(result, "--print_steps draws no samples to evaluate: give it to the sample command")


# Sweeps


def test_a_sweep_needs_lists_and_a_model(place, evaluate):
    for flags in (place.drawing, [*place.drawing, "--steps", "2,2"]):
        refused(evaluate("sweep", *flags), "a sweep needs several values, such as --steps 10,20")
    result = evaluate("sweep", *place.given, "--steps", "2,4")
    refused(result, f"--samples {place.samples}: a sweep draws its samples: give --model_path")
    refused(evaluate("sweep", *place.real_images, "--steps", "2,4"), "--model_path is missing")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "2,4,x"], "--steps 'x'"),
        (["--steps", "2,4,21"], "--steps 21"),
        (["--steps", ","], "--steps ','"),
        (["--steps", "--seed", "1"], "--steps: expected one argument"),
        (["--sampler", "ddim,hern"], "unknown --sampler 'hern': did you mean heun?"),
        (["--churn", "0,1"], "--churn 1.0 is for --sampler euler or heun"),
        (["--guidance_scale", "1,2"], "guidance_scale 2.0"),
        (["--steps", "2,4", "--print_steps"], "--print_steps draws no samples"),
        (["--steps", "2,4", "--num_samples", "39"], "--num_samples 39: at least 40"),
        (["--ema", "0.9999,0.5"], "does not exist; that step has ema_0.9999_000000.pt"),
    ],
)
def test_a_combination_that_cannot_be_is_found_before_the_first_is_drawn(flags, message, place, evaluate):
    refused(evaluate("sweep", *place.drawing, *flags), message)


def test_averages_lie_beside_a_checkpoint_of_a_step(place, evaluate, tmp_path):
    shutil.copy(place.model, tmp_path / "mine.pt")
    result = evaluate("sweep", *place.drawing, "--model_path", "mine.pt", "--ema", "0.5,0.9999")
    refused(result, "--ema 0.5 needs a --model_path such as runs/NAME/model010000.pt")


# Reports side by side


def test_reports_that_are_missing_or_damaged(place, evaluate, tmp_path):
    call("evaluate", *place.given, "--out_dir", "a", cwd=tmp_path).succeed()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in tmp_path.rglob("log.txt"):
        path.unlink()
    refused(evaluate("compare"), "name two reports or more")
    refused(evaluate("compare", "a"), "name two reports or more")
    refused(evaluate("compare", "a", "nowhere"), "nowhere does not exist: name a folder with a report")
    refused(evaluate("compare", "a", place.samples), f"{place.samples}/report.json does not exist")
    report = json.loads((tmp_path / "b/report.json").read_text())
    for wrong in ("{", "[]", json.dumps({"metrics": {}}), json.dumps({**report, "metrics": {"fid": 3}}), "\udcff"):
        (tmp_path / "b/report.json").write_bytes(wrong.encode(errors="surrogateescape"))
        result = evaluate("compare", "a", "b", "--out_dir", "c")
        refused(result, "b/report.json is not a report of the evaluate command, or is damaged")
    (tmp_path / "b/report.json").write_text(json.dumps(report))
    cut(tmp_path / "b/report_samples.png")
    result = evaluate("compare", "a", "b", "--out_dir", "c")
    refused(result, "b/report_samples.png is damaged: remove it to compare without pictures, or write the report again")
    (tmp_path / "b/report_samples.png").unlink()
    call("evaluate", "compare", "a", "b", "--out_dir", "c", cwd=tmp_path).succeed()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["compare.md"]


# Where reports go


def test_a_folder_that_cannot_be_written_into(place, evaluate, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for flags in (place.given, place.drawing, ["sweep", *place.drawing, "--steps", "2,4"]):
        result = evaluate(*flags, "--out_dir", "file")
        refused(result, f"cannot make the folder {tmp_path / 'file'}", "choose another --out_dir")


def test_disk_full_while_the_report_is_written(place, tmp_path):
    args = [*place.given, "--out_dir", "out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    before = contents(tmp_path / "out")
    assert 2000 < len(before["report.json"]) < len(before["report_samples.png"])
    result = python("evaluate", *args, "--num_samples", 45, cwd=tmp_path, prefix=limited(2000))
    warnings, error = result.err.splitlines()[:-1], result.err.splitlines()[-1]
    assert result.code == 1 and "Traceback" not in result.err
    assert all(line.startswith(f"warning: cannot write {tmp_path / 'out/log.txt'}") for line in warnings)
    assert error.startswith(f"error: cannot write {tmp_path / 'out/report_samples.png'}") and "free some space" in error
    assert contents(tmp_path / "out") == before


def test_wrong_use_on_two_ranks_is_one_error(place, tmp_path):
    folder = shutil.copytree(place.samples, tmp_path / "corrupt")
    cut(folder / "dog_49.png")
    args = [*place.given, "--samples", folder, "--feature_batch", 10, "--out_dir", "out"]
    result = run("mpiexec", 2, "evaluate", *args, cwd=tmp_path)
    assert result.code == 1 and "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if "error: " in line]
    assert len(errors) == 1 and str(folder / "dog_49.png") in errors[0]


def test_a_reference_does_not_overwrite_images(place, evaluate, tmp_path):
    np.savez(tmp_path / "images.npz", np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    before = (tmp_path / "images.npz").read_bytes()
    args = ["reference", "--images", "images.npz", "--features", place.features, "--out", "images.npz"]
    refused(evaluate(*args), "--out images.npz exists and is not a reference: name another file")
    assert (tmp_path / "images.npz").read_bytes() == before


def test_a_report_is_not_written_among_the_images(place, evaluate):
    for out in (place.samples, place.samples / "report"):
        refused(evaluate(*place.given, "--out_dir", out), f"--out_dir {out} is in {place.samples}, whose images")


def test_held_out_images_that_were_trained_on(place, tmp_path):
    shutil.copytree(place.real, tmp_path / "copy")
    result = call("evaluate", *place.given, "--held_out", "copy", "--out_dir", "out", cwd=tmp_path)
    refused(result, "of the images of --held_out", "are also in --reference", "was not trained on")


def test_sizes_beyond_memory(place, evaluate):
    refused(evaluate(*place.given, "--resize", "200000"), "--resize 200000 must be at most 9999 pixels a side")
    for size in ("100000", "\u00b2", "\u0663"):
        refused(evaluate(*place.given, "--feature_size", size), f"--feature_size {size} must be auto, native")
    refused(evaluate(*place.drawing, "--seed", 2**70), "must be at most 4611686018427387903")


def test_a_sweep_does_not_overwrite_another(place, evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep.json").write_text('[{"chosen": {"sampler": "ddim"}}]')
    result = evaluate("sweep", *place.drawing, "--steps", "2,3", "--out_dir", "out")
    refused(result, "out holds a sweep of --sampler, not of --steps: choose another --out_dir")
    (tmp_path / "out/sweep.json").unlink()
    (tmp_path / "out/steps3").write_text("in the way")
    result = evaluate("sweep", *place.drawing, "--steps", "2,3", "--out_dir", "out")
    refused(result, "steps3 must be a folder, for samples")
    assert not (tmp_path / "out/steps2").exists()
