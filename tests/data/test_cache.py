"""The packed cache: the same pixels, made once, whatever happens on the way."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image
from script_helpers import run, start, wait, wait_for

from improved_diffusion.config import ReadingConfig, UserError
from improved_diffusion.data import cache, packing, workers
from improved_diffusion.data import dataset as dataset_module
from improved_diffusion.data.cache import use_cache
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.packed import CacheError
from improved_diffusion.data.pixels import to_model_range
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream, load_data
from improved_diffusion.nn import NULL_LABEL
from improved_diffusion.utils import files, images

RNG = np.random.default_rng(3)
COUNT = 24


def noise(height, width, channels):
    return images.to_image(RNG.integers(0, 256, (height, width, channels), dtype=np.uint8))


def write_mixed(folder, count=COUNT):
    """Images of several sizes, formats and modes, some with an orientation, some transparent."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        kind = i % 6
        path = folder / ("sub" if kind == 1 else ".") / f"{'ab'[i % 2]}_{i:03d}.{['png', 'jpg'][kind == 2]}"
        path.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        if kind == 2:
            exif[0x0112] = 6
        channels = {3: 4, 4: 1, 5: 2}.get(kind, 3)
        noise(20 + i, 31, channels).save(path, exif=exif)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("data") / "mixed")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "grey"
    folder.mkdir()
    for i in range(COUNT):
        noise(20, 20 + i, 1).save(folder / f"{i:03d}.png")
    return str(folder)


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for each in sorted(Path(folder).rglob("*.*")):
            archive.write(each, each.relative_to(folder))
    return str(path)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(packing, "PART", 5)
    monkeypatch.setattr(packing, "workers_for_cores", lambda: 0)


def dataset_of(data_dir, size=16, **kwargs):
    return ImageDataset(size, open_images(str(data_dir)), **kwargs)


def packed(data_dir, root, size=16, **kwargs):
    dataset = dataset_of(data_dir, size, **kwargs)
    use_cache(dataset, str(root), str(data_dir))
    return dataset


def pixels(dataset):
    return [dataset.pixels(i).copy() for i in range(len(dataset))]


def assert_same_pixels(one, two):
    for a, b in zip(pixels(one), pixels(two), strict=True):
        np.testing.assert_array_equal(a, b)


def the_folder(root):
    (found,) = Path(root).iterdir()
    return found


def the_pixels(root):
    (found,) = the_folder(root).glob("pixels-*.npy")
    return found


def forbid_reading(monkeypatch):
    monkeypatch.setattr(ImageDataset, "shown", lambda self, i: pytest.fail(f"image {i} is read again"))


# The same pixels

READINGS = {
    "crop": dict(), "pad": dict(resize_mode="pad", background="red"), "stretch": dict(resize_mode="stretch"),
    "on black": dict(background="black"), "published": dict(published_decoding=True),
}  # fmt: skip


