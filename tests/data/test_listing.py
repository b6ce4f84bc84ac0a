"""Which files are images to learn from, in folders and zips alike."""

import io
import os
import socket
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.data import listing
from improved_diffusion.data.sources import FolderImages, open_images, open_pictures
from improved_diffusion.logs import logger
from improved_diffusion.utils import images


def encoded(format="PNG", mode="RGB", side=8):
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 100).save(buffer, format)
    return buffer.getvalue()


PNG, JPEG = encoded(), encoded("JPEG")


def tree(folder, contents):
    """Write {path: bytes} below a folder."""
    for name, content in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def zipped(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return str(path)


@pytest.fixture(params=["folder", "zip"])
def listed(request, tmp_path):
    """listed({path: bytes}) -> (names of the images, what is left out), of a folder and of a zip."""

    def listed(contents):
        if request.param == "folder":
            source = open_images(tree(tmp_path / "data", contents))
        else:
            source = open_images(zipped(tmp_path / "data.zip", contents))
        return [source.name(i) for i in range(len(source))], source.left_out

    return listed


FORMATS = [
    ("a.webp", "WEBP"), ("a.bmp", "BMP"), ("a.tif", "TIFF"), ("a.tiff", "TIFF"), ("a.jfif", "JPEG"), ("a.jpe", "JPEG"),
    ("a.JPG", "JPEG"), ("a.gif", "GIF"), ("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.ppm", "PPM"), ("a.pgm", "PPM"),
    ("a.tga", "TGA"), ("a.ico", "ICO"), ("a.qoi", "QOI"), ("a.pcx", "PCX"), ("a.apng", "PNG"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format"), FORMATS)
def test_every_format_that_pillow_decodes_is_data(listed, name, format):
    if format not in Image.SAVE and format not in images.formats():
        pytest.skip(f"this Pillow does not write {format}")
    assert listed({name: encoded(format)})[0] == [name]


@pytest.mark.parametrize("name", ["photo", "photo.dat", "photo.1", "IMG_1.HEIC", "photo.jpg@w=200", "2024.05.photo"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI"])
def test_without_a_known_suffix_the_content_counts(listed, name, format):
    assert listed({name: encoded(format), "b.png": PNG})[0] == sorted([name, "b.png"])


def test_an_image_with_the_suffix_of_another_format_is_read(tmp_path):
    source = open_images(tree(tmp_path, {"a.PNG": JPEG, "b.jpg": PNG, "c.webp": encoded("BMP")}))
    assert [source.read(i).size for i in range(3)] == [(8, 8)] * 3


@pytest.mark.parametrize(
    "content", [b"", b"Python is a language", b"P", b"P6 of text", b"BM", b"BMW is a make of cars", b"\x89PNG", b"II*",
                b"%!PS-Adobe-3.0 EPSF-3.0", b"\x00\x00\x01\x00" * 9, bytes(5000), b"\xff\xd8", b"RIFF1234WAVE"],
)  # fmt: skip
def test_other_content_is_left_out(listed, content):
    names, left_out = listed({"README": content, "a.dat": content, "b.png": PNG})
    assert names == ["b.png"] and left_out.counts == {"without a known suffix": 1, ".dat": 1}


def test_files_of_other_types_are_not_opened(tmp_path, monkeypatch):
    names = [
        "a.txt",
        "b.json",
        "c.mp4",
        "d.pdf",
        "e.py",
        "f.zip",
        "g.csv",
        "h.png.bak",
        "i.part",
        "j.nef",
        "k.npz",
        "l~",
    ]
    tree(tmp_path, {**dict.fromkeys(names, JPEG), "x.png": PNG})
    opened = []
    monkeypatch.setattr(listing, "open", lambda path, *args, **kwargs: opened.append(path), raising=False)
    paths, left_out = listing.list_folder(str(tmp_path))
    assert paths == [str(tmp_path / "x.png")] and opened == []
    assert sum(left_out.counts.values()) == len(names)


JUNK = [
    ".hidden.png", "._a.png", "x/._b.png", ".ipynb_checkpoints/a-checkpoint.png", "x/.ipynb_checkpoints/a.png",
    "__MACOSX/a.png", "x/__MACOSX/y/a.png", "Thumbs.db", "x/desktop.ini", "@eaDir/a.png", ".git/objects/a.png",
    "$RECYCLE.BIN/a.png", ".DS_Store",
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
def test_hidden_files_and_what_systems_leave_are_no_data(listed, junk):
    names, left_out = listed({junk: PNG, "a.png": PNG, "x/b.png": PNG})
    assert names == ["a.png", "x/b.png"] and left_out.counts == {"hidden": 1}


def test_data_in_a_hidden_folder_is_data_when_it_is_named(tmp_path):
    assert len(open_images(tree(tmp_path / ".cache" / "data", {"a.png": PNG}))) == 1


RUNS = {
    "training": ["log.txt", "progress.csv", "samples_000001.png"],
    "training before its first row": ["log.txt", "config.json"],
    "training without logs": ["config.json", "manifest000010.json", "model000010.pt"],
    "the published training": ["log.txt", "progress.csv", "model000010.pt"],
    "sampling": ["samples.json", "samples.png", "samples/000000.png", "samples/deeper/000001.png"],
    "evaluation": ["report.json", "report.md", "report_samples.png"],
    "a sweep": ["sweep.json", "sweep.md", "sweep.png"],
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("where", ["run", "deeper/runs/x"])
def test_the_folders_of_runs_are_no_data(listed, run, where):
    content = {f"{where}/{name}": PNG for name in [*run, "curves.png"]}
    names, left_out = listed({"a.png": PNG, "b/c.png": PNG, **content})
    assert names == ["a.png", "b/c.png"] and left_out.counts == {"folder of a run": 1}
    assert where in str(left_out)


@pytest.mark.parametrize("own", ["samples", "."])
def test_the_folder_of_a_run_is_data_when_it_is_named(tmp_path, own):
    tree(tmp_path, {"run/samples.json": b"{}", "run/log.txt": b"", "run/samples/000000.png": PNG})
    assert len(open_images(str(tmp_path / "run" / own))) == 1


BESIDE = ["made_from.json", "config.json", "samples.json", "log.txt", "labels.json", "report.md"]


@pytest.mark.parametrize("beside", BESIDE)
def test_folders_with_files_of_such_names_are_data(listed, beside):
    assert listed({f"x/{beside}": b"{}", "x/a.png": PNG})[0] == ["x/a.png"]


def test_what_is_left_out_is_one_line_with_counts(tmp_path, capsys):
    logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout"])
    contents = {f"{i}.txt": b"a" for i in range(3)} | {"a.mp4": b"", "._a.png": b"", "b.png": PNG, "c/LICENSE": b""}
    capsys.readouterr()
    open_images(tree(tmp_path / "data", contents))
    [line] = capsys.readouterr().out.splitlines()
    for part in ("left out", "3 .txt", "1 .mp4", "1 hidden", "1 without a known suffix"):
        assert part in line
    open_images(tree(tmp_path / "clean", {"b.png": PNG}))
    assert capsys.readouterr().out == ""


def test_many_kinds_are_summed_up_and_odd_suffixes_are_not_shown():
    left_out = listing.LeftOut()
    for i in range(30):
        left_out.add_file(f"a.x{i}")
    left_out.add_file("a.\x1b[31m")
    assert len(str(left_out).split(", ")) <= 10 and "23 more" in str(left_out)
    assert "\x1b" not in str(left_out)


# What cannot be read


def test_pipes_devices_and_sockets_are_never_opened(tmp_path):
    tree(tmp_path, {"a.png": PNG})
    for name in ("pipe.png", "pipe"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path must be short
        server.bind("socket.png")
        os.chdir(here)
        (tmp_path / "device.png").symlink_to("/dev/zero")
        paths, left_out = listing.list_folder(str(tmp_path))
    assert paths == [str(tmp_path / "a.png")] and left_out.counts["pipe or device"] == 3
    assert sum(left_out.counts.values()) == 4  # the link to a device


def test_links_are_followed_once_and_broken_ones_left_out(tmp_path):
    tree(tmp_path / "data", {"x/a.png": PNG})
    tree(tmp_path / "other", {"b.png": PNG})
    for name, target in {
        "data/broken.png": "nowhere", "data/circle.png": "circle.png", "data/back": "../data", "data/x/up": "..",
        "data/folder": "../other", "data/y.png": "../other/b.png",
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    paths, left_out = listing.list_folder(str(tmp_path / "data"))
    assert [os.path.relpath(path, tmp_path / "data") for path in paths] == ["folder/b.png", "x/a.png", "y.png"]
    assert left_out.counts == {"broken link": 2}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path, {"a.png": PNG, "private/b.png": PNG})
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == refused:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = "private"
    paths, left_out = listing.list_folder(str(tmp_path))
    assert len(paths) == 1 and "private: Permission denied" in str(left_out)
    refused = tmp_path.name
    with pytest.raises(UserError, match="Permission denied"):
        listing.list_folder(str(tmp_path))


def test_folders_in_folders_without_end_are_left_out(tmp_path):
    deep = tmp_path.joinpath(*["d"] * (listing.MAX_DEPTH + 5))
    tree(tmp_path, {"a.png": PNG})
    tree(deep, {"b.png": PNG})
    paths, left_out = listing.list_folder(str(tmp_path))
    assert len(paths) == 1 and sum(left_out.counts.values()) == 1


def test_no_file_is_asked_for_its_size_or_type(tmp_path, monkeypatch):
    """A million images are listed with one system call for many."""
    tree(tmp_path, {f"{i}.png": PNG for i in range(20)})
    monkeypatch.setattr(os, "stat", None)
    monkeypatch.setattr(os.path, "isdir", None)
    monkeypatch.setattr(os.path, "exists", None)
    assert len(listing.list_folder(str(tmp_path))[0]) == 20


def test_places_that_hold_no_images_say_what_they_hold(tmp_path):
    tree(
        tmp_path,
        {"data/a.txt": b"", "data/b/c.heic": b"\0\0\0\x18ftypheic", "run/log.txt": b"", "run/progress.csv": b""},
    )
    for name, held in ((".", "folder of a run"), ("data", "1 .txt"), ("data", "1 .heic"), ("data/b", "1 .heic")):
        with pytest.raises(UserError, match=f"holds no images.*{held}"):
            open_images(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".heic", ".HEIC", ".heif"])
def test_photos_that_pillow_does_not_read_are_to_be_converted(tmp_path, suffix):
    photo = b"\0\0\0\x18ftypheic"
    tree(tmp_path, {f"data/a{suffix}": photo, "data/b.txt": b"", f"mixed/a{suffix}": photo, "mixed/b.png": PNG})
    for path in (tmp_path / "data", zipped(tmp_path / "a.zip", {f"a{suffix}": photo}), tmp_path / f"data/a{suffix}"):
        with pytest.raises(UserError, match=r"convert \.heic photos to JPEG"):
            open_images(str(path))
    for given in (f"data/a{suffix}", f"mixed/b.png,{tmp_path}/data/a{suffix}"):
        with pytest.raises(UserError, match=r"convert \.heic photos to JPEG"):
            open_pictures(f"{tmp_path}/{given}", "--images")
    assert len(open_images(str(tmp_path / "mixed"))) == 1


# Zips


@pytest.mark.parametrize(
    ("member", "name"),
    [("./a/b.png", "a/b.png"), ("../a/b.png", "a/b.png"), ("/a/b.png", "a/b.png"), ("a\\b.png", "a/b.png"),
     ("C:\\a\\b.png", "a/b.png"), ("a//b.png", "a/b.png"), ("../../etc/b.png", "etc/b.png")],
)  # fmt: skip
def test_members_with_odd_paths_have_plain_names(tmp_path, member, name):
    source = open_images(zipped(tmp_path / "a.zip", {member: PNG}))
    assert source.name(0) == name and source.read(0).size == (8, 8)


def test_folders_and_links_in_a_zip_are_no_images(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder.png/", b"")
        archive.writestr("a.png", PNG)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    source = open_images(str(path))
    assert source.members == ["a.png"] and source.left_out.counts == {"link": 1}


def test_a_zip_in_a_folder_is_not_opened(tmp_path):
    zipped(tmp_path / "a.zip", {"a.png": PNG})
    (tmp_path / "b.png").write_bytes(PNG)
    source = open_images(str(tmp_path))
    assert source.paths == [str(tmp_path / "b.png")] and source.left_out.counts == {".zip": 1}


# Blob storage


class Blobs:
    """A storage of names alone: no file can be opened."""

    FILES = ("gs://b/a.png", "gs://b/c", "gs://b/d.webp", "gs://b/.hidden/a.png", "gs://b/run/log.txt",
             "gs://b/run/progress.csv", "gs://b/run/x.png", "gs://b/x/y.JPG")  # fmt: skip

    def listdir(self, folder):
        folder = folder.rstrip("/") + "/"
        return sorted({name[len(folder) :].partition("/")[0] for name in self.FILES if name.startswith(folder)})

    def isdir(self, path):
        return any(name.startswith(path + "/") for name in self.FILES)

    def exists(self, path):
        return self.isdir(path) or path in self.FILES


def test_files_below_a_url_go_by_their_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", Blobs())
    source = open_images("gs://b")
    assert source.paths == ["gs://b/a.png", "gs://b/d.webp", "gs://b/x/y.JPG"]
    assert source.left_out.counts == {"hidden": 1, "folder of a run": 1, "without a known suffix": 1}


def test_names_of_png_and_jpeg_alone_are_taken_in_the_order_of_the_published_code(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        folders = rng.choice(["a", "b", "B", "c.d", "é"], rng.integers(0, 3))
        tree(tmp_path.joinpath(*folders), {f"{i}.png": PNG})

    def published(folder):
        for entry in sorted(os.listdir(folder)):
            full = os.path.join(folder, entry)
            if "." in entry and entry.split(".")[-1].lower() in ("jpg", "jpeg", "png", "gif"):
                yield full
            elif os.path.isdir(full):
                yield from published(full)

    assert FolderImages(str(tmp_path)).paths == list(published(str(tmp_path)))
