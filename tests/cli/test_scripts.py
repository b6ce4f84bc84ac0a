"""Every script from end to end: under plain python, where importing mpi4py ends it, mpiexec, torchrun and srun."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image
from script_helpers import (
    TINY,
    TINY_IMAGE,
    TINY_SUPER_RES,
    call,
    contents,
    environment,
    pixels,
    python,
    run,
    start,
    started_by,
    wait,
    wait_for,
    without_mpi4py,
    write_images,
)

from improved_diffusion.utils.resizing import resize_crop

# Ranks that have joined are the same under each launcher: most tests take one.
SRUN, TORCHRUN = (pytest.param(name, marks=pytest.mark.slow) for name in ("srun", "torchrun"))
SCRIPTS = ("image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample")
PER_STEP = 20  # rows of the terms of TINY's bound


def test_plain_runs_of_these_tests_cannot_import_mpi4py():
    argv = [sys.executable, "-c", "import mpi4py"]
    result = subprocess.run(argv, env=without_mpi4py(environment()), capture_output=True, text=True)
    assert result.returncode != 0 and "mpi4py was imported" in result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def animals(place):
    return write_images(place / "animals", 20)


@pytest.fixture(scope="module")
def training(animals):
    """The flags of a class-conditional run, four images a step."""
    return [*TINY_IMAGE, "--data_dir", animals, "--class_cond", "--total_batch_size", 4, "--log_interval", 2]


@pytest.fixture(scope="module")
def trained(place, training):
    """Six steps under plain python: (the folder, what was printed)."""
    args = [*training, "--save_interval", 3, "--max_steps", 6, "--num_workers", 1]
    return place / "runs/image_train", python("image_train", *args, cwd=place, figures=True).succeed()


@pytest.fixture(scope="module")
def model(trained):
    return trained[0] / "ema_0.9999_000006.pt"


def state_of(path):
    return th.load(path, map_location="cpu", weights_only=True)


def samples_of(folder):
    """The arrays of the only npz in a folder."""
    (path,) = Path(folder).glob("samples_*.npz")
    with np.load(path) as arrays:
        assert path.stem == "samples_" + "x".join(map(str, arrays["arr_0"].shape))
        assert arrays["arr_0"].dtype == np.uint8
        return [arrays[name] for name in arrays.files]


def largest_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


# Training


def test_training_writes_the_published_files(trained):
    folder, _ = trained
    sets = [f"{part}{step:06d}.pt" for step in (0, 3, 6) for part in ("model", "ema_0.9999_", "opt")]
    sets += [f"manifest{step:06d}.json" for step in (0, 3, 6)]
    others = {"config.json", "curves.png", "log.txt", "progress.csv", "progress.jsonl", "train_images.png", ".lock"}
    assert {path.name for path in folder.iterdir()} == {*sets, *others}
    assert pixels(folder / "curves.png").size > 100_000


def test_training_says_what_it_does_and_nothing_on_stderr(trained, animals):
    folder, result = trained
    lines = result.out.splitlines()
    assert lines[0] == f"logging to {folder}"
    assert re.fullmatch(r"1 process on \S+: (cpu|cuda:0 \(.*\))", lines[1])
    assert "total batch: 4 images a step (4 per rank x 1 ranks)" in lines
    assert f"{animals}: 20 images of 2 classes (cat, dog); 6 steps: 1.2 epochs" in lines
    assert f"saved {folder / 'model000006.pt'}" in lines
    assert result.err == ""
    # The log has the table of a row, where the terminal has one line.
    log = (folder / "log.txt").read_text().splitlines()
    messages = [line for line in lines if not line.startswith(("step ", "training: "))]
    assert [line for line in log if not line.startswith(("|", "---", "training: "))] == messages
    assert sum(line.startswith("step ") for line in lines) == 4 and any(line.startswith("| loss") for line in log)


def test_the_log_has_a_row_for_each_interval(trained):
    with (trained[0] / "progress.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(row["step"]) for row in rows] == [0, 2, 4, 5]  # the last one is what was left
    assert [float(row["samples"]) for row in rows] == [4, 12, 20, 24]
    assert all(float(row[name]) > 0 for row in rows for name in ("loss", "mse", "vb", "grad_norm", "lr"))


def test_a_checkpoint_describes_itself(trained):
    folder, _ = trained
    description = json.loads(state_of(folder / "model000006.pt")._metadata["improved_diffusion"]["json"])
    assert description["class_names"] == ["cat", "dog"] and description["step"] == 6
    assert description["config"]["num_channels"] == 32 and description["config"]["num_classes"] == 2
    beside = json.loads((folder / "config.json").read_text())
    assert beside["config"] == description["config"]


@pytest.fixture(scope="module")
def killed(place, training):
    """A run under `mpiexec -n 2` that was killed in its midst: the folder, and the steps that its last set has seen."""
    folder = place / "killed"
    process = start("mpiexec", 2, "image_train", *training, "--save_interval", 2, "--out_dir", folder, cwd=place)
    wait_for(lambda: (folder / "manifest000004.json").exists(), "the third checkpoint", process)
    for pid in started_by(process):
        os.kill(pid, signal.SIGKILL)
    wait(process)
    return folder, max(int(path.stem[8:]) for path in folder.glob("manifest*.json")) + 1


@pytest.fixture(scope="module")
def resumed(place, training, killed):
    """The killed run, gone on with by `--resume auto` for three more steps: the folder, the steps, what was printed."""
    folder, done = killed
    args = ["--resume", "auto", "--max_steps", done + 3, "--out_dir", folder]
    return folder, done + 3, run("mpiexec", 2, "image_train", *args, cwd=place).succeed()


def test_a_run_killed_under_mpiexec_goes_on_by_resume_auto(resumed, killed):
    folder, steps, result = resumed
    assert f"resumed after {killed[1]} steps\n  model: {folder}/model{killed[1] - 1:06d}.pt" in result.out
    assert "total batch: 4 images a step (2 per rank x 2 ranks)" in result.out
    assert result.err == ""
    assert (folder / "log-rank001.txt").exists()
    newest = max(path.name for path in folder.glob("opt*.pt"))
    assert state_of(folder / newest)["improved_diffusion"]["step"] == steps


@pytest.mark.parametrize("launcher", ["torchrun", SRUN])
def test_every_launcher_trains_the_same_and_so_did_the_killed_run(launcher, resumed, training, tmp_path):
    folder, steps, _ = resumed
    args = [*training, "--save_interval", 2, "--max_steps", steps, "--out_dir", "run"]
    result = run(launcher, 2, "image_train", *args, cwd=tmp_path).succeed()
    assert "total batch: 4 images a step (2 per rank x 2 ranks)" in result.out
    assert result.out.count(f"logging to {tmp_path / 'run'}") == 1
    newest = max(path.name for path in (tmp_path / "run").glob("model*.pt"))
    for name in (newest, newest.replace("model", "ema_0.9999_")):
        one, other = state_of(folder / name), state_of(tmp_path / "run" / name)
        assert one.keys() == other.keys()
        assert all(th.equal(one[key], other[key]) for key in one), name


def test_a_run_goes_on_with_another_number_of_ranks(resumed, tmp_path):
    folder, steps, _ = resumed
    shutil.copytree(folder, tmp_path / "run")
    args = ["--resume", "auto", "--max_steps", steps + 2, "--out_dir", "run"]
    result = call("image_train", *args, cwd=tmp_path).succeed()
    assert f"after {steps} steps" in result.out
    assert "total batch: 4 images a step (4 per rank x 1 ranks)" in result.out
    assert re.search(rf"^training: 100% {steps + 2}/{steps + 2} ", result.out, re.MULTILINE)


def test_three_steps_and_three_more_are_six(trained, training, tmp_path):
    folder, _ = trained
    args = [*training, "--save_interval", 3, "--out_dir", "run"]
    call("image_train", *args, "--max_steps", 3, cwd=tmp_path).succeed()
    call("image_train", "--out_dir", "run", "--resume", "auto", "--max_steps", 6, cwd=tmp_path).succeed()
    for name in ("model000006.pt", "ema_0.9999_000006.pt"):
        one, other = state_of(folder / name), state_of(tmp_path / "run" / name)
        assert all(th.equal(one[key], other[key]) for key in one), name


def test_weights_of_another_run_start_at_step_0(trained, training, tmp_path):
    weights = trained[0] / "model000006.pt"
    args = [*training, "--init_checkpoint", weights, "--max_steps", 1, "--lr", "1e-12", "--out_dir", "run"]
    result = call("image_train", *args, cwd=tmp_path).succeed()
    assert f"weights of {weights}, from step 0" in result.out
    one, other = state_of(weights), state_of(tmp_path / "run/model000000.pt")
    assert all(th.allclose(one[key], other[key], atol=1e-8) for key in one)


def test_a_run_shows_how_it_is_going(training, animals, tmp_path, monkeypatch):
    """Validation, previews, a tracker and curves together, and the best average can be sampled from."""
    monkeypatch.setattr("improved_diffusion.training.tasks.PREVIEWS", 4)
    args = [*training, "--max_steps", 6, "--sample_interval", 3, "--val_dir", animals, "--val_interval", 2,
            "--val_images", 4, "--trackers", "tensorboard", "--ema_rate", "0.5,0.9", "--ema_sigma_rel", "0.1",
            "--save_interval", 2, "--keep_last", 1, "--out_dir", "run"]  # fmt: skip
    result = call("image_train", *args, cwd=tmp_path).succeed()
    folder = tmp_path / "run"
    assert result.out.count("validation after ") == 3
    with (folder / "progress.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [bool(row["val_bpd_ema_0.5"]) for row in rows] == [False, True, True, True]
    names = [f"step_{step:06d}{kind}.png" for step in (3, 6) for kind in ("", "_raw")]
    assert sorted(path.name for path in (folder / "previews").iterdir()) == names
    assert pixels(folder / "previews/step_000006.png").shape == (2 * 65 + 2, 2 * 50 + 2, 3)  # above their classes
    assert list((folder / "tensorboard").glob("events.*"))
    # Of the older sets only what other averages can be made of is left.
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted([
        "best.pt", "model000006.pt", "ema_0.5_000006.pt", "ema_0.9_000006.pt", "opt000006.pt",
        *(f"ema_sigma_rel0.1_{step:06d}.pt" for step in (0, 2, 4, 6)),
    ])  # fmt: skip
    call("posthoc_ema", "--run_dir", folder, "--sigma_rel", "0.15", cwd=tmp_path).succeed()
    for name in ("best.pt", "ema_posthoc_sigma_rel0.15_000006.pt"):
        sampling = ["--num_samples", 2, "--timestep_respacing", 2, "--out_dir", tmp_path / name]
        call("image_sample", "--model_path", folder / name, *sampling, cwd=tmp_path).succeed()
        assert len(samples_of(tmp_path / name)[0]) == 2


# Where things go


def test_the_published_environment_variables_name_the_folders_and_nothing_goes_to_tmp(training, tmp_path):
    for name in ("tmp", "cwd"):
        (tmp_path / name).mkdir()
    env = {
        "TMPDIR": str(tmp_path / "tmp"),
        "OPENAI_LOGDIR": str(tmp_path / "logs"),
        "DIFFUSION_BLOB_LOGDIR": str(tmp_path / "blobs"),
        "DIFFUSION_TRAINING_TEST": "1",
        "OPENAI_LOG_FORMAT": "json,csv",
    }
    # DIFFUSION_TRAINING_TEST ends it, after the first save past the first step.
    result = python(
        "image_train", *training, "--save_interval", 2, cwd=tmp_path / "cwd", env=env, figures=True
    ).succeed()
    assert result.out == result.err == ""
    logs = {"progress.json", "progress.csv", "curves.png", "train_images.png", ".lock"}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == logs
    sets = {f"{part}{step:06d}.pt" for step in (0, 2) for part in ("model", "ema_0.9999_", "opt")}
    sets |= {f"manifest{step:06d}.json" for step in (0, 2)}
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {*sets, "config.json", ".lock"}
    left = [path for name in ("tmp", "cwd") for path in (tmp_path / name).rglob("*")]
    assert [path for path in left if not path.name.startswith("torchinductor_")] == []  # torch makes that, empty


def test_out_dir_wins_over_the_environment(model, tmp_path):
    env = {"OPENAI_LOGDIR": str(tmp_path / "logs")}
    args = ["--model_path", model, "--num_samples", 1, "--timestep_respacing", 2]
    result = call("image_sample", *args, cwd=tmp_path, env=env).succeed()
    assert f"logging to {tmp_path / 'logs'}\n" in result.out
    assert (tmp_path / "logs/samples_1x8x8x3.npz").exists()
    call("image_sample", *args, "--out_dir", "own", cwd=tmp_path, env=env).succeed()
    assert (tmp_path / "own/samples_1x8x8x3.npz").exists()


# Presets and config files


def test_flags_win_over_a_config_file_and_that_over_a_preset(animals, tmp_path):
    small = "num_channels: 32\nnum_res_blocks: 1\nimage_size: 8\nchannel_mult: '1,1'\nnum_workers: 0\ndropout: 0.25\n"
    (tmp_path / "small.yaml").write_text(small)
    args = ["--preset", "ddpm-cifar10", "--config", "small.yaml", "--data_dir", animals]
    result = call("image_train", *args, "--batch_size", 3, "--max_steps", 1, "--dropout", 0.5, cwd=tmp_path).succeed()
    folder = tmp_path / "runs/ddpm-cifar10"
    assert result.out.startswith(f"logging to {folder}\n")
    config = json.loads((folder / "config.json").read_text())["config"]
    from_preset = dict(num_heads=1, lr=2e-4, lr_warmup_steps=5000, grad_clip=1.0, random_flip=True)
    from_file = dict(num_channels=32, num_res_blocks=1, image_size=8)
    from_flags = dict(batch_size=3, total_batch_size=3, max_steps=1, dropout=0.5)
    expected = {**from_preset, **from_file, **from_flags}
    assert {name: config[name] for name in expected} == expected
    with (folder / "progress.csv").open(newline="") as f:
        assert float(next(csv.DictReader(f))["lr"]) == pytest.approx(2e-4 / 5000)


def test_a_runs_config_repeats_it(trained, tmp_path):
    folder, _ = trained
    args = ["--config", folder / "config.json", "--num_workers", 0, "--out_dir", "run"]
    call("image_train", *args, cwd=tmp_path).succeed()
    one, other = state_of(folder / "model000006.pt"), state_of(tmp_path / "run/model000006.pt")
    assert all(th.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_with_its_default(script, tmp_path):
    result = call(script, "--help-all", cwd=tmp_path).succeed()
    flags = set(re.findall(r"^  --(\w+)", result.out, re.MULTILINE))
    size = "image_size" if script.startswith("image") else "large_size"
    assert {size, "num_channels", "seed", "out_dir", "preset", "config"} <= flags
    assert " ".join(result.out.split()).count("(default: ") == len(flags - {"preset", "config"})
    short = set(re.findall(r"^  --(\w+)", call(script, "--help", cwd=tmp_path).succeed().out, re.MULTILINE))
    assert short < flags and 8 <= len(short) <= 11


# Sampling


@pytest.fixture(scope="module")
def sampled(place, model):
    """Five samples under plain python, by naming the model and their number alone: (the folder, what was printed)."""
    result = python("image_sample", "--model_path", model, "--num_samples", 5, cwd=place).succeed()
    return place / "runs/image_train_ema_0.9999_000006_20steps_seed0", result


def test_sampling_writes_an_npz_pngs_and_a_grid(sampled):
    folder, result = sampled
    assert f"logging to {folder}\n" in result.out  # after a warning that the average has seen few steps
    assert result.err == ""
    images, labels = samples_of(folder)
    assert images.shape == (5, 8, 8, 3) and labels.shape == (5,) and set(labels) <= {0, 1}
    assert images.std() > 10 and len(np.unique(images.reshape(5, -1), axis=0)) == 5
    names = [f"{('cat', 'dog')[label]}_{i:06d}.png" for i, label in enumerate(labels)]
    assert sorted(os.listdir(folder / "samples")) == sorted(names)
    for name, image in zip(names, images):
        assert np.array_equal(pixels(folder / "samples" / name), image)
    grid = pixels(folder / "samples.png")  # 3 columns, 2 rows, each image enlarged to 48 pixels, its class below
    assert grid.shape == (2 * 65 + 2, 3 * 50 + 2, 3)
    assert np.array_equal(grid[2:50:6, 2:50:6], images[0])


def same_samples(folder, sampled, rows=slice(None)):
    """The folder's samples are those rows of the reference's, but for rounding."""
    (images, labels), (expected, expected_labels) = samples_of(folder), samples_of(sampled[0])
    assert np.array_equal(labels, expected_labels[rows])
    assert largest_difference(images, expected[rows]) <= 1


@pytest.mark.parametrize("launcher", ["mpiexec", TORCHRUN, SRUN])
def test_two_ranks_draw_the_samples_that_one_draws(launcher, sampled, model, tmp_path):
    args = ["--model_path", model, "--num_samples", 5, "--batch_size", 2, "--out_dir", "samples"]
    result = run(launcher, 2, "image_sample", *args, cwd=tmp_path).succeed()
    assert "2 processes on " in result.out
    assert result.err == ""
    same_samples(tmp_path / "samples", sampled)


def test_the_batch_size_does_not_change_the_samples(sampled, model, tmp_path):
    args = ["--model_path", model, "--num_samples", 5, "--batch_size", 3, "--out_dir", "samples"]
    call("image_sample", *args, cwd=tmp_path).succeed()
    same_samples(tmp_path / "samples", sampled)


def test_given_images_of_a_seed_are_drawn_again(sampled, model, tmp_path):
    args = ["--model_path", model, "--seeds", "2-4", "--out_dir", "samples"]
    call("image_sample", *args, cwd=tmp_path).succeed()
    same_samples(tmp_path / "samples", sampled, slice(2, 5))


def test_more_samples_keep_the_first_and_missing_ones_are_made_again(sampled, model, tmp_path):
    shutil.copytree(sampled[0], tmp_path / "samples")
    before = contents(tmp_path / "samples/samples")
    gone = sorted(before)[1]
    (tmp_path / "samples/samples" / gone).unlink()
    kept = {name: os.stat(tmp_path / "samples/samples" / name).st_mtime_ns for name in before if name != gone}
    args = ["--model_path", model, "--num_samples", 7, "--out_dir", "samples"]
    result = call("image_sample", *args, cwd=tmp_path).succeed()
    assert "4 of 7 samples are in" in result.out
    assert {name: os.stat(tmp_path / "samples/samples" / name).st_mtime_ns for name in kept} == kept
    with np.load(tmp_path / "samples/samples_7x8x8x3.npz") as arrays:
        assert largest_difference(arrays["arr_0"][:5], samples_of(sampled[0])[0]) <= 1


def test_sampling_that_was_killed_goes_on(sampled, model, tmp_path):
    folder = tmp_path / "samples"
    args = ["--model_path", model, "--batch_size", 1, "--out_dir", folder]
    process = start("python", 1, "image_sample", *args, "--num_samples", 500, cwd=tmp_path)
    wait_for(lambda: len(list((folder / "samples").glob("*.png"))) >= 3, "three samples", process)
    process.kill()
    wait(process)
    made = len(list((folder / "samples").glob("*.png")))
    result = call("image_sample", *args, "--num_samples", made + 2, cwd=tmp_path).succeed()
    assert f"{made} of {made + 2} samples are in {folder / 'samples'} already" in result.out
    images, labels = samples_of(folder)
    expected, expected_labels = samples_of(sampled[0])
    assert len(images) == made + 2
    assert np.array_equal(labels[:5], expected_labels)
    assert largest_difference(images[:5], expected) <= 1


def test_classes_are_named_or_numbered(model, tmp_path):
    args = ["--model_path", model, "--num_samples", 4, "--classes", "dog,0", "--out_dir", "samples"]
    call("image_sample", *args, "--timestep_respacing", 3, cwd=tmp_path).succeed()
    assert samples_of(tmp_path / "samples")[1].tolist() == [1, 0, 1, 0]
    names = ["cat_000001.png", "cat_000003.png", "dog_000000.png", "dog_000002.png"]
    assert sorted(os.listdir(tmp_path / "samples/samples")) == names


def test_only_classes_that_were_trained_are_drawn_from_a_larger_embedding(training, tmp_path):
    args = [*training, "--num_classes", 1000, "--max_steps", 1, "--out_dir", "run"]
    call("image_train", *args, cwd=tmp_path).succeed()
    sampling = ["--model_path", "run/ema_0.9999_000000.pt", "--num_samples", 6, "--timestep_respacing", 2]
    call("image_sample", *sampling, "--out_dir", "samples", cwd=tmp_path).succeed()
    assert state_of(tmp_path / "run/model000000.pt")["label_emb.weight"].shape[0] == 1000
    assert set(samples_of(tmp_path / "samples")[1]) == {0, 1}


def test_ddim_in_fewer_steps_has_a_folder_of_its_own(model, tmp_path):
    args = ["--model_path", model, "--num_samples", 1, "--use_ddim", "--timestep_respacing", "ddim5"]
    call("image_sample", *args, cwd=tmp_path).succeed()
    assert samples_of(tmp_path / "runs/image_train_ema_0.9999_000006_ddim_5steps_seed0")[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("size", "channels", "mode"), [("8x16", 3, "RGB"), ("8", 1, "L"), ("8", 2, "LA"), ("16x8", 4, "RGBA")]
)
def test_images_of_any_shape_and_channels(size, channels, mode, tmp_path):
    height, width = (int(side) for side in (size.split("x") * 2)[:2])
    write_images(tmp_path / "images", 6, size=(24, 40), channels=channels)
    args = ["--image_size", size, "--channels", channels, *TINY, "--data_dir", "images", "--batch_size", 2]
    call("image_train", *args, "--max_steps", 1, "--out_dir", "run", cwd=tmp_path).succeed()
    model_path = ["--model_path", "run/ema_0.9999_000000.pt"]
    call("image_sample", *model_path, "--num_samples", 2, "--out_dir", "samples", cwd=tmp_path).succeed()
    (images,) = samples_of(tmp_path / "samples")
    assert images.shape == (2, height, width, channels)
    with Image.open(tmp_path / "samples/samples/000001.png") as image:
        assert image.mode == mode and image.size == (width, height)
    assert pixels(tmp_path / "samples/samples.png").shape[2] == channels
    nll = ["--data_dir", "images", "--num_samples", 2, "--timestep_respacing", 4, "--out_dir", "nll"]
    assert "bits/dim: " in call("image_nll", *model_path, *nll, cwd=tmp_path).succeed().out


# Evaluating the bound


@pytest.fixture(scope="module")
def evaluation(model, animals):
    return ["--model_path", model, "--data_dir", animals, "--num_samples", 5]


def terms_of(folder):
    terms = {}
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(folder / f"{name}_terms.npz") as arrays:
            terms[name] = arrays["arr_0"]
        assert terms[name].shape == (PER_STEP,) and terms[name].dtype == np.float32
    return terms


def bits_per_dim(result):
    """The running means and the last line's (mean, standard error, number of images)."""
    running = [float(mean) for mean in re.findall(r"^done \d+ samples: bpd=(\S+)$", result.out, re.MULTILINE)]
    last = re.search(r"^bits/dim: (\S+) \+- (\S+) \(standard error over (\d+) images\)$", result.out, re.MULTILINE)
    return running, tuple(map(float, last.groups()))