@pytest.mark.parametrize(
    "reading, size, channels",
    [(reading, size, channels) for reading in READINGS for size, channels in ((16, 3), ("8x24", 3), (40, 4))
     if channels == 3 or reading != "published"],  # the published decoding is of RGB alone
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_packed_pixels_are_those_of_the_files(folder, tmp_path, kind, reading, size, channels):
    data_dir = folder if kind == "folder" else zipped(folder, tmp_path / "a.zip")
    kwargs = dict(size=size, channels=channels, reading=ReadingConfig(**READINGS[reading]))
    dataset = packed(data_dir, tmp_path / "cache", **kwargs)
    assert dataset.store.done is not None and dataset.store.there.all()
    assert_same_pixels(dataset, dataset_of(data_dir, **kwargs))


@pytest.mark.parametrize("channels", [1, 2])
def test_packed_grey_pixels_are_those_of_the_files(grey, tmp_path, channels):
    assert_same_pixels(packed(grey, tmp_path, channels=channels), dataset_of(grey, channels=channels))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_arrays_of_the_models_size_are_taken_as_they_are(tmp_path, monkeypatch, channels, mode):
    arrays = RNG.integers(0, 256, (6, 16, 16, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arrays)
    kwargs = dict(channels=channels, reading=ReadingConfig(resize_mode=mode))
    dataset, read = packed(tmp_path / "a.npz", tmp_path / "cache", **kwargs), dataset_of(tmp_path / "a.npz", **kwargs)
    assert not (tmp_path / "cache").exists()  # they are in memory
    read.store = None
    assert_same_pixels(dataset, read)
    with BatchStream(dataset, 2, num_workers="auto") as data:
        assert data.num_workers == 0


def test_arrays_of_another_size_are_packed(tmp_path):
    np.savez(tmp_path / "a.npz", RNG.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8))
    assert_same_pixels(packed(tmp_path / "a.npz", tmp_path / "cache"), dataset_of(tmp_path / "a.npz"))
    assert the_pixels(tmp_path / "cache")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_same_batches(folder, tmp_path, num_workers):
    arguments = dict(data_dir=folder, batch_size=7, image_size=16, class_cond=True, random_flip=True, seed=5)
    with (
        load_data(**arguments, num_workers=0) as plain,
        load_data(**arguments, num_workers=num_workers, cache=str(tmp_path)) as data,
    ):
        for _ in range(9):
            (one, kwargs), (two, other) = next(plain), next(data)
            assert th.equal(one, two) and th.equal(kwargs["y"], other["y"])
        plain.seek(2), data.seek(2)
        assert th.equal(next(plain)[0], next(data)[0])


def label_of(i):
    return i % 3


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("where", ["files", "memory", "cache"])
def test_bytes_are_the_same_batches(folder, tmp_path, where, num_workers):
    def stream(**kwargs):
        dataset = dataset_of(folder, classes=[label_of(i) for i in range(COUNT)])
        if where == "files":
            dataset.store = None
        use_cache(dataset, str(tmp_path) if where == "cache" else "off", folder)
        return BatchStream(dataset, 7, random_flip=True, label_drop=0.3, seed=9, **kwargs)

    with stream(num_workers=0) as plain, stream(num_workers=num_workers, as_bytes=True) as data:
        for (one, kwargs), (two, other) in zip(itertools.islice(plain, 8), data):
            assert two.dtype == th.uint8 and two.shape == one.shape and one.dtype == th.float32
            assert one.is_contiguous() and th.equal(to_model_range(two, "cpu"), one)
            assert th.equal(kwargs["y"], other["y"]) and kwargs["y"].dtype == th.int64


def test_flips_and_hidden_classes_are_numpys_draws(folder):
    def stream(**kwargs):
        dataset = dataset_of(folder, classes=[label_of(i) for i in range(COUNT)])
        return BatchStream(dataset, 10, num_workers=0, seed=9, as_bytes=True, **kwargs)

    drawn = zip(stream(), stream(random_flip=True, label_drop=0.3))
    for step, ((plain, kwargs), (flipped, hidden)) in enumerate(itertools.islice(drawn, 8)):
        for n in range(10):
            epoch, place = divmod(10 * step + n, COUNT)
            flip = np.random.default_rng((9, epoch, place)).random() < 0.5
            drop = np.random.default_rng((9, epoch, place, 1)).random() < 0.3
            assert th.equal(flipped[n], plain[n].flip(2) if flip else plain[n])
            assert hidden["y"][n] == (NULL_LABEL if drop else kwargs["y"][n])


def test_anyone_can_look_at_the_file(folder, tmp_path):
    dataset = packed(folder, tmp_path)
    np.testing.assert_array_equal(np.load(the_pixels(tmp_path)), np.stack(pixels(dataset)))
    assert {path.name for path in the_folder(tmp_path).iterdir()} - {".lock"} == {
        "cache.json", the_pixels(tmp_path).name
    }  # fmt: skip


# Made once


def test_a_second_run_reads_no_image(folder, tmp_path, monkeypatch):
    first = packed(folder, tmp_path)
    stamp = the_pixels(tmp_path).stat().st_mtime_ns
    forbid_reading(monkeypatch)
    second = packed(folder, tmp_path)
    with BatchStream(second, 5, num_workers="auto") as data:
        next(data)
        assert data.num_workers == 0 and data.checked.num_read == COUNT
    assert_same_pixels(first, second)
    assert the_pixels(tmp_path).stat().st_mtime_ns == stamp


def test_what_was_done_to_the_images_is_kept(folder, tmp_path):
    expected = BatchStream(dataset_of(folder), 5, num_workers=0).checked
    for _ in range(2):
        found = BatchStream(packed(folder, tmp_path), 5, num_workers=0).checked
        assert found == expected and "rotated by EXIF" in found.done


CHANGES = {
    "size": dict(size=24), "shape": dict(size="16x24"), "channels": dict(channels=4),
    "resize_mode": dict(reading=ReadingConfig(resize_mode="pad")),
    "background": dict(reading=ReadingConfig(background="blue")),
    "max_image_pixels": dict(reading=ReadingConfig(max_image_pixels=10**6)),
    "decoding": dict(reading=ReadingConfig(published_decoding=True)),
}  # fmt: skip


def test_every_option_of_reading_is_part_of_the_key():
    assert {f.name for f in dataclasses.fields(ReadingConfig)} == {
        "resize_mode", "background", "max_image_pixels", "published_decoding"
    }  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_have_a_cache_of_their_own(folder, tmp_path, change):
    packed(folder, tmp_path)
    assert_same_pixels(packed(folder, tmp_path, **CHANGES[change]), dataset_of(folder, **CHANGES[change]))
    assert len(list(tmp_path.iterdir())) == 2
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))


