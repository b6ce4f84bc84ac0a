"""Each wrong use ends in one message that names the culprit and the remedy, with a non-zero code, and leaves older
files whole."""

import json
import os
import pickle
import shutil
import signal
import sys

import numpy as np
import pytest
import torch as th
from script_helpers import (
    TINY_IMAGE,
    TINY_SUPER_RES,
    call,
    contents,
    cut,
    limited,
    python,
    refused,
    run,
    start,
    started_by,
    wait,
    wait_for,
    write_images,
)

# Runs the rest of its command line where no file can grow beyond so many bytes, as on a disk that is full.


class Place:
    """A folder with images, a finished training run (steps 0 and 2) and its samples."""

    def __init__(self, folder):
        self.folder = folder
        self.data = write_images(folder / "data", 16)
        self.run = folder / "run"
        self.model = self.run / "ema_0.9999_000002.pt"
        self.training = [
            *TINY_IMAGE, "--data_dir", self.data, "--class_cond", "True", "--batch_size", 4, "--save_interval", 2,
            "--log_interval", 1,
        ]  # fmt: skip
        call("image_train", *self.training, "--max_steps", 3, "--out_dir", self.run, cwd=folder).succeed()
        self.samples = folder / "samples"
        self.sampling = ["--model_path", self.model, "--out_dir", self.samples]
        call("image_sample", *self.sampling, "--num_samples", 2, cwd=folder).succeed()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def large_model(prepared):
    """A class-conditional super-resolution model, 8 -> 16."""
    out_dir = prepared.folder / "large"
    args = ["--data_dir", prepared.data, "--class_cond", "True", "--batch_size", 4, "--max_steps", 1]
    call("super_res_train", *TINY_SUPER_RES, *args, "--out_dir", out_dir, cwd=prepared.folder).succeed()
    return out_dir / "ema_0.9999_000000.pt"


@pytest.fixture
def place(prepared, large_model):
    """The prepared folder; every file in it is afterwards as it was."""
    before = contents(prepared.folder)
    yield prepared
    after = contents(prepared.folder)
    assert {name: content for name, content in after.items() if name in before} == before


@pytest.fixture
def own_run(prepared, tmp_path):
    """A copy of the training run, to be damaged."""
    shutil.copytree(prepared.run, tmp_path / "run")
    return tmp_path / "run"


# What is given as images


def test_missing_folder(place, tmp_path):
    result = python("image_train", *TINY_IMAGE, "--data_dir", "nowhere", cwd=tmp_path)
    refused(result, "--data_dir nowhere does not exist")


def test_no_folder_at_all(place, tmp_path):
    refused(call("image_train", *TINY_IMAGE, cwd=tmp_path), "--data_dir is missing", "a folder of images")
    result = call("super_res_sample", "--model_path", place.folder / "large/model000000.pt", cwd=tmp_path)
    refused(result, "--base_samples is missing")


def test_empty_folder(place, tmp_path):
    (tmp_path / "empty").mkdir()
    result = call("image_train", *TINY_IMAGE, "--data_dir", "empty", cwd=tmp_path)
    refused(result, "--data_dir empty holds no images", ".png")


