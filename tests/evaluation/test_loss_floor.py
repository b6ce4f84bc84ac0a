"""The command loss-floor and the same from Python: what it prints and writes, with and without a model."""

import json
import math

import numpy as np
import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import call, refused, write_images

import improved_diffusion as idf
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.evaluation import loss_floor, loss_floor_plot
from improved_diffusion.training.loss_by_noise import Mean
from improved_diffusion.utils.figures import new_figure

SMALL = ("--image_size", 8, "--diffusion_steps", 40, "--noise_schedule", "cosine", "--floor_draws", 100,
         "--floor_levels", 5)  # fmt: skip
OPTIONS = dict(image_size=8, diffusion_steps=40, noise_schedule="cosine", floor_draws=200, floor_levels=5)


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 20, size=(8, 8))


def floor(*args, cwd):
    return call("loss_floor", *args, cwd=cwd)


def content(folder):
    return json.loads((folder / "loss_floor.json").read_text())


def test_it_prints_the_floor_by_noise_level_and_writes_it_and_a_plot(photos, tmp_path):
    result = floor("photos", *SMALL, cwd=tmp_path).succeed()
    folder = tmp_path / "runs/photos_loss_floor"
    found = content(folder)
    assert found["images"] == found["of_images"] == 20 and found["is_whole"] and found["model_path"] is None
    assert [level["timesteps"] for level in found["levels"]] == [[8 * k, 8 * k + 7] for k in range(5)]
    assert len(found["quarters"]) == 4 and sum(level["draws"] for level in found["levels"]) == 100
    sigmas = [level["sigma"] for level in found["levels"]]
    assert sigmas == sorted(sigmas) and found["levels"][0].keys() >= {"epsilon", "x_0"}
    floors = [level["x_0"]["floor"]["value"] for level in found["levels"]]
    assert floors == sorted(floors) and floors[0] < 1e-6 and floors[-1] > 0.1
    for level in found["levels"]:
        assert level["x_0"].keys() == {"floor"} and 1 <= level["images"] <= 20
        assert f"{level['epsilon']['floor']['value']:.4g}" in result.out
    with Image.open(folder / "loss_floor.png") as image:
        assert min(image.size) > 300


def test_python_gives_what_the_command_does(photos, tmp_path):
    floor("photos", *SMALL, "--floor_draws", 200, "--out_dir", "out", cwd=tmp_path).succeed()
    report = idf.loss_floor(photos, **OPTIONS)
    assert json.loads(json.dumps(report.to_dict())) == content(tmp_path / "out")
    report.save(tmp_path / "saved")
    assert content(tmp_path / "saved") == content(tmp_path / "out")


def test_the_target_of_training_comes_first_and_the_quarters_are_in_its_units(photos):
    report = idf.loss_floor(photos, predict_v=True, **OPTIONS)
    assert report.targets == ["v", "epsilon", "x_0"]
    v, eps, x_0 = ([level[target]["floor"].value for level in report.levels(4)] for target in report.targets)
    np.testing.assert_allclose(v, np.add(eps, x_0), rtol=1e-9)  # 1/s^2 = a^2/s^2 + 1
    assert " ".join(f"{each:.4g}" for each in v) in report.lines()[-1]
    assert idf.loss_floor(photos, predict_xstart=True, **OPTIONS).targets == ["x_0", "epsilon"]


def test_classes_mirror_images_and_subsets(photos):
    reports = {
        name: idf.loss_floor(photos, **OPTIONS, **options)
        for name, options in {"all": {}, "classes": {"class_cond": True}, "mirrored": {"random_flip": True},
                              "few": {"floor_images": 6}}.items()
    }  # fmt: skip
    last = {name: report.levels(1)[0]["x_0"]["floor"].value for name, report in reports.items()}
    assert last["classes"] < last["all"] < last["mirrored"] and last["few"] < last["all"]
    assert reports["classes"].about["classes"] == 2 and "of 2 classes, each by itself" in reports["classes"].lines()[0]
    assert "6 images of 20: a lower bound" in reports["few"].lines()[0]
    assert "and their mirror images" in reports["mirrored"].lines()[0]


@pytest.mark.parametrize("class_cond", [False, True])
def test_a_models_loss_is_measured_on_the_same_images(photos, tmp_path, class_cond):
    names = CLASSES if class_cond else None
    model = save_checkpoint(tmp_path / "run/model000010.pt", tiny_settings(class_cond=class_cond), class_names=names)
    args = ("--model_path", model, "--floor_draws", 100, "--floor_levels", 4, "--batch_size", 32)
    result = floor("photos", *args, "--out_dir", "out", cwd=tmp_path).succeed()
    found = content(tmp_path / "out")
    assert found["classes"] == 2 * class_cond and found["diffusion_steps"] == 20 and len(found["model_sha256"]) == 64
    for level in found["levels"]:
        each = level["epsilon"]
        assert each["loss"]["value"] - each["floor"]["value"] == pytest.approx(each["excess"]["value"])
        assert each["excess"]["value"] > 0
    assert found["warnings"] == found["memorised"] == [] and "above floor" in result.out
    report = idf.load(model).loss_floor(photos, floor_draws=100, floor_levels=4, batch_size=7)
    assert [level["epsilon"]["loss"].value for level in report.levels()] == pytest.approx(
        [level["epsilon"]["loss"]["value"] for level in found["levels"]], rel=1e-4
    )


