"""The hook that logs the loss on training images beside its floor."""

import csv
import math

import numpy as np
import pytest
import torch as th
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, refused, write_images
from watch_worker import Loop, make_diffusion

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images
from improved_diffusion.logs import logger
from improved_diffusion.training import loss_floor
from improved_diffusion.training.loss_by_noise import FiniteSet
from improved_diffusion.training.loss_floor import LossFloor, training_set

QUARTERS = [f"q{q}" for q in range(4)]


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(str(tmp_path / "log"), format_strs=["log"])


def log_of(tmp_path):
    return (tmp_path / "log" / "log.txt").read_text()


def dataset(folder, count=9):
    source = open_images(str(write_images(folder, count, size=(8, 8))))
    return ImageDataset(8, source, [i % 2 for i in range(count)])


def make_hook(tmp_path, held_out=True, num_draws=40, batch_size=8, diffusion=None):
    train, other = dataset(tmp_path / "train"), dataset(tmp_path / "val", 5)
    images = FiniteSet(train, np.arange(9), 100)
    held = FiniteSet(other, np.arange(5), 100) if held_out else None
    return LossFloor(diffusion or make_diffusion(), images, held, num_draws, batch_size)


def logged(hook, loop=None):
    hook(loop or Loop())
    return {key: value for key, value in logger.getkvs().items() if "_q" in key}


def test_floor_and_loss_are_logged_by_quarter_for_the_model_and_each_average(tmp_path):
    result = logged(make_hook(tmp_path))
    weights = ("", "_ema_0.9", "_ema_0.99")
    names = ["floor", *(f"{what}_mse{each}" for what in ("train", "val") for each in weights)]
    assert result.keys() == {f"{name}_{quarter}" for name in names for quarter in QUARTERS}
    for quarter in QUARTERS:
        assert 0 <= result[f"floor_{quarter}"] < result[f"train_mse_{quarter}"]
    assert "floor of mse by quarter" in log_of(tmp_path)
    assert log_of(tmp_path).count("after 5 steps: on training images") == 3