def test_folder_of_text_files(place, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("not an image")
    refused(call("image_train", *TINY_IMAGE, "--data_dir", "notes", cwd=tmp_path), "--data_dir notes holds no images")


def test_text_files_that_are_called_images(place, tmp_path):
    (tmp_path / "notes").mkdir()
    for i in range(5):
        (tmp_path / "notes" / f"a_{i}.png").write_text("not an image")
    result = call("image_train", *TINY_IMAGE, "--data_dir", "notes", cwd=tmp_path)
    refused(result, "5 of 5 images are unreadable", "notes/a_0.png", "repair or remove them")


def test_one_corrupt_image_among_a_hundred_is_skipped_and_named(place, tmp_path):
    folder = write_images(tmp_path / "many", 120)
    cut(folder / "cat_50.png")
    args = ["--data_dir", folder, "--batch_size", 40, "--max_steps", 6, "--out_dir", "run"]
    result = call("image_train", *TINY_IMAGE, *args, cwd=tmp_path).succeed()
    assert f"warning: {folder / 'cat_50.png'} is unreadable and left out" in result.out
    assert "119 images" in result.out


def test_many_corrupt_images_stop_a_run(place, tmp_path):
    folder = write_images(tmp_path / "few", 20)
    damaged = sorted(folder.iterdir())[:6]
    for path in damaged:
        cut(path)
    result = call("image_train", *TINY_IMAGE, "--data_dir", folder, "--max_steps", 1, cwd=tmp_path)
    refused(result, "6 of 20 images are unreadable", damaged[0], "repair or remove")


def test_one_corrupt_image_stops_an_evaluation(place, tmp_path):
    folder = write_images(tmp_path / "few", 3)
    cut(folder / "cat_02.png")
    result = call("image_nll", "--model_path", place.model, "--data_dir", folder, cwd=tmp_path)
    refused(result, folder / "cat_02.png", "is not a readable image")


def test_batch_larger_than_the_data(place, tmp_path):
    args = ["--data_dir", place.data, "--batch_size", 17]
    result = call("image_train", *TINY_IMAGE, *args, cwd=tmp_path)
    refused(result, "--batch_size 17", "16 images", "lower it")


def test_npz_of_objects(place, tmp_path):
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}, {"b": 2}], dtype=object))
    result = call("image_train", *TINY_IMAGE, "--data_dir", "objects.npz", cwd=tmp_path)
    refused(result, "objects.npz holds Python objects, which could run code", "save it again as numbers")
    base = ["--model_path", place.folder / "large/model000000.pt", "--base_samples", "objects.npz"]
    refused(call("super_res_sample", *base, cwd=tmp_path), "objects.npz holds Python objects")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((2, 8, 8, 3))], "arr_0 of float64 (2, 8, 8, 3): expected arr_0 of uint8"),
        ([np.zeros((2, 3, 8, 8), np.uint8)], "(2, 3, 8, 8): the last number must be 1 to 4 channels"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, int)], "expected an integer for each of 2 images"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array([0, -1])], "must not be negative, found -1"),
    ],
)
def test_npz_of_another_form(arrays, message, place, tmp_path):
    np.savez(tmp_path / "images.npz", *arrays)
    args = ["--data_dir", "images.npz", "--class_cond", "True"]
    refused(call("image_train", *TINY_IMAGE, *args, cwd=tmp_path), "images.npz", message)


def test_wrong_channels(place, tmp_path):
    args = ["--data_dir", place.data, "--channels", 1, "--max_steps", 1]
    result = call("image_train", *TINY_IMAGE, *args, cwd=tmp_path)
    refused(result, place.data / "cat_00.png", "has 3 channels (RGB)", "--channels 1", "give --channels 3")


def test_wrong_channels_of_an_npz(place, tmp_path):
    np.savez(tmp_path / "images.npz", np.full((2, 8, 8, 3), (200, 30, 30), np.uint8))
    args = ["--data_dir", "images.npz", "--channels", 1, "--max_steps", 1]
    refused(call("image_train", *TINY_IMAGE, *args, cwd=tmp_path), "images.npz[0] has 3 channels", "give --channels 3")


def test_base_samples_of_another_size(place, tmp_path):
    np.savez(tmp_path / "base.npz", np.zeros((2, 12, 12, 3), np.uint8), np.arange(2))
    args = ["--model_path", place.folder / "large/model000000.pt", "--base_samples", "base.npz"]
    refused(call("super_res_sample", *args, cwd=tmp_path), "base.npz has images of 12x12", "--small_size is 8")


@pytest.fixture
def enlarging(place, tmp_path):
    """The flags that enlarge two images of 8x8 to 16x16; a run that is refused must have drawn nothing."""
    np.savez(tmp_path / "base.npz", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2))
    yield ["--model_path", place.folder / "large/model000000.pt", "--base_samples", "base.npz", "--out_dir", "out"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "messages"),
    [
        ((3, 16, 16, 3), ["has 3 images, but --base_samples base.npz has 2", "the true image of each"]),
        ((2, 20, 20, 3), ["has images of 20x20, but the model's --large_size is 16", "a folder of images"]),
    ],
)
def test_references_of_another_form(shape, messages, enlarging, tmp_path):
    np.savez(tmp_path / "true.npz", np.zeros(shape, np.uint8))
    result = call("super_res_sample", *enlarging, "--reference", "true.npz", "--num_samples", 1, cwd=tmp_path)
    refused(result, "--reference true.npz", *messages)