@pytest.fixture(scope="module")
def measured(place, evaluation):
    result = call("image_nll", *evaluation, "--batch_size", 2, cwd=place).succeed()
    return place / "runs/image_train_ema_0.9999_000006_20steps_seed0_nll", result


def test_the_bound_is_printed_with_its_error_and_its_terms_are_written(measured):
    folder, result = measured
    assert result.err == ""
    assert f"logging to {folder}\n" in result.out
    running, (mean, error, count) = bits_per_dim(result)
    assert len(running) == 3 and running[-1] == pytest.approx(mean, abs=1e-4)
    assert count == 5 and 0 < error < mean
    terms = terms_of(folder)
    assert terms["vb"].sum() == pytest.approx(mean, abs=0.01)  # the rest is the prior's share
    assert (terms["mse"] > 0).all() and (terms["xstart_mse"] > 0).all()


@pytest.mark.parametrize("launcher", ["mpiexec", TORCHRUN])
def test_two_ranks_measure_what_one_measures(launcher, measured, evaluation, tmp_path):
    args = [*evaluation, "--batch_size", 2, "--out_dir", "nll"]
    result = run(launcher, 2, "image_nll", *args, cwd=tmp_path).succeed()
    assert bits_per_dim(result)[1] == pytest.approx(bits_per_dim(measured[1])[1], abs=2e-4)
    expected = terms_of(measured[0])
    for name, values in terms_of(tmp_path / "nll").items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-6)