def test_another_pillow_has_a_cache_of_its_own(folder, tmp_path, monkeypatch):
    packed(folder, tmp_path)
    monkeypatch.setattr("PIL.__version__", "99.0")
    packed(folder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_folder_of_the_same_name_has_a_cache_of_its_own(tmp_path):
    one, two = write_mixed(tmp_path / "x" / "data", 6), write_mixed(tmp_path / "y" / "data", 6)
    first, second = packed(one, tmp_path / "cache"), packed(two, tmp_path / "cache")
    assert_same_pixels(first, dataset_of(one))
    assert_same_pixels(second, dataset_of(two))


def add(folder):
    noise(20, 20, 3).save(folder / "z_new.png")


def remove(folder):
    (folder / "a_000.png").unlink()


def rename(folder):
    (folder / "a_000.png").rename(folder / "z.png")


def replace(folder):
    time.sleep(0.01)
    noise(20, 20, 3).save(folder / "a_000.png")


@pytest.mark.parametrize("change", [add, remove, rename, replace])
def test_changed_images_are_packed_again(tmp_path, change, capsys):
    folder = write_mixed(tmp_path / "data", 12)
    before = packed(folder, tmp_path / "cache")
    old = pixels(before)
    change(tmp_path / "data")
    assert_same_pixels(packed(folder, tmp_path / "cache"), dataset_of(folder))
    assert "others than when they were packed" in capsys.readouterr().out
    assert the_pixels(tmp_path / "cache")  # the old file is gone
    assert all((a == b).all() for a, b in zip(old, pixels(before)))  # and a run that uses it still has it


# Kills and damage


def kill_after(monkeypatch, parts):
    """Let packing end, as if the process were killed, when so many parts are written."""
    note, noted = packing._note, []

    def noting(*args):
        if len(noted) == parts:
            raise KeyboardInterrupt
        noted.append(args)
        note(*args)

    monkeypatch.setattr(packing, "_note", noting)


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_packing_goes_on_where_it_was_killed(folder, tmp_path, monkeypatch, parts):
    with monkeypatch.context() as killed:
        kill_after(killed, parts)
        with pytest.raises(KeyboardInterrupt):
            packed(folder, tmp_path)
    with open(next(the_folder(tmp_path).glob("parts-*")) if parts else os.devnull, "a") as f:
        f.write('{"part": 4, "miss')  # a line cut off
    assert dataset_of(folder).store.done is None and not (the_folder(tmp_path) / "cache.json").exists()
    read = []
    prepare = ImageDataset.prepare
    monkeypatch.setattr(ImageDataset, "prepare", lambda self, i: read.append(i) or prepare(self, i))
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))
    assert read == list(range(5 * parts, COUNT))


