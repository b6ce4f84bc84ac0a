"""train_images.png: what the network sees, at no cost to the run."""

import itertools

import numpy as np
import pytest
import torch as th
from PIL import Image
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, write_images

import improved_diffusion as idf
from improved_diffusion.config import ReadingConfig
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream, load_data
from improved_diffusion.training import train_images
from improved_diffusion.training.train_images import first_images, write_train_images
from improved_diffusion.utils import images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, 10, size=(20, 30))
    return folder


def stream(folder, **kwargs):
    reading = ReadingConfig(resize_mode="random_crop")
    dataset = ImageDataset(8, open_images(str(folder)), reading=reading)
    return BatchStream(dataset, 5, **{"num_workers": 0, "random_flip": True, **kwargs})


def test_it_shows_the_first_batches_as_the_network_gets_them(photos):
    data = stream(photos)
    shown = first_images(data)
    batches = th.cat([batch for batch, _ in itertools.islice(stream(photos), 2)])
    np.testing.assert_array_equal(shown, images.to_uint8(batches + 1e-3))
    after = th.cat([batch for batch, _ in itertools.islice(data, 2)])
    assert (after == batches).all()  # and looking has changed nothing


def test_it_is_written_once(photos, tmp_path):
    write_train_images(stream(photos), str(tmp_path))
    before = (tmp_path / "train_images.png").read_bytes()
    write_train_images(stream(photos, seed=1), str(tmp_path))
    assert (tmp_path / "train_images.png").read_bytes() == before


@pytest.mark.parametrize("count, size", [(10, 8), (100, 8)])
def test_it_shows_up_to_sixty_four_images(tmp_path, count, size):
    write_images(tmp_path / "in", count)
    data = load_data(data_dir=str(tmp_path / "in"), batch_size=2, image_size=size, num_workers=0)
    assert len(first_images(data)) == min(count, 64)


def test_it_draws_no_random_numbers(photos, tmp_path):
    before, numpy_before = th.get_rng_state(), np.random.get_state()[1].copy()
    write_train_images(stream(photos), str(tmp_path))
    assert (th.get_rng_state() == before).all() and (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("error", [OSError("disk full"), MemoryError(), ValueError("odd")])
def test_a_picture_that_cannot_be_drawn_ends_no_run(photos, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train_images.images, "save_grid", fail)
    write_train_images(stream(photos), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, args", [("image_train", TINY_IMAGE), ("super_res_train", TINY_SUPER_RES)])
def test_a_run_has_it_and_says_what_was_done_to_the_images(photos, tmp_path, script, args):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(photos.iterdir())):
        with Image.open(path) as image:
            image.save(tmp_path / "in" / path.name, exif=exif if i < 3 else Image.Exif())
    done = call(script, *args, "--data_dir", tmp_path / "in", "--batch_size", 2, "--max_steps", 1,
                "--out_dir", tmp_path / "out", cwd=tmp_path).succeed()  # fmt: skip
    assert "3 rotated by EXIF" in done.out
    assert (tmp_path / "out" / "train_images.png").exists()
    call(script, *args, "--data_dir", tmp_path / "in", "--dry_run", "True", "--out_dir", tmp_path / "dry", cwd=tmp_path)
    assert not (tmp_path / "dry").exists()


def test_training_in_python_writes_it_and_resumes_exactly(photos, tmp_path):
    options = dict(
        image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4",
        diffusion_steps=20, noise_schedule="cosine", num_workers=0, batch_size=2, random_flip=True,
        resize_mode="random_crop",
    )  # fmt: skip
    idf.train(photos, max_steps=4, out_dir=str(tmp_path / "whole"), **options)
    idf.train(photos, max_steps=2, out_dir=str(tmp_path / "parts"), **options)
    idf.train(photos, max_steps=4, out_dir=str(tmp_path / "parts"), resume="auto", num_workers=0)
    assert (tmp_path / "whole" / "train_images.png").exists()
    one, two = (th.load(tmp_path / d / "model000004.pt", weights_only=True) for d in ("whole", "parts"))
    assert all(th.equal(one[name], two[name]) for name in one)