def digits_of(result):
    """The lines with bits/dim and its errors."""
    return re.findall(r"^(?:bits/dim: .*|.* of the standard error .*)$", result.out, re.MULTILINE)


def test_an_estimate_from_some_timesteps_is_the_same_to_the_last_digit_on_two_ranks(evaluation, tmp_path):
    args = [*evaluation, "--nll_timesteps", 6]
    one = call("image_nll", *args, "--batch_size", 5, "--out_dir", "one", cwd=tmp_path).succeed()
    two = run(
        "mpiexec", 2, "image_nll", *args, "--batch_size", 1, "--timesteps_per_pass", 4, "--out_dir", "two", cwd=tmp_path
    ).succeed()
    assert "6 network evaluations for each" in one.out and len(digits_of(one)) == 2
    assert digits_of(one) == digits_of(two)
    files = []
    for name in ("one", "two"):
        with np.load(tmp_path / name / "per_image.npz", allow_pickle=False) as arrays:
            files.append(dict(arrays))
    np.testing.assert_array_equal(files[0]["timesteps"], files[1]["timesteps"])
    for name in ("total_bpd", "vb", "mse", "xstart_mse"):
        np.testing.assert_allclose(files[0][name], files[1][name], rtol=1e-4, atol=1e-6)
    assert files[0]["vb"].shape == (5, 6)
    assert not list(tmp_path.glob("*/*_terms.npz"))