def test_references_that_are_not_there_or_too_small(enlarging, tmp_path):
    result = call("super_res_sample", *enlarging, "--reference", "nowhere", cwd=tmp_path)
    refused(result, "--reference nowhere does not exist")
    write_images(tmp_path / "small", 2, size=(40, 12))
    result = call("super_res_sample", *enlarging, "--reference", "small", cwd=tmp_path)
    refused(result, "--reference small has images of 40x12, smaller than --large_size 16: give larger ones")


def test_coloured_references_of_a_grey_model(place, tmp_path):
    grey = ["--data_dir", write_images(tmp_path / "grey", 4, channels=1), "--channels", 1, "--max_steps", 1]
    call("super_res_train", *TINY_SUPER_RES, *grey, "--batch_size", 4, "--out_dir", "run", cwd=tmp_path).succeed()
    args = ["--model_path", "run/model000000.pt", "--base_samples", "grey", "--reference", place.data]
    result = call("super_res_sample", *args, "--out_dir", "out", cwd=tmp_path)
    refused(result, place.data / "cat_00.png", "has 3 channels (RGB)", "--channels 1", "convert the images")
    assert not (tmp_path / "out").exists()


def test_references_without_torchmetrics(enlarging, tmp_path, monkeypatch):
    write_images(tmp_path / "true", 2)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    result = call("super_res_sample", *enlarging, "--reference", "true", cwd=tmp_path)
    refused(result, "torchmetrics: pip install -e '.[eval]'")


# Flags


def test_unknown_flag(place, tmp_path):
    result = call("image_sample", "--model_path", place.model, "--num_sample", 3, cwd=tmp_path)
    refused(result, "unknown flag '--num_sample': did you mean --num_samples?")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size", "four"], "--batch_size 'four': "),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--class_cond", "maybe"], "--class_cond 'maybe': expected True or False"),
        (["--noise_schedule", "cosin"], "unknown --noise_schedule 'cosin': did you mean cosine?"),
        (["16"], "unexpected argument '16'"),
        (["--config", "missing.json"], "cannot read missing.json: No such file"),
        (["--num_channels", "48"], "--num_channels 48 must be a multiple of 32"),
        (["--lr", "-1"], "--lr -1.0 must be positive"),
        (["--diffusion_steps", "0"], "--diffusion_steps 0 must be at least 1"),
        (["--schedule_sampler", "loss-second"], "did you mean loss-second-moment?"),
    ],
)
def test_a_flag_with_a_wrong_value(args, message, place, tmp_path):
    refused(call("image_train", "--data_dir", place.data, *args, cwd=tmp_path), message)


def test_an_unknown_name_in_a_config_file(place, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps({"bach_size": 4}))
    result = call("image_train", "--config", "options.json", "--data_dir", place.data, cwd=tmp_path)
    refused(result, "unknown option in options.json 'bach_size': did you mean batch_size?")


def test_misspelt_preset(place, tmp_path):
    result = call("image_train", "--preset", "cifar10-hybird", "--data_dir", place.data, cwd=tmp_path)
    refused(result, "unknown --preset 'cifar10-hybird': did you mean cifar10-hybrid?")


def test_preset_of_the_other_kind_of_script(place, tmp_path):
    result = call("image_train", "--preset", "upsample64-256", "--data_dir", place.data, cwd=tmp_path)
    refused(result, "--preset upsample64-256 is for the super-resolution commands")


@pytest.mark.parametrize(("size", "message"), [("9", "--image_size 9 cannot be halved"), ("8x9", "--image_size 8x9")])
def test_size_not_divisible(size, message, place, tmp_path):
    args = ["--image_size", size, "--data_dir", place.data]
    refused(call("image_train", *TINY_IMAGE, *args, cwd=tmp_path), message, "use a multiple of 2")


def test_sizes_of_super_resolution_that_are_no_multiple(place, tmp_path):
    args = ["--large_size", 20, "--small_size", 8, "--data_dir", place.data]
    result = call("super_res_train", *TINY_SUPER_RES, *args, cwd=tmp_path)
    refused(result, "--large_size 20 must be a whole multiple of --small_size 8")


