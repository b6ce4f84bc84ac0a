"""Folders, zips and npz files as collections of images: what they refuse, and how much they read."""

import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.data import sources
from improved_diffusion.data.dataset import ImageDataset, UnreadableImage
from improved_diffusion.data.sources import open_images, open_pictures
from improved_diffusion.utils import images

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
PNG = images.encode_png(PICTURES[0])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What --data_dir may be


@pytest.mark.parametrize(
    ("path", "culprits"),
    [
        ("", ["is missing"]),
        ("nowhere", ["nowhere does not exist"]),
        ("photos ", ["does not exist", "did you mean photos"]),
        (" photos", ["did you mean photos"]),
        ("a.png", ["is a single image, name its folder"]),
        ("a.npy", ["np.savez"]),
        ("a.tar", ["unpack it"]),
        ("a.txt", ["neither a folder nor a .zip nor an .npz"]),
        ("empty", ["holds no images", "it is empty"]),
    ],
)
def test_what_is_no_collection_of_images_is_named(here, path, culprits):
    for folder in ("photos", "empty"):
        (here / folder).mkdir()
    (here / "photos" / "a.png").write_bytes(PNG)
    for name in ("a.png", "a.txt", "a.tar"):
        (here / name).write_bytes(PNG)
    np.save("a.npy", PICTURES)
    with pytest.raises(UserError) as error:
        open_images(path)
    for culprit in ["--data_dir", *culprits]:
        assert culprit in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/x", "http://host/x", "file:///x", "https://example.com/x", "gcs://x"])
@pytest.mark.parametrize("opened", [open_images, open_pictures])
def test_urls_that_cannot_be_read_name_those_that_can(url, opened):
    pytest.importorskip("blobfile")
    with pytest.raises(UserError) as error:
        opened(url, "--data_dir")
    assert url in str(error.value) and "gs://" in str(error.value) and "az://" in str(error.value)


def test_a_folder_may_be_called_like_a_zip(here):
    (here / "a.zip").mkdir()
    (here / "a.zip" / "a.png").write_bytes(PNG)
    assert len(open_images("a.zip")) == 1 and len(open_images("a.zip/")) == 1