def test_the_number_is_written_with_what_it_depends_on(measured, model):
    folder, result = measured
    content = json.loads((folder / "nll.json").read_text())
    assert f"{content['bits_per_dim']:.4f} +- {content['standard_error']:.4f}" in result.out
    assert content["images"] == 5 and content["timesteps"] == 20 and content["nll_timesteps"] == 0
    assert content["model_sha256"] == hashlib.sha256(Path(model).read_bytes()).hexdigest()
    assert (folder / "nll_terms.png").stat().st_size > 10_000
    with np.load(folder / "per_image.npz", allow_pickle=False) as arrays:
        assert arrays["vb"].shape == (5, 20)
        np.testing.assert_allclose(arrays["vb"].mean(axis=0), terms_of(folder)["vb"], rtol=1e-5)


def test_all_images_are_evaluated_where_more_are_asked_for(evaluation, tmp_path):
    args = [*evaluation, "--num_samples", 1000, "--batch_size", 8, "--timestep_respacing", 2]
    result = call("image_nll", *args, cwd=tmp_path).succeed()
    assert bits_per_dim(result)[1][2] == 20


# Super-resolution


@pytest.fixture(scope="module")
def upsampler(place, animals):
    """A super-resolution model 8 -> 16 trained under `mpiexec -n 2`."""
    args = [*TINY_SUPER_RES, "--data_dir", animals, "--class_cond", "--batch_size", 2, "--max_steps", 2]
    result = run("mpiexec", 2, "super_res_train", *args, cwd=place).succeed()
    folder = place / "runs/super_res_train"
    assert f"saved {folder / 'model000002.pt'}" in result.out
    return folder / "ema_0.9999_000002.pt"