def test_no_samples(place, tmp_path):
    args = [*place.sampling, "--num_samples", 0]
    refused(call("image_sample", *args, cwd=tmp_path), "--num_samples 0 must be at least 1")
    nll = ["--model_path", place.model, "--data_dir", place.data, "--num_samples", 0]
    refused(call("image_nll", *nll, cwd=tmp_path), "--num_samples 0 must be at least 1")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (21, "--nll_timesteps 21 is more than the 20 timesteps"),
        (1, "--nll_timesteps 1 of 20"),
        (-1, "--nll_timesteps -1 must not be negative"),
    ],
)
def test_a_number_of_timesteps_that_gives_no_bound(count, message, place, tmp_path):
    args = ["--model_path", place.model, "--data_dir", place.data, "--nll_timesteps", count]
    refused(call("image_nll", *args, cwd=tmp_path), message)
    assert not (tmp_path / "runs").exists()


def test_a_pass_of_less_than_a_timestep(place, tmp_path):
    args = ["--model_path", place.model, "--data_dir", place.data, "--timesteps_per_pass", -1]
    refused(call("image_nll", *args, cwd=tmp_path), "--timesteps_per_pass -1 must not be negative")


def test_labels_out_of_range(place, tmp_path):
    args = [*place.sampling, "--num_samples", 3, "--classes"]
    refused(call("image_sample", *args, "99", cwd=tmp_path), "--classes 99: the model has the classes 0..1: cat, dog")
    refused(call("image_sample", *args, "cat,cow", cwd=tmp_path), "--classes cow: the model has the classes 0..1")
    refused(call("image_sample", *args, "-1", cwd=tmp_path), "--classes -1: the model has the classes 0..1")


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_in_base_samples(label, place, tmp_path):
    np.savez(tmp_path / "base.npz", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, label]))
    args = ["--model_path", place.folder / "large/model000000.pt", "--base_samples", "base.npz"]
    result = call("super_res_sample", *args, cwd=tmp_path)
    refused(result, f"base.npz has the label {label}, but the model has the classes 0..1", "--classes")


def test_labels_out_of_range_in_json(place, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({path.name: -1 for path in place.data.iterdir()}))
    result = call("image_train", *place.training, "--labels", "labels.json", cwd=tmp_path)
    refused(result, "labels.json", "must not be negative, found -1")
    (tmp_path / "labels.json").write_text(json.dumps({path.name: 7 for path in place.data.iterdir()}))
    args = [*place.training, "--labels", "labels.json", "--num_classes", 5]
    refused(
        call("image_train", *args, cwd=tmp_path), "labels.json are 7, which does not fit the 5 classes of --num_classes"
    )


def test_a_class_that_the_model_does_not_know(place, tmp_path):
    cows = write_images(tmp_path / "cows", 2, classes=("cow",))
    result = call("image_nll", "--model_path", place.model, "--data_dir", cows, cwd=tmp_path)
    refused(result, f"{cows} has the class cow, which {place.model} was not trained on")


def test_every_image_a_class_of_its_own(place, tmp_path):
    folder = write_images(tmp_path / "photos", 6, classes=("a", "b", "c", "d", "e", "f"))
    result = call("image_train", *TINY_IMAGE, "--data_dir", folder, "--class_cond", "True", cwd=tmp_path)
    refused(result, "each of the 6 images", "class_number.png", "--labels folder")


# Checkpoints


def test_model_flag_contradicting_the_checkpoint(place, tmp_path):
    args = ["--model_path", place.model, "--num_channels", 64]
    result = call("image_sample", *args, cwd=tmp_path)
    contradiction = f"--num_channels 64 contradicts {place.model}, which was trained with --num_channels 32"
    refused(result, contradiction, "leave the flag out")


@pytest.mark.parametrize(
    ("args", "there"),
    [
        (["--image_size", "16"], "--image_size 8"),
        (["--class_cond", "False"], "--class_cond True"),
        (["--noise_schedule", "sigmoid"], "--noise_schedule cosine"),
        (["--channel_mult", "1,2"], "--channel_mult 1,1"),
    ],
)
def test_flags_contradicting_the_checkpoint(args, there, place, tmp_path):
    refused(call("image_sample", "--model_path", place.model, *args, cwd=tmp_path), *args, f"trained with {there}")
    result = call("image_train", *place.training, *args, "--resume", "auto", "--out_dir", place.run, cwd=tmp_path)
    refused(result, *args, f"trained with {there}")


def test_a_checkpoint_of_the_other_kind_of_model(place, tmp_path):
    result = call("super_res_sample", "--model_path", place.model, "--base_samples", place.data, cwd=tmp_path)
    refused(result, f"{place.model} is an image model")
    result = call("image_sample", "--model_path", place.folder / "large/model000000.pt", cwd=tmp_path)
    refused(result, "large/model000000.pt is a super-resolution model")


