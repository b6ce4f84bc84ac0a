"""What a run trains on, and what its checkpoints say of it."""

import json
import os

import numpy as np
import pytest
from script_helpers import write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError

TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1", attention_resolutions="4",
    diffusion_steps=20, noise_schedule="cosine", num_workers=0, batch_size=2, max_steps=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npz(labels, path="d.npz"):
    pictures = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(path, pictures, np.array(labels))
    return path


def described(folder, step=0):
    return checkpoint.load(os.path.join(folder, f"model{step:06d}.pt"))[1]


@pytest.mark.parametrize("labels", [[1, 2, 3] * 3, [0, 2, 9] * 3], ids=str)
def test_labels_with_gaps_make_no_class_without_images(labels):
    model = idf.train(npz(labels), out_dir="run", class_cond=True, **TINY)
    names = [str(label) for label in sorted(set(labels))]
    assert list(model.class_names) == names
    metadata = described("run")
    assert metadata["config"]["num_classes"] == 3 and metadata["seen_classes"] is None
    assert set(model.sample(12, steps=1, batch_size=12).labels.tolist()) <= {0, 1, 2}
    again = idf.train(npz(labels), out_dir="run", resume="auto", **{**TINY, "max_steps": 2})
    assert again.step == 2 and list(again.class_names) == names


# Images of one class only: (their paths, --labels, the remedy).
ONE_CLASS = {
    "phone": (["cat/IMG_1.png", "cat/IMG_2.png", "bird/IMG_3.png"], "prefix", "--labels folder finds bird, cat"),
    "flat": (["IMG_0001.png", "IMG_0002.png"], "prefix", "name the files"),
    "mixed": (["IMG_0001.png", "cat/IMG_0002.png"], "prefix", "name the files"),
    "folder": (["cat/1.png", "cat/2.png"], "folder", "name the files"),
    "file": (["1.png", "2.png"], "labels.csv", "name the files"),
    "npz": (None, "prefix", "name the files"),
}  # fmt: skip


@pytest.mark.parametrize("form", ONE_CLASS)
def test_images_of_one_class_are_an_error_unless_it_is_asked_for(form, here):
    paths, labels, remedy = ONE_CLASS[form]
    options = dict(data_dir=npz([5] * 4) if paths is None else "photos", labels=labels, class_cond=True, out_dir="run")
    if paths:
        write_images(here / "made", len(paths))
        for path, made in zip(paths, sorted((here / "made").iterdir())):
            (here / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
            made.rename(here / "photos" / path)
    (here / "labels.csv").write_text("1.png,cat\n2.png,cat\n")
    with pytest.raises(UserError, match=rf"of the one class (IMG|cat|5): .*{remedy}.*--num_classes 1"):
        idf.train(**options, **TINY)
    assert not os.path.exists("run")
    idf.train(**options, num_classes=1, **TINY)
    again = idf.train(**options, resume="auto", **{**TINY, "max_steps": 2})
    assert again.step == 2 and len(again.class_names) == 1


def test_a_model_of_more_classes_draws_those_that_it_has_seen():
    model = idf.train(npz([1, 2, 4] * 3), out_dir="run", class_cond=True, num_classes=6, **TINY)
    metadata = described("run")
    assert metadata["class_names"] == ["0", "1", "2", "3", "4"] and metadata["seen_classes"] == [1, 2, 4]
    samples = model.sample(30, steps=1, batch_size=30)
    assert set(samples.labels.tolist()) == {1, 2, 4}
    assert model.sample(1, steps=1, classes="3").labels.tolist() == [3]
    # A resumed run keeps the numbers, as do checkpoints of older versions, which had the same names.
    again = idf.train("d.npz", out_dir="run", resume="auto", **{**TINY, "max_steps": 2})
    assert again.step == 2 and described("run", 2)["class_names"] == ["0", "1", "2", "3", "4"]


def test_held_out_images_have_the_classes_of_the_same_numbers():
    given = dict(val_dir=npz([3, 1], "val.npz"), val_interval=1, val_images=2)
    idf.train(npz([1, 2, 3] * 3), out_dir="run", class_cond=True, **given, **TINY)
    with pytest.raises(UserError, match=r"val\.npz has the class 4, which d\.npz does not have \(it has 1, 2, 3\)"):
        idf.train("d.npz", out_dir="new", class_cond=True, **{**given, "val_dir": npz([4], "val.npz")}, **TINY)


def test_previews_show_classes_that_have_images(monkeypatch):
    shown = []
    monkeypatch.setattr("improved_diffusion.training.tasks.PreviewGrid", lambda *args: shown.append(args[3]) or print)
    monkeypatch.setattr("improved_diffusion.training.loop.TrainLoop.run_loop", lambda loop: None)
    with pytest.raises(UserError, match=r"no .*checkpoint"):
        idf.train(npz([1, 2, 4] * 3), out_dir="run", class_cond=True, num_classes=6, sample_interval=1, **TINY)
    assert set(shown[0]["y"].tolist()) == {1, 2, 4}


def test_unused_labels_disturb_nobody():
    for labels in (np.zeros((4, 1), int), np.array([{}] * 4)):
        assert idf.train(npz(labels), out_dir="run", **TINY).step == 1
        os.rename("run", f"run{labels.ndim}{labels.dtype.kind}")


def test_a_run_in_the_folder_of_its_images_does_not_train_on_its_own_pictures(here):
    write_images(here, 6)
    write_images(here / ".ipynb_checkpoints", 2)
    idf.train(".", out_dir="runs/x", **TINY)
    write_images(here / "runs/x/previews", 3)
    assert (here / "runs/x/curves.png").exists()
    idf.train(".", out_dir="runs/x", resume="auto", **{**TINY, "max_steps": 2})
    with open("runs/x/log.txt") as f:
        log = f.read()
    assert log.count(": 6 images; ") == 2 and "1 hidden" in log and "1 folder of a run" in log
    assert json.loads((here / "runs/x/config.json").read_text())["num_images"] == 6