@pytest.fixture(scope="module")
def small_images(place):
    return write_images(place / "small", 3, size=(8, 8), seed=1)


def test_super_resolution_of_a_folder(upsampler, small_images, tmp_path):
    args = ["--model_path", upsampler, "--base_samples", small_images, "--out_dir", "large"]
    result = call("super_res_sample", *args, cwd=tmp_path).succeed()
    assert result.err == ""
    images, labels = samples_of(tmp_path / "large")
    assert images.shape == (3, 16, 16, 3)
    # The folder's order and its names' classes: cat_00, cat_02, dog_01.
    assert labels.tolist() == [0, 0, 1]
    names = ["cat_000000.png", "cat_000001.png", "dog_000002.png"]
    assert sorted(os.listdir(tmp_path / "large/samples")) == names
    grid = pixels(tmp_path / "large/samples.png")  # each beside what it was made from
    assert np.array_equal(grid[2:50:6, 2:50:6], pixels(small_images / "cat_00.png"))


def test_super_resolution_of_an_npz_on_two_ranks(upsampler, small_images, tmp_path):
    order = ["cat_00.png", "cat_02.png", "dog_01.png"]
    base = np.stack([pixels(small_images / name) for name in order])
    np.savez(tmp_path / "base.npz", base, np.array([0, 0, 1]))
    args = ["--model_path", upsampler, "--batch_size", 1]
    of_npz, of_folder = ["--base_samples", "base.npz"], ["--base_samples", small_images]
    run("srun", 2, "super_res_sample", *args, *of_npz, "--out_dir", "a", cwd=tmp_path).succeed()
    call("super_res_sample", *args, *of_folder, "--out_dir", "b", cwd=tmp_path).succeed()
    same_samples(tmp_path / "a", (tmp_path / "b",))