def test_no_checkpoint(place, tmp_path):
    refused(call("image_sample", cwd=tmp_path), "--model_path is missing")
    gone = place.run / "ema_0.9999_000009.pt"
    refused(call("image_sample", "--model_path", gone, cwd=tmp_path), f"--model_path {gone} does not exist")


def test_truncated_checkpoint(place, own_run, tmp_path):
    cut(own_run / "ema_0.9999_000002.pt")
    result = call("image_sample", "--model_path", own_run / "ema_0.9999_000002.pt", cwd=tmp_path)
    refused(result, own_run / "ema_0.9999_000002.pt", "damaged, or not a checkpoint", "use another file")


def as_of_other_code(folder):
    """Take away what the published code does not write: there, nothing says what the files should be."""
    for path in [*folder.glob("manifest*.json"), folder / "config.json"]:
        path.unlink()


@pytest.mark.parametrize("part", ["model000002.pt", "ema_0.9999_000002.pt", "opt000002.pt"])
def test_resuming_from_a_truncated_file_of_other_code(part, place, own_run, tmp_path):
    as_of_other_code(own_run)
    cut(own_run / part)
    before = contents(own_run)
    result = call("image_train", *place.training, "--resume", "auto", "--out_dir", own_run, cwd=tmp_path)
    refused(result, own_run / part, "damaged, or not a checkpoint")
    assert contents(own_run) == before


@pytest.mark.parametrize("content", [b"", b"some text"])
def test_a_file_that_is_no_checkpoint(content, place, tmp_path):
    (tmp_path / "notes.pt").write_bytes(content)
    result = call("image_sample", "--model_path", "notes.pt", cwd=tmp_path)
    refused(result, f"cannot load notes.pt ({len(content)} bytes)", "not a checkpoint")


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(form, path, evidence):
    if form == "pickle":
        path.write_bytes(pickle.dumps({"weight": RunsCode(evidence)}))
    else:
        content = {"weight": th.zeros(2), "more": RunsCode(evidence)}
        th.save(content, path, _use_new_zipfile_serialization=form == "zip")