def test_parts_of_other_images_do_not_count(tmp_path, monkeypatch):
    folder = write_mixed(tmp_path / "data", 12)
    with monkeypatch.context() as killed:
        kill_after(killed, 2)
        with pytest.raises(KeyboardInterrupt):
            packed(folder, tmp_path / "cache")
    replace(tmp_path / "data")
    assert_same_pixels(packed(folder, tmp_path / "cache"), dataset_of(folder))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    path.write_bytes(b"")


def other(path):
    np.save(path, np.zeros((3, 3), np.uint8))


def text(path):
    path.write_text("hello")


@pytest.mark.parametrize("damage", [cut, empty, other, text, os.unlink])
@pytest.mark.parametrize("which", ["pixels", "about"])
def test_a_damaged_cache_is_packed_again(folder, tmp_path, damage, which, capsys):
    packed(folder, tmp_path)
    damage(the_pixels(tmp_path) if which == "pixels" else the_folder(tmp_path) / "cache.json")
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))
    if (damage, which) != (os.unlink, "about"):
        assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{}", '{"identity": 3}'])
def test_a_strange_description_is_no_traceback(folder, tmp_path, content):
    packed(folder, tmp_path)
    (the_folder(tmp_path) / "cache.json").write_text(content)
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))


@pytest.mark.parametrize("missing", [[COUNT], ["a"], 3, None])
def test_a_strange_list_of_missing_images_is_no_traceback(folder, tmp_path, missing):
    packed(folder, tmp_path)
    about = json.loads((the_folder(tmp_path) / "cache.json").read_text())
    (the_folder(tmp_path) / "cache.json").write_text(json.dumps({**about, "missing": missing}))
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))


def full(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["space", "reserve", "write"])
def test_a_full_disk_is_one_error_and_leaves_nothing(folder, tmp_path, monkeypatch, where):
    if where == "space":
        monkeypatch.setattr(packing, "free_bytes", lambda folder: 100)
    elif where == "reserve":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*--cache"):
        packed(folder, tmp_path)
    assert {path.name for path in the_folder(tmp_path).iterdir()} <= {".lock"}


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*--cache"):
        packed(folder, tmp_path / "file")


# Several runs at once


def test_a_second_run_waits_for_the_first_and_uses_its_cache(folder, tmp_path, capsys):
    with files.lock(tmp_path) as _:
        pass  # filelock is imported before the threads
    first = dataset_of(folder)
    place = cache._place(first, str(tmp_path), folder, 9)
    os.makedirs(place.folder)
    from filelock import FileLock

    held, found = FileLock(os.path.join(place.folder, ".lock"), thread_local=False), []
    with held:
        thread = threading.Thread(target=lambda: found.append(packed(folder, tmp_path)))
        thread.start()
        deadline = time.monotonic() + 20
        while "waiting for it" not in capsys.readouterr().out and time.monotonic() < deadline:
            time.sleep(0.02)
        assert thread.is_alive() and not list(Path(place.folder).glob("pixels-*"))
    thread.join(30)
    assert_same_pixels(found[0], dataset_of(folder))