def test_super_resolution_of_one_image_many_times(upsampler, small_images, tmp_path):
    args = ["--model_path", upsampler, "--base_samples", small_images / "dog_01.png", "--out_dir", "large"]
    result = call("super_res_sample", *args, "--num_samples", 3, "--batch_size", 2, cwd=tmp_path).succeed()
    images, labels = samples_of(tmp_path / "large")
    assert images.shape == (3, 16, 16, 3) and labels.tolist() == [1, 1, 1]
    assert largest_difference(images[0], images[1]) > 10
    assert "resized" not in result.out


def test_super_resolution_of_a_larger_photo_resizes_it(upsampler, animals, tmp_path):
    args = ["--model_path", upsampler, "--base_samples", animals / "cat_00.png", "--out_dir", "large"]
    result = call("super_res_sample", *args, cwd=tmp_path).succeed()
    assert "images of 20x20 are resized and centre-cropped to --small_size 8" in result.out
    assert samples_of(tmp_path / "large")[0].shape == (1, 16, 16, 3)


def test_super_resolution_without_classes_asks_for_them(upsampler, tmp_path):
    np.savez(tmp_path / "base.npz", np.zeros((2, 8, 8, 3), np.uint8))
    args = ["--model_path", upsampler, "--base_samples", "base.npz", "--out_dir", "large"]
    result = call("super_res_sample", *args, cwd=tmp_path)
    assert result.code == 1 and "base.npz has no classes" in result.err and "give --classes" in result.err
    call("super_res_sample", *args, "--classes", "dog", cwd=tmp_path).succeed()
    assert samples_of(tmp_path / "large")[1].tolist() == [1, 1]