def test_the_hostile_pickle_would_run_code(tmp_path):
    write_pickle("zip", tmp_path / "hostile.pt", tmp_path / "executed")
    th.load(tmp_path / "hostile.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_pickle_that_would_execute_code(place, tmp_path):
    write_pickle("zip", tmp_path / "hostile.pt", tmp_path / "executed")
    result = call("image_sample", "--model_path", "hostile.pt", cwd=tmp_path)
    refused(result, "hostile.pt", "could run code", "not loaded")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickles_that_would_execute_code_wherever_a_file_is_loaded(form, place, own_run, tmp_path):
    write_pickle(form, tmp_path / "hostile.pt", tmp_path / "executed")
    hostile = ["--model_path", "hostile.pt"]
    for result in (
        call("image_sample", *hostile, cwd=tmp_path),
        call("image_nll", *hostile, "--data_dir", place.data, cwd=tmp_path),
        call("super_res_sample", *hostile, "--base_samples", place.data, cwd=tmp_path),
        call("image_train", *place.training, "--init_checkpoint", "hostile.pt", cwd=tmp_path),
    ):
        refused(result, "cannot load hostile.pt")
    as_of_other_code(own_run)
    shutil.copy(tmp_path / "hostile.pt", own_run / "opt000002.pt")
    result = call("image_train", *place.training, "--resume", "auto", "--out_dir", own_run, cwd=tmp_path)
    refused(result, own_run / "opt000002.pt")
    assert not (tmp_path / "executed").exists()


def test_missing_optimizer_file_on_resume(place, own_run, tmp_path):
    (own_run / "opt000002.pt").unlink()
    before = contents(own_run)
    args = [*place.training, "--max_steps", 6, "--out_dir", own_run, "--resume", own_run / "model000002.pt"]
    result = call("image_train", *args, cwd=tmp_path)
    refused(result, f"{own_run / 'opt000002.pt'} is missing", f"--resume {own_run} takes the newest")
    assert contents(own_run) == before
    as_of_other_code(own_run)
    result = call("image_train", *args, cwd=tmp_path)
    refused(result, f"the optimizer's state {own_run / 'opt000002.pt'} is missing", "use --init_checkpoint")


def test_resuming_where_no_set_is_complete_never_starts_afresh(place, own_run, tmp_path):
    args = [*place.training, "--max_steps", 6, "--out_dir", own_run]
    before = contents(own_run)
    result = call("image_train", *args, "--resume", "auto", "--ema_rate", "0.5", cwd=tmp_path)
    refused(result, "--resume auto", f"{own_run} holds model000002.pt", "ema_0.5", "--init_checkpoint")
    for name in ("opt000000.pt", "opt000002.pt"):
        (own_run / name).unlink()
        before.pop(name)
    refused(
        call("image_train", *args, "--resume", "auto", cwd=tmp_path),
        "--resume auto",
        "ema_0.9999, opt",
        "--init_checkpoint",
    )
    refused(call("image_train", *args, "--resume", own_run, cwd=tmp_path), f"--resume {own_run}", "no complete")
    assert contents(own_run) == before


def test_a_first_save_that_was_cut_off_is_made_again(place, tmp_path):
    left = tmp_path / "run"
    left.mkdir()
    shutil.copy(place.run / "model000000.pt", left)
    args = [*place.training, "--max_steps", 1, "--out_dir", left, "--resume", "auto"]
    result = call("image_train", *args, cwd=tmp_path).succeed()
    assert f"--resume auto: no complete checkpoint in {left}, so training starts at step 0" in result.out
    assert (left / "opt000000.pt").exists()


def test_training_into_the_folder_of_an_earlier_run(place, tmp_path):
    result = call("image_train", *place.training, "--max_steps", 3, "--out_dir", place.run, cwd=tmp_path)
    refused(result, f"{place.run} holds checkpoints of an earlier run", "--resume auto", "another --out_dir")


def test_sampling_into_the_folder_of_other_samples(place, tmp_path):
    result = call("image_sample", *place.sampling, "--num_samples", 2, "--seed", 7, cwd=tmp_path)
    refused(result, f"{place.samples} holds samples of --seed 0, but this command has --seed 7", "another --out_dir")


# The machine


def test_unwritable_output(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    args = ["--model_path", place.model, "--num_samples", 1, "--out_dir", "file/samples"]
    result = call("image_sample", *args, cwd=tmp_path)
    refused(result, f"cannot make the folder {tmp_path / 'file/samples'}", "choose another --out_dir")
    result = call("image_train", *place.training, "--max_steps", 1, "--out_dir", "file", cwd=tmp_path)
    refused(result, f"cannot make the folder {tmp_path / 'file'}", "choose another --out_dir")
    assert (tmp_path / "file").read_text() == "in the way"


def test_disk_full_while_saving(place, own_run, tmp_path):
    before = contents(own_run)
    largest = max(len(content) for name, content in before.items() if name.startswith("model"))
    args = [*place.training, "--max_steps", 5, "--out_dir", own_run, "--resume", "auto"]
    result = python("image_train", *args, cwd=tmp_path, prefix=limited(largest + 10_000))
    refused(result, f"cannot write {own_run / 'opt000004.pt'}", "free some space", "files written before are untouched")
    assert f"last good checkpoint: {own_run / 'model000002.pt'}" in result.err
    after = contents(own_run)
    assert set(after) == set(before)  # nothing of the set, and no half-written file
    for name in before.keys() - {"config.json", "curves.png"}:
        assert after[name].startswith(before[name]) if "progress" in name else after[name] == before[name], name
    result = call("image_train", *args, cwd=tmp_path).succeed()
    assert f"resumed after 3 steps\n  model: {own_run / 'model000002.pt'}" in result.out
    assert (own_run / "opt000004.pt").exists()


def test_disk_full_before_the_run_starts(place, tmp_path):
    args = [*place.training, "--max_steps", 1, "--out_dir", "run"]
    result = python("image_train", *args, cwd=tmp_path, prefix=limited(150))
    assert result.code == 1 and "Traceback" not in result.err
    warning, lost, error = result.err.splitlines()
    assert warning.startswith(f"warning: cannot write {tmp_path / 'run/log.txt'}") and "free some space" in warning
    assert "entries of" in lost and "run/log.txt" in lost  # the log ends with the run, and says what it lacks
    assert error.startswith(f"error: cannot write {tmp_path / 'run/config.json'}") and "free some space" in error


def test_a_killed_rank(place, tmp_path):
    args = [*place.training, "--save_interval", 5, "--log_interval", 1000, "--out_dir", "run"]
    process = start("mpiexec", 2, "image_train", *args, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run/manifest000005.json").exists(), "checkpoint", process)
    for pid in started_by(process, PMI_RANK=1):
        os.kill(pid, signal.SIGKILL)
    result = wait(process, timeout=60)
    assert result.code != 0
    assert "Killed (signal 9)" in result.out + result.err or "lost contact with another rank" in result.err
    assert "Traceback" not in result.out + result.err
    th.load(tmp_path / "run/opt000005.pt", weights_only=True)
    newest = max(path.name for path in (tmp_path / "run").glob("manifest*.json"))
    done = json.loads((tmp_path / "run" / newest).read_text())["step"]
    result = call("image_train", *args, "--resume", "auto", "--max_steps", done + 2, cwd=tmp_path).succeed()
    assert f"resumed after {done} steps" in result.out


def test_a_mistake_that_all_ranks_make_is_reported_once(place, tmp_path):
    result = run("mpiexec", 2, "image_train", *TINY_IMAGE, "--data_dir", "nowhere", cwd=tmp_path)
    assert result.code == 1
    assert result.err.count("error: --data_dir nowhere does not exist") == 1
    assert "Traceback" not in result.out + result.err


def test_interrupted_sampling(place, tmp_path):
    args = ["--model_path", place.model, "--num_samples", 1000, "--batch_size", 1, "--out_dir", "samples"]
    process = start("python", 1, "image_sample", *args, cwd=tmp_path)
    wait_for(lambda: len(list((tmp_path / "samples/samples").glob("*.png"))) >= 2, "samples", process)
    process.send_signal(signal.SIGINT)
    result = wait(process, timeout=60)
    assert result.code == 130
    assert result.err.startswith("interrupted: ") and result.err.count("\n") == 1
    assert f"of 1000 samples are in {tmp_path / 'samples/samples'}; rerun the same command" in result.err


# What looks right and is not


def test_weights_without_an_optimizer_are_not_resumed(prepared, own_run, tmp_path):
    wanted = own_run / "best.pt"
    shutil.copy(own_run / "model000002.pt", wanted)
    result = call("image_train", *prepared.training, "--resume", wanted, "--out_dir", "next", cwd=tmp_path)
    refused(result, wanted, "name a modelNNNNNN.pt", "--init_checkpoint")


def test_samples_of_a_checkpoint_that_has_changed_are_not_passed_off_as_new(prepared, own_run, tmp_path):
    model = own_run / "ema_0.9999_000002.pt"
    sampling = ["--model_path", model, "--num_samples", 2, "--timestep_respacing", 2, "--out_dir", "samples"]
    call("image_sample", *sampling, cwd=tmp_path).succeed()
    state = th.load(model, weights_only=True)
    state["out.2.bias"] += 0.1
    th.save(state, model)
    refused(call("image_sample", *sampling, cwd=tmp_path), "holds samples of another model file", "another --out_dir")


def test_samples_of_a_foreign_checkpoint_by_other_flags_are_not_passed_off_as_new(prepared, tmp_path):
    state = {name: tensor.clone() for name, tensor in th.load(prepared.model, weights_only=True).items()}
    th.save(state, tmp_path / "foreign.pt")
    flags = ["--image_size", 16, "--channel_mult", "1,1", "--timestep_respacing", 2]
    sampling = ["--model_path", tmp_path / "foreign.pt", *flags, "--num_samples", 2, "--out_dir", "samples"]
    call("image_sample", *sampling, cwd=tmp_path).succeed()
    result = call("image_sample", *sampling, "--noise_schedule", "cosine", cwd=tmp_path)
    refused(result, "samples of --noise_schedule", "cosine")


def test_negative_seed(prepared, tmp_path):
    refused(call("image_train", *prepared.training, "--seed", -1, cwd=tmp_path), "--seed -1 must not be negative")


def test_out_dir_on_blob_storage(prepared, tmp_path):
    result = call("image_train", *prepared.training, "--out_dir", "gs://bucket/run", cwd=tmp_path)
    refused(result, "--out_dir gs://bucket/run must be a local folder", "DIFFUSION_BLOB_LOGDIR")


def test_unknown_log_format(prepared, tmp_path):
    environment = {"OPENAI_LOG_FORMAT": "stdout,xml"}
    result = call("image_train", *prepared.training, "--out_dir", "run", cwd=tmp_path, env=environment)
    refused(result, "OPENAI_LOG_FORMAT", "'xml'", "csv")
