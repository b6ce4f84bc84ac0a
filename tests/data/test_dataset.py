"""Images on disk -> a seekable, sharded stream of batches."""

import io
import itertools
import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import assert_golden, golden
from PIL import Image
from script_helpers import write_images

from improved_diffusion import distributed
from improved_diffusion.config import ReadingConfig, UserError
from improved_diffusion.data import dataset as dataset_module
from improved_diffusion.data.classes import read_classes
from improved_diffusion.data.dataset import ImageDataset, check_images, selection
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream, load_data
from improved_diffusion.logs import logger
from improved_diffusion.nn import NULL_LABEL
from improved_diffusion.utils import images

RNG = np.random.default_rng(7)
PICTURES = RNG.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


def write(folder, arrays, name="{i:03d}.png"):
    """Save each array as a PNG under its name, in which {i} is its number; returns the folder's path."""
    for i, array in enumerate(arrays):
        path = folder / name.format(i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode_png(array))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    """Ten images of 16 x 16."""
    return write(tmp_path / "pictures", PICTURES)


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        names = [os.path.join(at, name) for at, _, files in os.walk(folder) for name in files]
        for name in sorted(names, reverse=True):
            archive.write(name, os.path.relpath(name, folder))
        archive.writestr("__MACOSX/._000.png", b"not an image")
        archive.writestr("notes.txt", b"hello")
    return str(path)


def stream(data_dir, batch_size=3, **kwargs):
    arguments = dict(image_size=16, num_workers=0)
    return load_data(data_dir=str(data_dir), batch_size=batch_size, **{**arguments, **kwargs})


def take(data, n):
    return [batch for batch, _ in itertools.islice(data, n)]


def which(batch):
    """The numbers of the pictures of a batch."""
    found = images.to_uint8(batch + 1e-3)
    return [next(i for i, picture in enumerate(PICTURES) if (picture == image).all()) for image in found]


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    monkeypatch.setattr(distributed, "from_rank0", lambda function, *args: function(*args))


# Pixels and order


@pytest.fixture
def golden_folder(tmp_path):
    arrays = golden("image_pipeline")
    for i in range(5):
        path = tmp_path / f"sub{i % 2}" / f"{['cat', 'dog', 'bird'][i % 3]}_{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(arrays[f"image{i}"]).save(path)
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_batch_is_the_published_pipelines(golden_folder, tmp_path_factory, kind):
    source = golden_folder if kind == "folder" else zip_of(golden_folder, tmp_path_factory.mktemp("z") / "a.zip")
    batch, kwargs = next(stream(source, 5, image_size=32, class_cond=True, deterministic=True))
    arrays = golden("image_pipeline")
    assert batch.dtype == th.float32
    assert_golden(batch, arrays["batch32"])
    assert_golden(kwargs["y"], arrays["y"])


def test_folder_zip_and_npz_give_the_same_batches(folder, tmp_path):
    np.savez(tmp_path / "a.npz", PICTURES)
    sources = [folder, zip_of(folder, tmp_path / "a.zip"), tmp_path / "a.npz"]
    for kwargs in (dict(deterministic=True), dict(seed=5, random_flip=True)):
        batches = [take(stream(source, **kwargs), 8) for source in sources]
        for one, two, three in zip(*batches):
            assert one.shape == (3, 3, 16, 16)
            assert (one == two).all() and (one == three).all()


def test_entries_are_taken_in_sorted_order_a_folder_where_it_stands(tmp_path):
    names = ["b/2.png", "b/10.png", "a.png", "c.JPG", "b.png", "a/z/1.png", "d.gif"]
    for name, picture in zip(names, PICTURES):
        write(tmp_path / "in", [picture], name)
    (tmp_path / "in" / "e.txt").touch()
    expected = ["a/z/1.png", "a.png", "b/10.png", "b/2.png", "b.png", "c.JPG", "d.gif"]
    for source in (open_images(str(tmp_path / "in")), open_images(zip_of(tmp_path / "in", tmp_path / "in.zip"))):
        assert [source.name(i) for i in range(len(source))] == expected
    assert source.describe(0) == f"{tmp_path}/in.zip:a/z/1.png"


def test_order_of_files_on_disk_does_not_matter(folder, monkeypatch):
    expected = take(stream(folder), 4)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])
    for one, two in zip(expected, take(stream(folder), 4)):
        assert (one == two).all()


def test_deterministic_keeps_the_order_and_goes_round(folder):
    numbers = [i for batch in take(stream(folder, deterministic=True), 5) for i in which(batch)]
    assert numbers == [i % 10 for i in range(15)]