def test_mirror_images_belong_to_it_where_the_model_was_trained_on_them(photos, tmp_path):
    from improved_diffusion.checkpoints import checkpoint

    path = save_checkpoint(tmp_path / "run/model000010.pt", tiny_settings())
    state, metadata = checkpoint.load(str(path))
    metadata["config"]["random_flip"] = True
    checkpoint.save_state_dict(state, str(path), metadata)
    model = idf.load(path)
    assert model.loss_floor(photos, floor_draws=100).about["random_flip"]
    assert not model.loss_floor(photos, floor_draws=100, random_flip=False).about["random_flip"]


def test_a_model_below_the_floor_is_warned_of(photos, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model000010.pt", tiny_settings())
    floors = {}
    measure = loss_floor.measure_floor
    monkeypatch.setattr(loss_floor, "measure_floor", lambda draws: floors.setdefault("floor", measure(draws)))
    monkeypatch.setattr(loss_floor, "model_errors", lambda *args: 0.5 * floors["floor"].floor)
    args = ("--model_path", "model000010.pt", "--floor_draws", 300, "--floor_levels", 4, "--out_dir", "out")
    result = floor("photos", *args, cwd=tmp_path).succeed()
    assert "warning: timesteps 15 to 19: the loss on these images" in result.out
    assert content(tmp_path / "out")["warnings"]


def test_the_band_of_a_level_whose_error_exceeds_it_reaches_the_bottom_of_the_plot():
    """A logarithmic axis drops corners that are not positive, which would join the others across the plot."""
    levels = [{"x_0": {"loss": Mean(value, error)}} for value, error in ((0.1, 0.01), (9.0, 8.0), (0.2, 0.01))]
    figure = new_figure((4, 3))
    axes = figure.subplots()
    loss_floor_plot._draw(axes, np.arange(3), levels, "x_0", "loss", "red", "the model")
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1] > 0).all() and np.isfinite(corners).all()


def test_without_matplotlib_the_numbers_are_written(photos, tmp_path, monkeypatch):
    def missing(*args):
        raise idf.UserError("plots need a package that is missing")

    monkeypatch.setattr(loss_floor, "write_floor_plot", missing)
    result = floor("photos", *SMALL, "--out_dir", "out", cwd=tmp_path).succeed()
    assert "a package that is missing" in result.out and not (tmp_path / "out/loss_floor.png").exists()
    assert content(tmp_path / "out")["levels"]


def test_wrong_use_is_one_message_and_leaves_no_folder(photos, tmp_path):
    save_checkpoint(tmp_path / "model000010.pt", tiny_settings())
    superres = dict(kind=SuperResModel, image_size=None, large_size=16, small_size=8)
    save_checkpoint(tmp_path / "upsampler.pt", tiny_settings(**superres))
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, *phrases in (
        ([*SMALL], "--data_dir"),
        (["absent", *SMALL], "absent"),
        (["empty", *SMALL], "empty"),
        (["photos", *SMALL, "--floor_draws", 20], "--floor_draws 20", "at least 100"),
        (["photos", *SMALL, "--floor_levels", 60], "--floor_draws 100", "--floor_levels"),
        (["photos", *SMALL, "--floor_images", -1], "--floor_images"),
        (["photos", *SMALL, "--resize_mode", "random_crop"], "--resize_mode random_crop"),
        (["photos", *SMALL, "--class_cond", "True", "--labels", "folder"], "--labels folder"),
        (["photos", "--model_path", "model000010.pt", "--diffusion_steps", 40], "--diffusion_steps 40"),
        (["photos", "--model_path", "upsampler.pt"], "super-resolution"),
        (["photos", "--model_path", "absent.pt"], "absent.pt"),
    ):
        refused(floor(*args, cwd=tmp_path), *phrases)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(idf.UserError, match="model_path"):
        idf.loss_floor(photos, model_path="model000010.pt")


def test_a_single_image_has_no_floor_but_nothing(tmp_path):
    report = idf.loss_floor(write_images(tmp_path / "one", 1, size=(8, 8)), **OPTIONS)
    assert all(level["x_0"]["floor"].value < 1e-15 and math.isclose(level["images"], 1) for level in report.levels())
    report.save(tmp_path / "out")
    assert (tmp_path / "out/loss_floor.png").stat().st_size > 10_000