def test_images_are_given_one_by_one_whatever_their_names(here):
    for name in ("a.png", "photo", "with,comma.png", "old.bak"):
        (here / name).write_bytes(PNG)
    (here / "text").write_bytes(b"hello")
    for given, count in (("a.png", 1), ("photo", 1), ("a.png,photo,old.bak", 3), ("with,comma.png", 1)):
        assert len(open_pictures(given, "--images")) == count
    for given, culprit in (
        ("a.png,text", "text is not an image"), ("a.png,nowhere.png", "nowhere.png does not exist"),
        (".,a.png", "folder"),
        ("a.png, photo", "did you mean photo"), ("text", "neither a folder"), ("", "missing: name an image"),
        ("/dev/zero", "device"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=culprit):
            open_pictures(given, "--images")


# Zips


def member_of(path, name, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(name, content)
    return str(path)


def test_a_member_that_unpacks_without_end_is_unreadable(here, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 10_000)
    member_of("a.zip", "bomb.bmp", bytes(10_001))
    dataset = ImageDataset(8, open_images(member_of("a.zip", "fine.png", PNG)))
    with pytest.raises(UnreadableImage, match=r"a\.zip:bomb\.bmp.*unpacks to more than"):
        dataset.read(0)
    assert dataset.read(1).size == (8, 8)


def test_a_member_is_not_longer_than_it_says(here):
    """Declared as 100 bytes, it unpacks to a million."""
    path = here / "a.zip"
    member_of(path, "bomb.bmp", bytes(1_000_000))
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", 1_000_000), struct.pack("<L", 100)))
    with pytest.raises(UnreadableImage, match=r"bomb\.bmp"):
        ImageDataset(8, open_images("a.zip")).read(0)


COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_member_is_unreadable_and_the_others_are_read(here, compression):
    path = here / "a.zip"
    for i in range(3):
        member_of(path, f"{i}.bmp", PICTURES[i].tobytes() if i == 1 else PNG, compression)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("1.bmp")
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len("1.bmp")
    data[start : start + info.compress_size] = b"\xff" * info.compress_size
    path.write_bytes(data)
    dataset = ImageDataset(8, open_images("a.zip"))
    with pytest.raises(UnreadableImage, match=r"1\.bmp is not a readable image"):
        dataset.read(1)
    assert dataset.read(0).size == dataset.read(2).size == (8, 8)


def test_an_encrypted_zip_is_refused_at_once(here):
    member_of("a.zip", "a.png", PNG)
    data = bytearray((here / "a.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    (here / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip is encrypted: unpack it"):
        open_images("a.zip")


@pytest.mark.parametrize("seed", range(40))
def test_a_zip_with_changed_bytes_is_read_or_named(here, seed):
    for i in range(3):
        member_of("a.zip", f"x/{i}", PNG)
    data, rng = bytearray((here / "a.zip").read_bytes()), np.random.default_rng(seed)
    for at in rng.integers(0, len(data), 4):
        data[at] = rng.integers(0, 256)
    (here / "a.zip").write_bytes(data)
    try:
        dataset = ImageDataset(8, open_images("a.zip"))
        for i in range(len(dataset)):
            dataset.read(i)
    except UserError as error:
        assert "a.zip" in str(error)


# npz


def forged(path, header, content=b"", name="arr_0.npy", compression=zipfile.ZIP_STORED):
    """An npz whose array says of itself what `header` says."""
    text = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content)
    return str(path)


def header(shape, dtype="|u1"):
    return str({"descr": dtype, "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    "shape", [(10**12, 8, 8, 3), (2**62, 4), (5, 8, 8, 3), (3, 8, 8, 3), (-4, 8, 8, 3), (0, 8, 8, 3)]
)
def test_an_array_that_is_not_what_it_says_is_refused_before_memory_is_taken(shape, monkeypatch):
    path = forged("a.npz", header(shape), PICTURES.tobytes())
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(UserError, match=r"a\.npz is not a readable npz: arr_0 is not"):
        open_images(path)


def test_an_array_larger_than_the_memory_is_refused(monkeypatch):
    np.savez("a.npz", PICTURES)
    assert len(open_images("a.npz")) == 4
    monkeypatch.setattr(images, "_memory_bytes", lambda: PICTURES.nbytes - 1)
    with pytest.raises(UserError, match=r"a\.npz needs .* GiB of memory"):
        open_images("a.npz")


@pytest.mark.parametrize(
    "text", ["{", "", "(" * 5000, "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "x" * 20_000]
)
def test_a_header_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"a\.npz"):
        open_images(forged("a.npz", text))


@pytest.mark.parametrize(
    ("arrays", "culprits"),
    [
        ({"x_train": PICTURES, "y_train": np.arange(4)}, ["no arr_0 but x_train, y_train", "np.savez"]),
        ({}, ["no arr_0 but nothing"]),
        ({"arr_0": PICTURES.transpose(0, 3, 1, 2)}, ["(4, 3, 8, 8)", "transpose(0, 2, 3, 1)"]),
        ({"arr_0": PICTURES / 255}, ["float64", "uint8"]),
        ({"arr_0": PICTURES.astype(np.int64)}, ["int64", "uint8"]),
        ({"arr_0": PICTURES.reshape(4, -1)}, ["(4, 192)"]),
    ],
)
def test_an_npz_without_images_says_what_it_has(arrays, culprits):
    np.savez("a.npz", **arrays)
    with pytest.raises(UserError) as error:
        open_images("a.npz")
    for culprit in culprits:
        assert culprit in str(error.value)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("array", [PICTURES, PICTURES[..., 0], PICTURES[..., :2], np.asfortranarray(PICTURES)])
def test_an_npz_of_images_is_read(array, compressed):
    (np.savez_compressed if compressed else np.savez)("a.npz", array)
    source = open_images("a.npz")
    for i, expected in enumerate(array):
        np.testing.assert_array_equal(np.asarray(source.read(i)), expected)


@pytest.mark.parametrize(
    "labels",
    [np.array(["a"] * 4), np.eye(4), np.array([0.5] * 4), np.array({"a": 1}), np.arange(3), np.nan * np.ones(4)],
)
def test_labels_that_nobody_asks_for_are_not_looked_at(labels):
    np.savez("a.npz", PICTURES, labels)
    assert Image.fromarray(PICTURES[2]).tobytes() == open_images("a.npz").read(2).tobytes()
    assert ImageDataset(8, open_images("a.npz"))[0][1] == {}


def test_a_pickle_is_not_loaded(here):
    import pickle

    (here / "a.npz").write_bytes(pickle.dumps({"arr_0": 1}))
    with pytest.raises(UserError, match=r"a\.npz is not a readable npz"):
        open_images("a.npz")
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile("b.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    with pytest.raises(UserError, match="could run code"):
        open_images("b.npz")


def listed_again(path, times):
    """Write a zip whose directory lists its last file again, under other names of the same length."""
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    entry = data[data.rfind(b"PK\1\2") : end]
    more = b"".join(entry.replace(b"b_0.png", f"c_{i}.png".encode()) for i in range(times))
    count, size = (int.from_bytes(data[end + at : end + at + n], "little") for at, n in ((10, 2), (12, 4)))
    counts = 2 * (count + times).to_bytes(2, "little") + (size + len(more)).to_bytes(4, "little")
    path.write_bytes(data[:end] + more + data[end : end + 8] + counts + data[end + 16 :])


@pytest.mark.parametrize("times, form", [(1, zipfile.ZIP_STORED), (9, zipfile.ZIP_STORED), (9, zipfile.ZIP_DEFLATED)])
def test_a_zip_whose_files_overlap_is_refused(here, times, form):
    with zipfile.ZipFile("a.zip", "w", form) as archive:
        for name in ("a_0.png", "b_0.png"):
            archive.writestr(name, images.encode_png(PICTURES[0]))
    assert len(open_images("a.zip")) == 2
    listed_again(here / "a.zip", times)
    with pytest.raises(UserError, match=r"a\.zip .*overlap"):
        open_images("a.zip")


def test_a_zip_after_other_bytes_and_one_with_a_file_added_again_are_read(here):
    with zipfile.ZipFile("a.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for picture in PICTURES[:2]:
            archive.writestr("a.png", images.encode_png(picture))
    (here / "b.zip").write_bytes(bytes(1000) + (here / "a.zip").read_bytes())
    for path in ("a.zip", "b.zip"):
        np.testing.assert_array_equal(np.asarray(open_images(path).read(0)), PICTURES[1])