@pytest.mark.parametrize("batch_size", [3, 5, 10])
def test_each_image_comes_exactly_once_per_epoch(folder, batch_size):
    numbers = [i for batch in take(stream(folder, batch_size), 30 // batch_size) for i in which(batch)]
    epochs = [numbers[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != list(range(10))


def test_order_is_a_function_of_the_seed(folder):
    def order(**kwargs):
        return [which(batch) for batch in take(stream(folder, **kwargs), 7)]

    assert order() == order(seed=0) == order(seed=0) != order(seed=1)
    flat = [i for batch in order(batch_size=3) for i in batch]
    assert flat[:20] == [i for batch in order(batch_size=5) for i in batch][:20]  # whatever the batch


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11])
def test_seek_goes_to_the_batch_of_a_step(folder, step):
    expected = list(itertools.islice(stream(folder, random_flip=True, class_cond=True, labels=labels_of(folder)), 14))
    data = stream(folder, random_flip=True, class_cond=True, labels=labels_of(folder))
    next(data)
    data.seek(step)
    for batch, kwargs in expected[step : step + 3]:
        other, other_kwargs = next(data)
        assert (batch == other).all() and (kwargs["y"] == other_kwargs["y"]).all()


def labels_of(folder):
    path = os.path.join(folder, "labels.json")
    with open(path, "w") as f:
        json.dump({f"{i:03d}.png": i % 3 for i in range(10)}, f)
    return path


def test_workers_change_nothing(folder):
    expected = take(stream(folder, seed=3, random_flip=True), 6)
    data = stream(folder, seed=3, random_flip=True, num_workers=2)
    for one, two in zip(expected, take(data, 6)):
        assert (one == two).all()
    data.seek(2)
    assert (next(data)[0] == expected[2]).all()
    data.batches = None  # ends the workers


def test_the_training_generators_are_not_advanced(folder):
    before, numpy_before = th.get_rng_state(), np.random.get_state()[1].copy()
    take(stream(folder, random_flip=True), 5)
    assert (th.get_rng_state() == before).all() and (np.random.get_state()[1] == numpy_before).all()


# Ranks


@pytest.mark.parametrize("world_size, batch_size", [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_batch_of_one_rank(folder, monkeypatch, world_size, batch_size):
    whole = [which(batch) for batch in take(stream(folder, 6), 5)]
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append([which(batch) for batch in take(stream(folder, batch_size), 5)])
    for step in range(5):
        assert sorted(i for share in shares for i in share[step]) == sorted(whole[step])
        assert [share[step][0] for share in shares] == whole[step][:world_size]


def test_a_rank_seeks_in_the_common_order(folder, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    expected = [which(batch) for batch in take(stream(folder, 2), 5)]
    data = stream(folder, 2)
    data.seek(4)
    assert which(next(data)[0]) == expected[4]


def test_a_batch_larger_than_a_ranks_share_is_named(folder, monkeypatch):
    assert next(stream(folder, 10))[0].shape[0] == 10
    with pytest.raises(UserError, match=r"--batch_size 11.*10 images"):
        stream(folder, 11)
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(UserError, match=r"--batch_size 3.*2 images.*4 ranks.*10.*fewer ranks"):
        stream(folder, 3)


# Flips


def test_half_of_the_images_are_mirrored(folder):
    plain, flipped = (stream(folder, 10, seed=2, random_flip=flip) for flip in (False, True))
    mirrored = []
    for one, two in zip(take(plain, 20), take(flipped, 20)):
        for a, b in zip(one, two):
            mirrored.append(not (a == b).all())
            assert (b == (a.flip(-1) if mirrored[-1] else a)).all()
    assert 70 < sum(mirrored) < 130
    assert sum(mirrored[:10]) not in (0, 10)


# Hidden classes


def labels_drawn(folder, batch_size, batches, **kwargs):
    dataset = ImageDataset(16, open_images(folder), [i % 3 for i in range(10)])
    data = BatchStream(dataset, batch_size, num_workers=0, **kwargs)
    return [kwargs["y"].tolist() for _, kwargs in itertools.islice(data, batches)]


def test_a_share_of_the_classes_is_hidden(folder):
    plain, dropped = (labels_drawn(folder, 10, 40, seed=2, label_drop=drop) for drop in (0.0, 0.3))
    pairs = [pair for one, two in zip(plain, dropped) for pair in zip(one, two)]
    assert all(two in (one, NULL_LABEL) for one, two in pairs) and all(one >= 0 for one, _ in pairs)
    hidden = [two == NULL_LABEL for _, two in pairs]
    assert sum(hidden) == pytest.approx(120, abs=5 * math.sqrt(400 * 0.3 * 0.7))
    assert hidden[:10] != hidden[10:20]  # others in each epoch


@pytest.mark.parametrize("world_size", [2, 5])
def test_which_classes_are_hidden_depends_on_neither_batch_nor_ranks(folder, monkeypatch, world_size):
    expected = labels_drawn(folder, 10, 4, label_drop=0.5)
    again = [y for ys in labels_drawn(folder, 5, 8, label_drop=0.5) for y in ys]
    assert again == [y for ys in expected for y in ys]
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(labels_drawn(folder, 10 // world_size, 4, label_drop=0.5))
    for step, ys in enumerate(expected):
        assert sorted(y for share in shares for y in share[step]) == sorted(ys)


# Classes


def classes_of(source, labels, **kwargs):
    return read_classes(open_images(str(source)), str(labels), str(source), **kwargs)


def test_classes_by_prefix_follow_their_sorted_names(tmp_path):
    for name, picture in zip(["x/dog_1_a.png", "x/cat_2.png", "y/dog_3.png", "bird_7.png", "bird_8.png"], PICTURES):
        write(tmp_path, [picture], name)
    assert classes_of(tmp_path, "prefix") == ([0, 0, 1, 2, 2], ["bird", "cat", "dog"])


def test_classes_by_folder(tmp_path):
    for name, picture in zip(["dog/1.png", "cat/a/2.png", "cat/a/3.png", "cat/b/4.png", "cat/b/5.png"], PICTURES):
        write(tmp_path / "in", [picture], name)
    expected = ([0, 0, 1, 1, 2], ["cat/a", "cat/b", "dog"])
    assert classes_of(tmp_path / "in", "folder") == expected
    assert classes_of(zip_of(tmp_path / "in", tmp_path / "in.zip"), "folder") == expected
    write(tmp_path / "in", PICTURES[:1], "loose.png")
    with pytest.raises(UserError, match=r"loose\.png is in no folder"):
        classes_of(tmp_path / "in", "folder")


LABEL_TABLE = {f"{i:03d}.png": i % 3 for i in range(10)}
NAMED_TABLE = {f"{i:03d}.png": ["dog", "cat", "ant"][i % 3] for i in range(10)}


@pytest.mark.parametrize(
    "content, names, first", [
        (LABEL_TABLE, ["0", "1", "2"], [0, 1, 2]),
        (list(LABEL_TABLE.items()), ["0", "1", "2"], [0, 1, 2]),
        ({"labels": list(LABEL_TABLE.items())}, ["0", "1", "2"], [0, 1, 2]),
        (NAMED_TABLE, ["ant", "cat", "dog"], [2, 1, 0]),
        ({**LABEL_TABLE, "elsewhere.png": 5}, ["0", "1", "2"], [0, 1, 2]),
        ({**LABEL_TABLE, "009.png": 7}, ["0", "1", "2", "7"], [0, 1, 2]),
    ],
)  # fmt: skip
def test_classes_from_a_json_file(folder, tmp_path, content, names, first):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    classes, found = classes_of(folder, path)
    assert found == names and classes[:3] == first
    kwargs = next(stream(folder, 3, class_cond=True, labels=str(path), deterministic=True))[1]
    assert kwargs["y"].dtype == th.int64 and kwargs["y"].tolist() == first


@pytest.mark.parametrize(
    "text, culprits", [
        ("{", ["JSON"]), ("3", ["JSON"]), ('["a"]', ["JSON"]), ('{"000.png": 1}', ["001.png", "8 more of 10"]),
        (json.dumps({**LABEL_TABLE, "003.png": 1.5}), ["003.png", "1.5"]),
        (json.dumps({**LABEL_TABLE, "003.png": True}), ["003.png", "True"]),
        (json.dumps({**LABEL_TABLE, "003.png": -1}), ["negative", "-1"]),
    ],
)  # fmt: skip
def test_a_wrong_label_file_is_named(folder, tmp_path, text, culprits):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(UserError) as error:
        classes_of(folder, tmp_path / "labels.json")
    for culprit in culprits:
        assert culprit in str(error.value)


def test_labels_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", PICTURES, np.arange(10) % 4)
    kwargs = next(stream(tmp_path / "a.npz", 5, class_cond=True, deterministic=True))[1]
    assert kwargs["y"].tolist() == [0, 1, 2, 3, 0]
    np.savez(tmp_path / "b.npz", PICTURES)
    with pytest.raises(UserError, match=r"b\.npz has no arr_1"):
        stream(tmp_path / "b.npz", class_cond=True)


def test_every_image_a_class_of_its_own_is_an_error(folder):
    with pytest.raises(UserError, match=r"each of the 10 images.*--labels folder"):
        stream(folder, class_cond=True)


def test_class_names_ride_along(tmp_path):
    write(tmp_path, PICTURES[:4], "dog_{i}.png")
    write(tmp_path, PICTURES[4:], "cat_{i}.png")
    assert stream(tmp_path, class_cond=True).class_names == ["cat", "dog"]
    data = stream(tmp_path)
    assert data.class_names is None and next(data)[1] == {}


# Channels and sizes


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_one_to_four_channels(tmp_path, channels):
    arrays = RNG.integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
    batch = next(stream(write(tmp_path, arrays), channels=channels, image_size=8, deterministic=True))[0]
    np.testing.assert_array_equal(images.to_uint8(batch + 1e-3), arrays)


def test_grey_and_alpha_become_rgb_unless_channels_are_given(tmp_path):
    write(tmp_path, RNG.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8), "grey{i}.png")
    write(tmp_path, RNG.integers(0, 256, (2, 8, 8, 4), dtype=np.uint8), "alpha{i}.png")
    batch = next(stream(tmp_path, 4, image_size=8, deterministic=True))[0]
    assert batch.shape == (4, 3, 8, 8)
    assert (batch[2:, 0] == batch[2:, 1]).all() and (batch[2:, 0] == batch[2:, 2]).all()


@pytest.mark.parametrize("has, channels", [(3, 1), (4, 1), (3, 2), (4, 2)])
def test_images_that_do_not_fit_the_channels_are_named_before_training(tmp_path, has, channels):
    write(tmp_path, RNG.integers(0, 256, (4, 8, 8, channels), dtype=np.uint8), "a{i}.png")
    write(tmp_path, RNG.integers(0, 256, (1, 8, 8, has), dtype=np.uint8), "b.png")
    with pytest.raises(UserError, match=rf"b\.png has {has} channel.*--channels {channels}"):
        stream(tmp_path, channels=channels, image_size=8)


def test_images_need_not_be_square(folder):
    assert next(stream(folder, image_size=(8, 24)))[0].shape == (3, 3, 8, 24)
    assert next(stream(folder, image_size="8x24"))[0].shape == (3, 3, 8, 24)


# Damaged images and empty places


def damage(path, how):
    path = Path(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}[how])


def hundred(tmp_path):
    return write(tmp_path / "hundred", RNG.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("how", ["empty", "text", "cut"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_one_unreadable_image_in_a_hundred_is_left_out(tmp_path, how, kind):
    source = hundred(tmp_path)
    damage(os.path.join(source, "042.png"), how)
    source = source if kind == "folder" else zip_of(source, tmp_path / "a.zip")
    data = stream(source, 9, image_size=8)
    assert data.num_images == 99 and len(data.skipped_names()) == 1 and data.skipped_names()[0].endswith("042.png")
    seen = th.cat(take(data, 22))
    assert len({image.numpy().tobytes() for image in seen[:99]}) == 99  # an epoch of the others
    assert len({image.numpy().tobytes() for image in seen}) == 99


@pytest.mark.parametrize("total, bad, skipped", [
    (100, 5, True), (100, 6, False), (10, 5, True), (8, 4, True), (8, 5, False), (3, 1, True), (3, 2, False),
    (1, 1, False), (700, 7, True), (700, 8, False),
])  # fmt: skip
def test_a_few_unreadable_images_are_left_out_and_more_are_an_error_that_names_them(tmp_path, total, bad, skipped):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(total):
        (folder / f"{i:03d}.png").write_bytes(b"hello" if i < bad else images.encode_png(PICTURES[i % 10]))
    if skipped:
        data = stream(folder, 1, image_size=16)
        assert data.num_images == total - bad and len(data.skipped_names()) == bad
        next(data)
        return
    with pytest.raises(UserError, match=rf"{bad} of {total} images are unreadable.*000\.png"):
        stream(folder, 1, image_size=16)


def test_checking_leaves_the_warnings_filters_as_they_were(tmp_path):
    before = list(warnings.filters)
    stream(hundred(tmp_path), image_size=8)
    assert warnings.filters == before


def test_of_very_many_images_an_even_selection_is_read_beforehand(tmp_path, monkeypatch, capsys):
    source = hundred(tmp_path)
    monkeypatch.setattr(dataset_module, "MAX_CHECKED", 10)  # 0, 11, 22, ...
    damage(os.path.join(source, "042.png"), "text")
    data = stream(source, 100, image_size=8, deterministic=True)
    batch = next(data)[0]
    assert batch.shape[0] == 100 and (batch[42] == batch[43]).all()
    take(data, 2)
    assert len(re.findall(r"042\.png is not a readable image.*another image is used", capsys.readouterr().out)) == 1
    for i in (7, 8, 9, 30, 31):
        damage(os.path.join(source, f"{i:03d}.png"), "text")
    data = stream(source, 100, image_size=8, deterministic=True)
    with pytest.raises(UserError, match=r"6 of 100 images.*007\.png is not a readable.*008\.png is not a readable"):
        next(data)


@pytest.mark.parametrize("name", ["a.zip", "a.npz"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UserError, match=name):
        stream(tmp_path / name)


def test_places_without_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    for data_dir, message in (
        ("", "--data_dir is missing"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "empty", "empty holds no images"),
        (tmp_path / "empty.zip", r"empty\.zip holds no images"),
        (tmp_path / "a.txt", "neither a folder nor"),
    ):
        with pytest.raises(UserError, match=message):
            stream(data_dir)


# The published class


def test_dataset_takes_paths_and_shards(folder):
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    shards = [ImageDataset(16, paths, classes=list(range(10)), shard=shard, num_shards=3) for shard in range(3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    for number in range(10):
        array, kwargs = shards[number % 3][number // 3]
        assert array.dtype == np.float32 and array.shape == (3, 16, 16) and kwargs["y"] == number
        np.testing.assert_allclose(array, PICTURES[number].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert ImageDataset(16, paths)[0][1] == {}


def test_stream_of_any_dataset_of_images(folder):
    dataset = ImageDataset(16, open_images(folder))
    data = BatchStream(dataset, 4, num_workers=0, shuffle=False, check=False)
    assert iter(data) is data and which(next(data)[0]) == [0, 1, 2, 3]


def test_an_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(buffer.getvalue())
    assert (next(stream(tmp_path, 1, image_size=8))[0] == 1).all()


def test_a_link_back_is_not_followed(tmp_path):
    write_images(tmp_path / "images" / "inner", 3)
    (tmp_path / "images" / "inner" / "back").symlink_to(tmp_path / "images")
    assert len(open_images(str(tmp_path / "images"))) == 3


def test_a_name_that_is_twice_in_a_zip_is_one_image(tmp_path):
    write_images(tmp_path / "images", 2)
    first, second = sorted((tmp_path / "images").iterdir())
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for path in (first, second, first):
            archive.write(path, "same.png" if path == first else path.name)
    assert len(open_images(str(tmp_path / "twice.zip"))) == 2


def test_a_selection_is_the_same_each_time_and_of_all_kinds():
    assert selection(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = selection(1000, 100)
    np.testing.assert_array_equal(chosen, selection(1000, 100))
    assert (np.diff(chosen) > 0).all() and chosen.max() < 1000
    # Of ten classes, one after another or in turn, about ten each.
    for classes in (chosen // 100, chosen % 10):
        assert np.bincount(classes, minlength=10).min() >= 3


@pytest.mark.parametrize("mode, kept", [("crop", True), ("random_crop", False)])
def test_checking_keeps_the_pixels_so_that_each_file_is_read_once(tmp_path, monkeypatch, mode, kept):
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    dataset = ImageDataset(8, open_images(str(tmp_path)), reading=ReadingConfig(resize_mode=mode))
    other = ImageDataset(8, open_images(str(tmp_path)), reading=ReadingConfig(resize_mode=mode))
    check_images(dataset)
    assert dataset.store.there.sum() == (3 if kept else 0)
    if kept:
        monkeypatch.setattr(dataset, "read", lambda idx: pytest.fail("read again"))
    for i in range(3):
        np.testing.assert_array_equal(dataset[i][0], other[i][0])


def test_a_long_check_shows_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "SILENT", -1.0)
    logger.configure(str(tmp_path / "log"), format_strs=["log"])
    for i in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    check_images(ImageDataset(8, open_images(str(tmp_path))))
    assert "reading images: 100%" in (tmp_path / "log" / "log.txt").read_text()