@pytest.fixture(scope="module")
def compared(upsampler, small_images, place):
    """Samples compared with the true images, which are larger and cropped; their folder and what was printed."""
    true_images = write_images(place / "true", 3, size=(20, 18), seed=2)
    args = ["--model_path", upsampler, "--base_samples", small_images, "--reference", true_images]
    return args, call("super_res_sample", *args, "--out_dir", "compared", cwd=place).succeed(), place / "compared"


def test_super_resolution_is_compared_with_the_true_images(compared, small_images, place):
    (_, result, folder) = compared
    assert result.err == ""
    found = json.loads((folder / "psnr_ssim.json").read_text())
    images, _ = samples_of(folder)
    names = ("cat_00.png", "cat_02.png", "dog_01.png")
    for i, name in enumerate(names):
        truth = np.asarray(resize_crop(Image.open(place / "true" / name), (16, 16)), float)
        plain = np.asarray(Image.open(small_images / name).resize((16, 16), Image.Resampling.BICUBIC), float)
        for values, image in ((found["psnr"], images[i]), (found["bicubic"]["psnr"], plain)):
            assert values["values"][i] == pytest.approx(10 * np.log10(255**2 / np.mean((image - truth) ** 2)), rel=1e-6)
    assert found["reference"] == str(place / "true") and found["n"] == found["samples"] == 3
    lines = re.findall(r"^((?:PSNR|SSIM): .*)$", result.out, re.MULTILINE)
    number = r"-?\d+\.\d+ \+- \d+\.\d+"
    assert re.fullmatch(rf"PSNR: {number} dB, bicubic {number} dB, gain [+]?{number} dB \(.* over 3 images\)", lines[0])
    assert re.fullmatch(rf"SSIM: {number}, bicubic {number}, gain [+]?{number} \(.* over 3 images\)", lines[1])
    assert len(lines) == 2 and f"{found['psnr']['mean']:.2f} +- " in lines[0]
    assert f"wrote {folder / 'psnr_ssim.json'}" in result.out