def test_without_held_out_images_only_training_ones_are_measured(tmp_path):
    result = logged(make_hook(tmp_path, held_out=False), Loop(labels=()))
    assert result.keys() == {f"{name}_{quarter}" for name in ("floor", "train_mse") for quarter in QUARTERS}


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_numbers_are_the_same_every_time_and_leave_the_training_as_it_is(tmp_path, batch_size):
    loop = Loop()
    loop.model.train()
    hook = make_hook(tmp_path, num_draws=12, batch_size=batch_size)
    before = [p.clone() for p in loop.model.parameters()]
    state = th.get_rng_state(), np.random.get_state()[1].copy()
    first = logged(hook, loop)
    assert logged(hook, loop) == first
    assert th.equal(th.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert loop.model.training and all(th.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    assert logged(make_hook(tmp_path, num_draws=12, batch_size=8), Loop()) == pytest.approx(first, rel=1e-3)


def test_a_model_below_the_floor_is_warned_of(tmp_path, monkeypatch):
    hook = make_hook(tmp_path, num_draws=200)
    monkeypatch.setattr(loss_floor, "model_errors", lambda *args: 0.1 * hook.train.floor)
    hook(Loop(labels=("0.9",)))
    text = log_of(tmp_path)
    assert "warning: timesteps" in text and "is below its floor" in text and "warning: EMA 0.9: timesteps" in text


def test_a_large_set_gives_way_to_a_part_of_it_and_the_log_says_so(tmp_path, monkeypatch):
    images = dataset(tmp_path / "train")
    assert training_set(images, np.arange(9), False, 40).is_whole and "lower bound" not in log_of(tmp_path)
    monkeypatch.setattr(loss_floor, "MOST_WORK", 2 * 40 * 192 * 6)
    assert len(training_set(images, np.arange(9), False, 40)) == 6
    assert len(training_set(images, np.arange(9), True, 40)) == 3  # of each there are two
    assert "is that of 6 of the 9 images" in log_of(tmp_path) and "a lower bound" in log_of(tmp_path)


def test_files_that_would_have_to_be_read_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_floor, "MOST_READ", 4)
    images = dataset(tmp_path / "train")
    assert len(training_set(images, np.arange(9), False, 40)) == 4
    for i in range(9):
        images.check(i)
    assert training_set(images, np.arange(9), False, 40).is_whole  # in memory


# In a run

RUN = [
    "--batch_size",
    4,
    "--lr",
    1e-3,
    "--ema_rate",
    0.5,
    "--save_interval",
    2,
    "--log_interval",
    1,
    "--val_interval",
    2,
]


def train(folder, steps, *args, cwd):
    command = [*TINY_IMAGE, *RUN, "--max_steps", steps, "--out_dir", folder, "--resume", "auto", *args]
    return call("image_train", *command, cwd=cwd)


def rows_of(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_has_the_same_weights_with_it_and_a_resumed_one_the_same_numbers(tmp_path):
    data = ["--data_dir", write_images(tmp_path / "train", 8, size=(8, 8)), "--random_flip", "True", "--class_cond",
            "True", "--val_interval", 1]  # fmt: skip
    asked = [*data, "--loss_floor", "True", "--val_dir", write_images(tmp_path / "val", 4, seed=1), "--val_images", 8]
    train(tmp_path / "bare", 2, *data, cwd=tmp_path).succeed()
    whole = train(tmp_path / "whole", 2, *asked, cwd=tmp_path).succeed()
    train(tmp_path / "parts", 1, *asked, cwd=tmp_path).succeed()
    train(tmp_path / "parts", 2, *asked, cwd=tmp_path).succeed()
    states = [checkpoint.load(str(tmp_path / name / "model000002.pt"))[0] for name in ("bare", "whole", "parts")]
    assert all(th.equal(states[0][key], state[key]) for state in states[1:] for key in states[0])
    rows = [rows_of(tmp_path / name) for name in ("whole", "parts")]
    keys = [key for key in rows[0][0] if key.startswith(("floor_", "train_mse", "val_mse"))]
    assert len(keys) == 4 * (1 + 2 * 2) and float(rows[0][0]["floor_q3"]) > 0
    assert [[row[key] for key in keys] for row in rows[0]] == [[row[key] for key in keys] for row in rows[1]]
    assert rows[0][0]["floor_q3"] == rows[0][1]["floor_q3"] and rows[0][0]["train_mse_q3"] != rows[0][1]["train_mse_q3"]
    assert not [key for key in rows_of(tmp_path / "bare")[0] if "floor" in key or "train_mse" in key]
    assert whole.out.count("mse by quarter after") == 2


def test_without_held_out_images_it_needs_no_val_dir(tmp_path):
    data = ["--data_dir", write_images(tmp_path / "train", 4, size=(8, 8)), "--loss_floor", "True", "--val_images", 8]
    train(tmp_path / "run", 2, *data, "--predict_xstart", "True", cwd=tmp_path).succeed()
    last = rows_of(tmp_path / "run")[-1]
    assert math.isfinite(float(last["floor_q3"])) and "val_loss" not in last
    result = train(tmp_path / "short", 1, *data, cwd=tmp_path).succeed()
    assert "--val_interval 2 is more than --max_steps 1" in result.out


def test_what_has_no_floor_is_refused_before_training(tmp_path):
    data = ["--data_dir", write_images(tmp_path / "train", 4, size=(16, 16)), "--loss_floor", "True"]
    result = call("super_res_train", *TINY_SUPER_RES, *RUN, *data, "--max_steps", 1, "--out_dir", "run", cwd=tmp_path)
    refused(result, "--loss_floor", "super-resolution")
    refused(train("run", 1, *data, "--resize_mode", "random_crop", cwd=tmp_path), "--resize_mode random_crop")
    assert not (tmp_path / "run").exists()
