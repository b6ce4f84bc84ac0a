"""The scripts in examples/ run as they are, on tiny data."""

import argparse
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch as th
from feature_helpers import write_script
from helpers import ROOT
from model_helpers import save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import pixels, write_images

import improved_diffusion as idf
from improved_diffusion.exchange.graph import describe
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SeededNoise

EXAMPLES = ROOT / "examples"
TINY = dict(num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4")
METHOD = dict(learn_sigma=True, noise_schedule="cosine", num_workers=0, batch_size=4, ema_rate="0.5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 16 images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"cat_{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run_dir(photos, tmp_path_factory):
    """The folder of a tiny trained model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    idf.train(photos, image_size=8, max_steps=2, out_dir=str(folder), **TINY, **METHOD)
    logger.reset()
    return folder


def run_example(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_ten_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 10 or "import improved_diffusion" not in text  # without it there is more to do


def test_train(monkeypatch, photos, tmp_path):
    train = idf.train
    monkeypatch.setattr(idf, "train", lambda *args, **options: train(*args, **options, **TINY))
    run_example(monkeypatch, "train.py", photos, tmp_path / "run", 8, 2)
    assert {"config.json", "model000002.pt", "ema_0.9999_000002.pt"} <= {path.name for path in tmp_path.glob("run/*")}
    assert len(list((tmp_path / "run" / "samples" / "samples").glob("*.png"))) == 16


def test_sample(monkeypatch, run_dir, tmp_path, capsys):
    run_example(monkeypatch, "sample.py", run_dir, tmp_path / "out")
    path = tmp_path / "out" / "samples_16x8x8x3.npz"
    assert str(path) in capsys.readouterr().out
    expected = idf.load(run_dir).sample(16, sampler="dpmpp_2m_sde", steps=20, progress=False)
    np.testing.assert_array_equal(np.load(path)["arr_0"], expected.array)


def test_edit(monkeypatch, run_dir, photos, tmp_path):
    photo = photos / "cat_00.png"
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run_example(monkeypatch, "edit.py", run_dir, photo, tmp_path / "mask.png", tmp_path / "out")
    painted = np.load(tmp_path / "out/inpainted/samples_4x8x8x3.npz")["arr_0"]
    assert (painted[:, 4:] == np.asarray(Image.open(photo))[4:]).all()
    assert len(list((tmp_path / "out/variations/samples").glob("*.png"))) == 4


def test_evaluate(monkeypatch, photos, tmp_path, capsys):
    for folder, seed in (("real", 0), ("fakes", 1)):
        write_images(tmp_path / folder, 40, size=(8, 8), seed=seed)
    features = write_script(tmp_path / "features.pt")
    run_example(monkeypatch, "evaluate.py", tmp_path / "fakes", tmp_path / "real", features, tmp_path / "report")
    assert "FID " in capsys.readouterr().out and (tmp_path / "report/report.md").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with classes and a learned variance, and one that predicts v from pure noise."""
    folder = tmp_path_factory.mktemp("models")
    with_classes, v = (
        tiny_settings(class_cond=True, label_drop=0.1),
        tiny_settings(learn_sigma=False, channels=1, predict_v=True, zero_terminal_snr=True),
    )
    return {
        "classes": idf.load(save_checkpoint(folder / "classes.pt", with_classes, class_names=["cat", "dog"])),
        "v": idf.load(save_checkpoint(folder / "v.pt", v)),
    }


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """The network with classes as ONNX."""
    path = tmp_path_factory.mktemp("exported") / "unet.onnx"
    models["classes"].export(path, to="onnx")
    return path


def assert_gives_our_images(example, network, about, model, options, sampler):
    draw = SeededNoise(0, [0, 1])
    theirs = example["sample"](
        network, about, lambda shape: draw(th.empty(shape)).numpy(), np.array([1, 0]), steps=sampler["steps"], **options
    )
    classes = dict(classes=["dog", "cat"]) if model.class_names else {}
    *_, last = model.sample_steps(2, seed=0, **classes, **sampler)
    np.testing.assert_allclose(theirs, last.sample.numpy(), atol=1e-3)


ANCESTRAL = (dict(ancestral=True), dict(sampler="ancestral", steps=20))


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, dict(sampler="ddim", steps=10)),
        (dict(scale=3.0), dict(sampler="ddim", steps=4, guidance_scale=3)),
        ANCESTRAL,
    ],
)
def test_the_loop_for_onnx_gives_the_images_of_this_package(models, exported, options, sampler):
    example = runpy.run_path(str(EXAMPLES / "onnx_sample.py"))
    assert_gives_our_images(example, *example["load"](exported), models["classes"], options, sampler)


@pytest.mark.parametrize(("options", "sampler"), [({}, dict(sampler="ddim", steps=5)), ANCESTRAL])
def test_the_loop_for_onnx_starts_from_pure_noise_where_training_did(models, options, sampler):
    example, model = runpy.run_path(str(EXAMPLES / "onnx_sample.py")), models["v"]

    def network(x, timesteps, y):
        with th.no_grad():
            return model.network(th.from_numpy(x), th.from_numpy(timesteps)).numpy()

    assert_gives_our_images(example, network, json.loads(describe(model._loaded)), model, options, sampler)


@pytest.mark.parametrize("words", [[], ["--label", "dog", "--guidance_scale", 2, "--sampler", "ancestral", "--num", 5]])
def test_onnx_sample(monkeypatch, exported, tmp_path, capsys, words):
    run_example(monkeypatch, "onnx_sample.py", exported, tmp_path / "grid.png", "--steps", 3, *words)
    assert pixels(tmp_path / "grid.png").shape == ((16, 24, 3) if words else (32, 32, 3))
    assert "grid.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label", "zebra"], "zebra"),
        (["--label", "12"], "12"),
        (["--steps", 0], "--steps 0"),
        (["--steps", 500], "--steps 500"),
        (["--num", 0], "--num 0"),
    ],
)
def test_onnx_sample_refuses_what_the_network_cannot_do(monkeypatch, exported, tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        run_example(monkeypatch, "onnx_sample.py", exported, tmp_path / "grid.png", *(["--steps", 3] + words))


def test_onnx_sample_refuses_other_files(monkeypatch, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    for path in (tmp_path / "model.pt", tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(SystemExit, match=path.name):
            run_example(monkeypatch, "onnx_sample.py", path, tmp_path / "grid.png")


def test_onnx_sample_guides_no_network_whose_class_was_never_hidden(exported):
    example = runpy.run_path(str(EXAMPLES / "onnx_sample.py"))
    about = {**example["load"](exported)[1], "hidden_class": None}
    args = argparse.Namespace(num=1, steps=3, guidance_scale=2.0, label=None)
    with pytest.raises(SystemExit, match="guidance_scale"):
        example["check"](args, about)


def test_onnx_sample_needs_neither_torch_nor_this_package():
    imported = re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "onnx_sample.py").read_text(), re.M)
    assert set(imported) == {"argparse", "json", "numpy", "onnxruntime", "PIL"}


def test_onnx_sample_draws_any_number_in_fixed_batches(monkeypatch, models, tmp_path, capsys):
    models["classes"].export(tmp_path / "four.onnx", to="onnx", dynamic_batch=False, export_batch=4)
    run_example(monkeypatch, "onnx_sample.py", tmp_path / "four.onnx", tmp_path / "g.png", "--steps", 1, "--num", 7)
    assert ": 7 images" in capsys.readouterr().out