def test_two_ranks_compare_as_one_does(compared, tmp_path):
    args, _, folder = compared
    result = run("srun", 2, "super_res_sample", *args, "--batch_size", 1, "--out_dir", "two", cwd=tmp_path).succeed()
    assert result.out.count("PSNR: ") == 1
    found, expected = (json.loads((path / "psnr_ssim.json").read_text()) for path in (tmp_path / "two", folder))
    assert found["psnr"]["values"] == pytest.approx(expected["psnr"]["values"], abs=0.02)
    assert found["bicubic"] == expected["bicubic"]


def test_samples_that_are_there_are_compared_without_drawing_them_again(compared, upsampler, small_images, tmp_path):
    args, _, folder = compared
    own = ["--out_dir", tmp_path / "large"]
    call("super_res_sample", *args[:4], *own, cwd=tmp_path).succeed()
    assert not (tmp_path / "large/psnr_ssim.json").exists()
    before = contents(tmp_path / "large/samples")
    result = call("super_res_sample", *args, *own, cwd=tmp_path).succeed()
    assert "3 of 3 samples are in" in result.out and contents(tmp_path / "large/samples") == before
    assert (tmp_path / "large/psnr_ssim.json").read_bytes() == (folder / "psnr_ssim.json").read_bytes()


def test_more_samples_than_images_are_compared_in_turn(upsampler, small_images, compared, tmp_path):
    args, *_ = compared
    result = call("super_res_sample", *args, "--num_samples", 5, "--out_dir", "five", cwd=tmp_path).succeed()
    found = json.loads((tmp_path / "five/psnr_ssim.json").read_text())
    assert (found["n"], found["samples"], len(found["ssim"]["values"])) == (3, 5, 5)
    assert "standard errors over 3 images" in result.out