def test_worker_processes_pack_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "workers_for_cores", lambda: 2)
    assert_same_pixels(packed(folder, tmp_path), dataset_of(folder))


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_process_that_is_started_afresh_opens_it_again(folder, tmp_path, kind):
    dataset = packed(folder, tmp_path) if kind == "file" else dataset_of(folder)
    data = pickle.dumps(dataset)
    assert len(data) < 20_000 and len(data) < dataset.store.rows.nbytes + 10_000
    assert_same_pixels(pickle.loads(data), dataset)


RANK = """
import sys, time
from improved_diffusion import distributed
from improved_diffusion.data import packing
from improved_diffusion.data.cache import use_cache
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images

if __name__ == "__main__":
    packing.PART = 2
    prepare = ImageDataset.prepare
    ImageDataset.prepare = lambda self, i: time.sleep(float(sys.argv[3])) or prepare(self, i)
    distributed.setup_dist()
    dataset = ImageDataset(16, open_images(sys.argv[1]))
    use_cache(dataset, sys.argv[2], sys.argv[1])
    assert dataset.store.there.all() and dataset.store.done is not None
    print(f"packed by {distributed.get_world_size()}")  # in one piece: ranks share the output
"""


def test_ranks_pack_together(folder, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    done = run("torchrun", 2, tmp_path / "rank.py", folder, tmp_path / "cache", 0, cwd=tmp_path)
    assert done.succeed().out.count("packed by 2") == 2
    assert_same_pixels(packed(folder, tmp_path / "cache"), dataset_of(folder))


def test_two_runs_after_a_killed_one_finish_its_cache_together(folder, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    arguments = ("python", 1, tmp_path / "rank.py", folder, tmp_path / "cache")
    killed = start(*arguments, 0.2, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("cache/*/parts-*")), "the first part")
    os.killpg(killed.pid, signal.SIGKILL)
    wait(killed)
    kept = len(next(tmp_path.glob("cache/*/parts-*")).read_text().splitlines())
    both = [start(*arguments, 0.05, cwd=tmp_path) for _ in range(2)]
    outs = [wait(process).succeed().out for process in both]
    assert sum(f"({kept} of {COUNT // 2} parts are there)" in out for out in outs) == 1, outs
    assert all("packed by 1" in out for out in outs)
    assert_same_pixels(packed(folder, tmp_path / "cache"), dataset_of(folder))


def test_a_stream_without_a_cache_has_workers_as_there_are_cores(folder, monkeypatch):
    dataset = dataset_of(folder)
    dataset.store = None
    for cores, ranks, expected in ((1, 1, 1), (4, 1, 3), (64, 8, 7), (64, 1, 8), (8, 8, 1)):
        monkeypatch.setattr(workers, "_cores", lambda: cores)  # noqa: B023
        monkeypatch.setattr(workers.distributed, "local_size", lambda: ranks)  # noqa: B023
        assert BatchStream(dataset, 5, num_workers="auto", check=False).num_workers == expected


# Images that cannot be read


@pytest.fixture
def damaged(tmp_path):
    folder = write_mixed(tmp_path / "data")
    (tmp_path / "data" / "b_003.png").write_bytes(b"hello")
    return folder


def batches_of(data, count):
    return [batch for batch, _ in itertools.islice(data, count)]


@pytest.mark.parametrize("checked", [10_000, 3])
def test_unreadable_images_are_handled_as_without_a_cache(damaged, tmp_path, monkeypatch, capsys, checked):
    monkeypatch.setattr(dataset_module, "MAX_CHECKED", checked)
    monkeypatch.setattr(packing, "MAX_CHECKED", checked)
    out, taken = [], []
    for kind in ("off", "packing", "packed"):
        dataset = dataset_of(damaged)
        use_cache(dataset, "off" if kind == "off" else str(tmp_path / "cache"), damaged)
        capsys.readouterr()
        with BatchStream(dataset, 6, num_workers=0, random_flip=True) as data:
            taken.append(batches_of(data, 9))
            out.append((data.checked.unreadable, data.skipped_names(), data.num_images, capsys.readouterr().out))
    assert out[0] == out[1] == out[2]
    assert ("b_003.png" in str(out[0][1])) == (checked == 10_000)
    for other in taken[1:]:
        assert all(th.equal(a, b) for a, b in zip(taken[0], other))


def test_too_many_unreadable_images_are_an_error_and_no_cache(tmp_path):
    folder = write_mixed(tmp_path / "data")
    for path in sorted((tmp_path / "data").glob("*_*"))[:8]:
        path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"8 of 24 images.*a_000\.png"):
        packed(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("pixels-*"))


