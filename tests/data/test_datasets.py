"""The scripts of datasets/: what they write, and what they refuse."""

import hashlib
import importlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import types
import urllib.error
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion import image_datasets
from improved_diffusion.config import UserError
from improved_diffusion.data import classes, sources
from improved_diffusion.logs import logger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    """run(name, *args) calls main() of a script in this process; run.module(name) is the script."""
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))

    def run_main(name, *args):
        monkeypatch.setattr(sys, "argv", [f"datasets/{name}.py", *map(str, args)])
        importlib.import_module(name).main()

    run_main.module = importlib.import_module
    logger.reset()  # what it prints goes to this test's standard output, not to an earlier one's
    yield run_main
    logger.reset()


def run_by_command(name, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", f"datasets/{name}.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def names_below(folder):
    return sorted(path.name for path in Path(folder).glob("*.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def modified_ns(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir()}


# digits.py


def test_digits_end_to_end(tmp_path):
    from sklearn.datasets import load_digits

    data = load_digits()
    result = run_by_command("digits", "--out_dir", tmp_path / "digits")
    assert result.returncode == 0, result.stderr
    assert "100% 1500/1500" in result.stdout and "image/s" in result.stdout
    for split, indices in (("train", range(1500)), ("test", range(1500, 1797))):
        folder = tmp_path / "digits" / split
        assert names_below(folder) == sorted(f"{data.target[i]}_{i:05d}.png" for i in indices)
        counts = Counter(name[0] for name in names_below(folder))
        assert set(counts) == set("0123456789")
        assert all(0.08 < count / len(indices) < 0.12 for count in counts.values())
    with Image.open(tmp_path / "digits" / "train" / "0_00000.png") as image:
        assert (image.mode, image.size) == ("L", (8, 8))
    for i in (0, 1499, 1500, 1796):
        found = pixels(tmp_path / "digits" / ("train" if i < 1500 else "test") / f"{data.target[i]}_{i:05d}.png")
        assert found.max() == 255 * data.images[i].max() // 16
        np.testing.assert_allclose(found, data.images[i] * 255 / 16, atol=0.5)


def test_digits_again_changes_nothing_and_they_are_training_data(run, tmp_path, capsys):
    run("digits", "--out_dir", tmp_path)
    before = modified_ns(tmp_path / "train")
    (tmp_path / "features.pt2").touch()  # digits_features.py puts it there
    run("digits", "--out_dir", tmp_path)
    assert "is complete already" in capsys.readouterr().out
    assert modified_ns(tmp_path / "train") == before
    source = sources.open_images(str(tmp_path / "train"))
    labels, names = classes.read_classes(source, "prefix", str(tmp_path))
    assert len(source) == 1500 and names == list("0123456789")
    array, out = image_datasets.ImageDataset(8, source, labels, channels=1)[0]
    assert array.shape == (1, 8, 8) and out["y"] == 0


def test_a_mistake_is_one_message_and_a_failure(tmp_path):
    (tmp_path / "thesis.txt").touch()
    result = run_by_command("digits", "--out_dir", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "thesis.txt" in result.stderr and "choose a new or empty output folder" in result.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_digits_name_the_missing_package(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        run("digits", "--out_dir", tmp_path)


def test_a_folder_of_other_images_is_not_mixed_with(run, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat_001.png").touch()
    with pytest.raises(UserError, match="train holds other files"):
        run("digits", "--out_dir", tmp_path)
    assert os.listdir(tmp_path / "train") == ["cat_001.png"]


@pytest.mark.parametrize("out_dir, message", [("gs://bucket/digits", "name a local folder"), ("FILE", "cannot make")])
def test_an_output_that_is_no_local_folder_is_refused(run, tmp_path, out_dir, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        run("digits", "--out_dir", tmp_path / "file" if out_dir == "FILE" else out_dir)


# What all of them write through


def to_image(value):
    return np.full((4, 4, 3), value, np.uint8)


def items(n):
    return [(f"a_{i}.png", i) for i in range(n)]


def test_an_interrupted_folder_has_another_name_and_is_gone_on_with(run, tmp_path):
    new_folder = run.module("new_folder")

    def interrupted(value):
        if value >= 300:
            raise KeyboardInterrupt
        return to_image(value % 256)

    with pytest.raises(KeyboardInterrupt):
        new_folder.NewFolder(tmp_path / "out", size=4).write(items(600), 600, interrupted)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    assert 256 <= len(names_below(partial)) <= 300
    (partial / ".a_300.png.123.tmp").write_bytes(b"half")  # what kill -9 leaves
    (partial / "a_7.png").write_bytes(b"")  # what a power cut leaves
    decoded = []
    new_folder.NewFolder(tmp_path / "out", size=4).write(
        items(600), 600, lambda value: decoded.append(value) or to_image(value % 256)
    )
    assert not partial.exists()
    assert set(os.listdir(tmp_path / "out")) == {f"a_{i}.png" for i in range(600)} | {"made_from.json"}
    assert 7 in decoded and 8 not in decoded and set(range(300, 600)) <= set(decoded)
    assert (pixels(tmp_path / "out" / "a_7.png") == 7).all()


def test_a_folder_made_with_other_options_is_refused(run, tmp_path):
    new_folder = run.module("new_folder")
    new_folder.NewFolder(tmp_path / "out", image_size=4).write(items(2), 2, to_image)
    with pytest.raises(UserError, match="out was made from image_size 4; this is image_size 8: choose another"):
        new_folder.NewFolder(tmp_path / "out", image_size=8)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    with pytest.raises(UserError, match=r"out.partial was made from image_size 4; this is image_size 8"):
        new_folder.NewFolder(tmp_path / "out", image_size=8)


def test_a_folder_with_too_many_images_does_not_become_complete(run, tmp_path):
    new_folder = run.module("new_folder")
    with pytest.raises(UserError, match="should hold 3 images and does not: delete it"):
        new_folder.NewFolder(tmp_path / "out").write(items(2), 3, to_image)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_a_link_to_one_are_filled(run, tmp_path):
    new_folder = run.module("new_folder")
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big_disk")
    new_folder.NewFolder(tmp_path / "out").write(items(2), 2, to_image)
    assert names_below(tmp_path / "big_disk") == names_below(tmp_path / "out") == ["a_0.png", "a_1.png"]


# cifar10.py


def python2_text(text):
    """A str as Python 2 pickles it."""
    return b"T" + struct.pack("<I", len(text)) + text


def python2_ints(values):
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def official_batch(data, labels):
    """The pickle of a batch, operation by operation as Python 2's cPickle and numpy 1 wrote the official ones."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + python2_text(b"b") + b"\x87R"
        b"(K\x01" + b"J" + struct.pack("<i", len(data)) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n" + python2_text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + python2_text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + python2_text(data.tobytes()) + b"tb"
    )
    pairs = python2_text(b"labels") + python2_ints(labels) + python2_text(b"data") + array
    return b"\x80\x02}(" + python2_text(b"batch_label") + python2_text(b"training batch") + pairs + b"u."


def write_archive(path, batches):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def cifar(run, tmp_path, monkeypatch):
    """(path of an archive of six batches of 20 images, uint8 [6, 20, 32, 32, 3], labels [6][20]), taken as official."""
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 32, 32, 3), dtype=np.uint8)
    labels = [[(i * 7 + k) % 10 for i in range(20)] for k in range(6)]
    rows = images.transpose(0, 1, 4, 2, 3).reshape(6, 20, 3072)
    path = tmp_path / "archive.tar.gz"
    write_archive(path, {name: official_batch(*pair) for name, *pair in zip(BATCHES, rows, labels)})
    monkeypatch.setattr(run.module("cifar10"), "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path, images, labels


def test_cifar10_end_to_end(run, cifar, tmp_path, capsys):
    archive, images, labels = cifar
    run("cifar10", "--archive", archive, "--out_dir", tmp_path / "out")
    classes = run.module("cifar10").CLASSES
    for split, batches in (("cifar_train", range(5)), ("cifar_test", [5])):
        expected = {}
        for index, (batch, i) in enumerate((batch, i) for batch in batches for i in range(20)):
            expected[f"{classes[labels[batch][i]]}_{index:05d}.png"] = images[batch, i]
        assert names_below(tmp_path / "out" / split) == sorted(expected)
        for name, image in expected.items():
            np.testing.assert_array_equal(pixels(tmp_path / "out" / split / name), image)
    archive.unlink()
    run("cifar10", "--out_dir", tmp_path / "out")  # neither reads nor downloads anything
    assert "cifar_test is complete already" in capsys.readouterr().out


def test_cifar10_names_both_checksums(run, tmp_path):
    archive = tmp_path / "mine.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(UserError) as error:
        run("cifar10", "--archive", archive, "--out_dir", tmp_path / "out")
    assert hashlib.md5(b"something else").hexdigest() in str(error.value)
    assert "c58f30108f718f92721af3b95e74349a" in str(error.value) and "mine.tar.gz" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_cifar10_names_a_missing_archive(run, tmp_path):
    with pytest.raises(UserError, match=r"missing.tar.gz: No such file"):
        run("cifar10", "--archive", tmp_path / "missing.tar.gz", "--out_dir", tmp_path / "out")


class Response(io.BytesIO):
    @property
    def headers(self):
        return {"Content-Length": str(len(self.getvalue()))}


def test_cifar10_downloads_once_and_only_whole(run, cifar, tmp_path, monkeypatch):
    out, archive = tmp_path / "out", cifar[0].read_bytes()
    module = run.module("cifar10")
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda url, timeout: Response(archive[:-9]))
    with pytest.raises(UserError, match="cut or altered"):
        run("cifar10", "--out_dir", out)
    assert os.listdir(out) == ["cifar-10-python.tar.gz.partial"]
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda url, timeout: Response(archive))
    run("cifar10", "--out_dir", out)
    assert sorted(os.listdir(out)) == ["cifar-10-python.tar.gz", "cifar_test", "cifar_train"]
    assert len(names_below(out / "cifar_train")) == 100


def test_cifar10_says_what_to_do_without_a_network(run, tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(run.module("cifar10").urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match=r"no route to host.*--archive FILE"):
        run("cifar10", "--out_dir", tmp_path / "out")


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_does_not_run_a_hostile_pickle(run, tmp_path, monkeypatch, protocol):
    archive, trace = tmp_path / "hostile.tar.gz", tmp_path / "it_ran"
    content = pickle.dumps({b"data": Hostile(f"touch {trace}"), b"labels": []}, protocol)
    write_archive(archive, dict.fromkeys(BATCHES, content))
    monkeypatch.setattr(run.module("cifar10"), "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"hostile.tar.gz: it asks for (posix|nt).system.*not called"):
        run("cifar10", "--archive", archive, "--out_dir", tmp_path / "out")
    assert not trace.exists() and not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize("call", ["builtins eval", "numpy load", "numpy.core.multiarray fromfile", "_codecs lookup"])
def test_pickles_reach_nothing_but_arrays(run, call):
    module, name = call.split()
    with pytest.raises(UserError, match="not part of an image"):
        run.module("arrays_only").loads(f"c{module}\n{name}\n(S'1'\ntR.".encode())


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_python_3_are_read(run, protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    found = run.module("arrays_only").loads(pickle.dumps({b"data": array, b"labels": [1, 2]}, protocol))
    np.testing.assert_array_equal(found[b"data"], array)
    assert found[b"labels"] == [1, 2]


@pytest.mark.parametrize("damage", ["not a tar", "no batches", "cut pickle", "other arrays"])
def test_cifar10_names_a_damaged_archive(run, tmp_path, monkeypatch, damage):
    archive = tmp_path / "damaged.tar.gz"
    batch = official_batch(np.zeros((2, 3072), np.uint8), [0, 1])
    content = {"cut pickle": batch[:-9], "other arrays": official_batch(np.zeros((2, 768), np.uint8), [0, 1])}
    write_archive(archive, dict.fromkeys([] if damage == "no batches" else BATCHES, content.get(damage, batch)))
    if damage == "not a tar":
        archive.write_bytes(b"text")
    monkeypatch.setattr(run.module("cifar10"), "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"cannot read .*damaged.tar.gz"):
        run("cifar10", "--archive", archive, "--out_dir", tmp_path / "out")


# imagenet64.py


@pytest.fixture
def imagenet(tmp_path):
    """(folder of official files with 3 images each, uint8 [11, 3, 64, 64, 3], labels [11, 3])"""
    folder = tmp_path / "npz"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 3, 64, 64, 3), dtype=np.uint8)
    labels = rng.integers(1, 1001, (11, 3))
    labels[0, :2] = 1, 1000
    names = [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]
    for name, image, label in zip(names, images, labels):
        rows = image.transpose(0, 3, 1, 2).reshape(3, -1)
        np.savez(folder / f"{name}.npz", data=rows, labels=label, mean=np.zeros(12288))
    return folder, images, labels


def test_imagenet64_end_to_end(run, imagenet, tmp_path):
    folder, images, labels = imagenet
    run("imagenet64", folder, "--out_dir", tmp_path / "out")
    expected = {f"{labels[i // 3, i % 3] - 1:04d}_{i:07d}.png": images[i // 3, i % 3] for i in range(30)}
    assert {"0000_0000000.png", "0999_0000001.png"} <= set(expected)
    assert names_below(tmp_path / "out" / "train") == sorted(expected)
    for name, image in expected.items():
        np.testing.assert_array_equal(pixels(tmp_path / "out" / "train" / name), image)
    assert names_below(tmp_path / "out" / "val") == sorted(f"{labels[10, i] - 1:04d}_{i:07d}.png" for i in range(3))


def test_imagenet64_refuses_objects(run, imagenet, tmp_path):
    trace = tmp_path / "it_ran"
    objects = np.array([Hostile(f"touch {trace}")], dtype=object)
    np.savez(imagenet[0] / "val_data.npz", data=objects, labels=objects)
    with pytest.raises(UserError, match=r"val_data.npz: it contains Python objects.*were not loaded"):
        run("imagenet64", imagenet[0], "--splits", "val", "--out_dir", tmp_path / "out")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"data": 1}), b"PK\x03\x04cut"])
def test_imagenet64_names_an_unreadable_file(run, imagenet, tmp_path, content):
    (imagenet[0] / "val_data.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read 'labels' of .*val_data.npz"):
        run("imagenet64", imagenet[0], "--splits", "val", "--out_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"data": np.zeros((2, 12288), np.uint8), "labels": np.array([0, 1])}, "integers .N. from 1 to 1000"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": np.array([1, 2])}, r"expected uint8 \(2, 12288\)"),
        ({"labels": np.array([1, 2])}, "cannot read 'data' of .*val_data.npz"),
    ],
)
def test_imagenet64_names_other_arrays(run, imagenet, tmp_path, arrays, message):
    np.savez(imagenet[0] / "val_data.npz", **arrays)
    with pytest.raises(UserError, match=message):
        run("imagenet64", imagenet[0], "--splits", "val", "--out_dir", tmp_path / "out")


def test_imagenet64_names_missing_files(run, imagenet, tmp_path):
    (imagenet[0] / "train_data_batch_7.npz").rename(imagenet[0] / "train_data_batch_7")
    with pytest.raises(UserError, match=r"train_data_batch_7.npz and 0 more files are missing.*npz format.*--splits"):
        run("imagenet64", imagenet[0], "--out_dir", tmp_path / "out")


# lsun_bedroom.py


class FakeDataBase:
    """As much of an lmdb environment, transaction and cursor as is read."""

    def __init__(self, pairs):
        self.pairs = pairs

    def begin(self, buffers):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def cursor(self):
        return iter([(memoryview(key), memoryview(value)) for key, value in self.pairs])

    def stat(self):
        return {"entries": len(self.pairs)}


def encode(array, format):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


@pytest.fixture
def lsun(tmp_path, monkeypatch):
    """(path of a data base, its two images: uint8 [16, 24, 3] as webp and [24, 16, 3] as png)"""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((16, 24, 3), (24, 16, 3))]
    pairs = [(b"key0", encode(images[0], "WEBP")), (b"key1", encode(images[1], "PNG"))]
    path = tmp_path / "bedroom_train_lmdb"
    path.mkdir()
    (path / "data.mdb").touch()
    lmdb = types.ModuleType("lmdb")
    lmdb.Error, lmdb.pairs = OSError, pairs
    lmdb.open = lambda path, readonly, lock, readahead, max_readers: FakeDataBase(pairs)
    monkeypatch.setitem(sys.modules, "lmdb", lmdb)
    return path, images


def test_lsun_crops_to_the_centre_and_averages(run, lsun, tmp_path):
    path, (wide, tall) = lsun
    run("lsun_bedroom", path, tmp_path / "out", "--image_size", 8, "--prefix", "room")
    assert names_below(tmp_path / "out") == ["room_0000000.png", "room_0000001.png"]
    for i, square in enumerate((wide[:, 4:20], tall[4:20])):
        mean = square.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(pixels(tmp_path / "out" / f"room_{i:07d}.png"), mean, atol=1)


def test_lsun_goes_on_where_it_stopped(run, lsun, tmp_path):
    path, _ = lsun
    pairs = sys.modules["lmdb"].pairs
    whole, pairs[1] = pairs[1], (b"key1", b"damaged")
    with pytest.raises(UserError, match="b'key1' is not readable"):
        run("lsun_bedroom", path, tmp_path / "out", "--image-size", 8)
    assert not (tmp_path / "out").exists()
    before = modified_ns(tmp_path / "out.partial")["bedroom_0000000.png"]
    pairs[1] = whole
    run("lsun_bedroom", path, tmp_path / "out", "--image-size", 8)
    assert modified_ns(tmp_path / "out")["bedroom_0000000.png"] == before
    assert len(names_below(tmp_path / "out")) == 2
    with pytest.raises(UserError, match=r"image_size 8, .*; this is .*image_size 16"):
        run("lsun_bedroom", path, tmp_path / "out", "--image_size", 16)


def test_lsun_names_the_missing_package(run, lsun, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        run("lsun_bedroom", lsun[0], tmp_path / "out")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--image_size", "0"], "--image_size 0 must be positive"),
        (["--prefix", "a/b"], "--prefix 'a/b' must be the beginning of a file name"),
        ([], "no_lmdb is not an lmdb folder"),
    ],
)
def test_lsun_names_what_is_wrong(run, lsun, tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        run("lsun_bedroom", tmp_path / "no_lmdb", tmp_path / "out", *args)


# digits_features.py


@pytest.fixture
def digits(tmp_path):
    """A few real digits, as digits.py writes them."""
    data = load_real_digits()
    for split, chosen in (("train", range(60)), ("test", range(60, 80))):
        (tmp_path / "digits" / split).mkdir(parents=True)
        for i in chosen:
            image = Image.fromarray(np.rint(data.images[i] * (255 / 16)).astype(np.uint8))
            image.save(tmp_path / "digits" / split / f"{data.target[i]}_{i:05d}.png")
    return tmp_path / "digits"


def load_real_digits():
    from sklearn.datasets import load_digits

    return load_digits()


def test_the_features_of_digits_are_a_program_for_any_number_of_images(run, digits, capfd):
    import torch as th

    out = digits / "features.pt2"
    run("digits_features", "--digits", digits, "--out", out, "--steps", 30)
    printed = capfd.readouterr()
    accuracy = re.search(r"^accuracy on 20 real held-out digits: (\S+)%$", printed.out, re.MULTILINE)
    assert float(accuracy[1]) > 30 and printed.err == ""
    program = th.export.load(out).module()
    images, _ = run.module("digits_features").read(str(digits / "test"))
    together = program(images)
    assert {name: (value.shape, value.dtype) for name, value in together.items()} == {
        "features": ((20, 128), th.float32), "logits": ((20, 10), th.float32)
    }  # fmt: skip
    for i in range(3):
        for name, value in program(images[i : i + 1]).items():
            np.testing.assert_allclose(value, together[name][i : i + 1], atol=1e-4)
    with zipfile.ZipFile(out) as archive:  # nothing in it can run code, nor are the training images in it
        for name in archive.namelist():
            if name.endswith(".pt"):
                th.load(io.BytesIO(archive.read(name)), weights_only=True)
                assert archive.getinfo(name).file_size < 10_000
    before = out.read_bytes()
    run("digits_features", "--digits", digits, "--out", out, "--steps", 30)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--digits", "nowhere"], "--digits nowhere/train does not exist"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--out", "digits/train/0_00000.png/features.pt2"], "cannot make the folder digits/train/0_00000.png"),
    ],
)
def test_features_of_digits_that_cannot_be_made_say_why(run, digits, args, message, monkeypatch):
    monkeypatch.chdir(digits.parent)
    with pytest.raises(UserError, match=re.escape(message)):
        run("digits_features", "--digits", "digits", "--steps", 1, *args)


def test_features_of_images_that_are_no_digits_are_refused(run, digits):
    (digits / "train" / "3_00003.png").rename(digits / "train" / "three_3.png")
    with pytest.raises(UserError, match=r"every image must be named digit_index\.png"):
        run("digits_features", "--digits", digits, "--steps", 1)
