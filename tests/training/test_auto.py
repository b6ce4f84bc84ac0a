"""`--preset auto`: chosen by what there is, told in full, kept in the checkpoint."""

import json
import zipfile

import numpy as np
import pytest
import torch as th
from PIL import Image

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.cli.image_train import COMMAND
from improved_diffusion.config import UserError
from improved_diffusion.config.recipes import Survey
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.survey import survey
from improved_diffusion.training.auto import describe_hardware

# What makes a run of the recipe short.
TINY = dict(image_size=8, num_channels=32, channel_mult="1,1", diffusion_steps=20, num_workers=0, max_steps=2)


def write(folder, count, size=(40, 30), mode="RGB", suffix="png", first=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    for i in range(first, first + count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{suffix}")
    return folder


@pytest.mark.parametrize(
    "size, mode, suffix, expected",
    [
        ((40, 30), "RGB", "png", Survey(5, 30, grey=False)),
        ((100, 300), "RGB", "jpg", Survey(5, 100, grey=False)),
        ((40, 30), "L", "png", Survey(5, 30, grey=True)),
        ((40, 30), "1", "png", Survey(5, 30, grey=True)),
        ((40, 30), "P", "png", Survey(5, 30, grey=False)),
    ],
)
def test_the_survey_is_of_the_files_whatever_holds_them(tmp_path, size, mode, suffix, expected):
    folder = write(tmp_path / "photos", 5, size, mode, suffix)
    assert survey(open_images(str(folder)), str(folder)) == expected
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert survey(open_images(str(tmp_path / "photos.zip")), "photos.zip") == expected


def test_the_survey_of_an_npz(tmp_path):
    np.savez(tmp_path / "photos.npz", np.zeros((7, 20, 30, 3), np.uint8))
    assert survey(open_images(str(tmp_path / "photos.npz")), "photos.npz") == Survey(7, 20, grey=False)


def test_unreadable_files_are_passed_over_unless_there_is_nothing_else(tmp_path):
    folder = write(tmp_path / "photos", 3)
    (folder / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert survey(open_images(str(folder)), "photos").side == 30
    for i in range(3):
        (folder / f"{i}.png").unlink()
    with pytest.raises(UserError, match="photos"):
        survey(open_images(str(folder)), "photos")


def test_a_run_takes_the_recipe_and_its_checkpoint_holds_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("improved_diffusion.training.tasks.PREVIEWS", 4)
    folder = write(tmp_path / "photos", 6)
    model = idf.train(folder, preset="auto", **TINY)
    assert model.path.startswith(str(tmp_path / "runs" / "photos"))
    log = (tmp_path / "runs" / "photos" / "log.txt").read_text()
    assert "preset auto: small-32 because 6 images, median side 30" in log and "learn_sigma=True" in log
    config = checkpoint.load(model.path)[1]["config"]
    assert config["total_batch_size"] == 6 and config["ema_warmup"] and config["learn_sigma"]
    assert config["noise_schedule"] == "cosine" and config["random_flip"]
    assert {name: config[name] for name in TINY} == TINY  # flags win
    assert (tmp_path / "runs" / "photos" / "previews" / "step_000002.png").exists()
    assert "auto" not in json.loads((tmp_path / "runs" / "photos" / "config.json").read_text()).values()


def test_resuming_keeps_the_first_choice_though_the_images_are_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "photos", 6, mode="L")
    quick = dict(TINY, sample_interval=0)
    first = checkpoint.load(idf.train(folder, preset="auto", **quick).path)[1]["config"]
    write(folder, 30, mode="L", size=(300, 300), first=6)
    again = idf.train(folder, preset="auto", max_steps=3, num_workers=0, resume="auto")
    config = checkpoint.load(again.path)[1]["config"]
    assert again.step == 3 and config["channels"] == 1
    assert {**config, "max_steps": 2} == first, {n for n in first if first[n] != config[n]}


def test_auto_is_for_image_models(tmp_path):
    folder = write(tmp_path / "photos", 6)
    with pytest.raises(UserError, match="--preset auto"):
        idf.train(folder, preset="auto", large_size=16, small_size=8)


@pytest.mark.parametrize("words", [[], ["--preset", "auto"], ["--image_size", "32"]])
def test_without_images_the_error_shows_the_whole_command(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="improved-diffusion train photos/"):
        COMMAND.main(words, "improved-diffusion train")
    assert list(tmp_path.iterdir()) == []


def test_the_hardware_of_this_process():
    hardware = describe_hardware(th.device("cpu"))
    assert hardware.cores >= 1 and hardware.gib == 0 and "CPU" in str(hardware)


def test_flags_are_checked_together_with_what_is_to_be_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "photos", 4)
    quick = dict(TINY, sample_interval=0)
    # The schedule needs an end, and the recipe has one.
    model = idf.train(folder, preset="auto", lr_schedule="cosine", **quick)
    assert model.step == 2