def test_images_in_colour_for_a_grey_model_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="--channels"):
        packed(folder, tmp_path, channels=1)
    assert not list(tmp_path.rglob("pixels-*"))


# Where there is none


def test_random_crops_have_no_cache(folder, tmp_path):
    reading = ReadingConfig(resize_mode="random_crop")
    with pytest.raises(UserError, match=r"--resize_mode random_crop.*--cache off"):
        packed(folder, tmp_path, reading=reading)
    assert packed(folder, "auto", reading=reading).store.done is None
    assert not list(tmp_path.iterdir())


def test_urls_are_refused_by_name(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--cache gs://bucket/cache must be a local folder"):
        packed(folder, "gs://bucket/cache")
    dataset = dataset_of(folder)
    monkeypatch.setattr(dataset.source, "paths", ["gs://bucket/a.png"] * COUNT)
    with pytest.raises(UserError, match=r"gs://bucket/a\.png is below a URL.*--cache off"):
        use_cache(dataset, str(tmp_path), "gs://bucket")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of `auto`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "improved_diffusion" / "pixels"


def use_auto(folder, epochs=9.0, **kwargs):
    dataset = dataset_of(folder)
    use_cache(dataset, "auto", folder, epochs, **kwargs)
    return dataset.store is not None and dataset.store.done is not None


def test_auto_packs_what_does_not_stay_in_memory(folder, own, monkeypatch):
    assert not use_auto(folder) and not own.exists()
    monkeypatch.setattr(dataset_module, "MAX_CACHED_BYTES", 100)
    assert not use_auto(folder, epochs=1.9) and not use_auto(folder, build=False) and not own.exists()
    assert use_auto(folder) and the_pixels(own)
    assert use_auto(folder, epochs=1.9) and use_auto(folder, build=False)  # it is there


def test_auto_packs_what_is_not_read_whole_beforehand(folder, own, monkeypatch):
    monkeypatch.setattr(cache, "MAX_CHECKED", COUNT - 1)
    assert use_auto(folder) and the_pixels(own)


def test_auto_goes_without_where_there_is_no_room(folder, own, monkeypatch, capsys):
    monkeypatch.setattr(dataset_module, "MAX_CACHED_BYTES", 100)
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 4 * COUNT * 16 * 16 * 3 - 1)
    assert not use_auto(folder)
    assert "warning" in capsys.readouterr().out and not own.exists()
    monkeypatch.undo()
    monkeypatch.setattr(dataset_module, "MAX_CACHED_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert not use_auto(folder)
    assert "cannot write /dev/null" in capsys.readouterr().out


def test_a_deleted_cache_is_made_again(folder, tmp_path):
    first = packed(folder, tmp_path)
    shutil.rmtree(the_folder(tmp_path))
    assert_same_pixels(first, packed(folder, tmp_path))


def test_ranks_that_do_not_see_the_cache_are_named(folder, tmp_path):
    dataset = dataset_of(folder)
    place = cache._place(dataset, str(tmp_path), folder, 9)
    with pytest.raises(CacheError, match=r"rank 0.*all hosts share"):
        cache._open(place)
    with pytest.raises(CacheError, match=r"rank 0.*all hosts share"):
        packing._Parts(dataset, place)
