"""Files on this machine and behind URLs."""

import sys

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.utils import files


def test_local_paths(tmp_path):
    folder = files.join(str(tmp_path), "a")
    assert folder == f"{tmp_path}/a" and not files.exists(folder)
    files.make_dirs(files.join(folder, "b"))
    files.make_dirs(folder)  # again is fine
    files.write_bytes(files.join(folder, "c.txt"), b"hello")
    assert files.list_dir(folder) == ["b", "c.txt"]
    assert files.is_dir(folder) and not files.is_dir(files.join(folder, "c.txt"))
    assert files.exists(files.join(folder, "c.txt")) and files.read_bytes(files.join(folder, "c.txt")) == b"hello"
    with files.open_read(files.join(folder, "c.txt")) as f:
        assert f.read(2) == b"he"


def test_urls_are_told_from_paths():
    assert files.is_url("gs://bucket/a") and files.is_url("az://account/a") and files.is_url("https://host/a")
    assert not files.is_url("/a/b") and not files.is_url("runs/a") and not files.is_url("C:\\a")
    assert files.join("gs://bucket/a/", "b") == "gs://bucket/a/b"


class StubBlobfile:
    """As much of blobfile as a dictionary can do."""

    def __init__(self):
        self.blobs = {}

    class Error(Exception):
        pass

    def exists(self, path):
        return path in self.blobs

    def isdir(self, path):
        return any(name.startswith(path.rstrip("/") + "/") for name in self.blobs)

    def listdir(self, path):
        return [name[len(path) + 1 :] for name in self.blobs]

    def BlobFile(self, path, mode, streaming):
        assert not streaming
        stub = self

        class Blob:
            def __enter__(self):
                return self

            def __exit__(self, *args):
                pass

            def write(self, data):
                stub.blobs[path] = data

            def read(self):
                return stub.blobs[path]

        if mode == "rb" and path not in self.blobs:
            raise FileNotFoundError(2, "No such file", path)
        return Blob()


def test_urls_go_through_blobfile(monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", StubBlobfile())
    files.write_bytes("gs://bucket/model000000.pt", b"1")
    assert files.read_bytes("gs://bucket/model000000.pt") == b"1"
    assert files.exists("gs://bucket/model000000.pt") and not files.exists("gs://bucket/other")
    assert files.is_dir("gs://bucket") and files.list_dir("gs://bucket") == ["model000000.pt"]
    with pytest.raises(UserError, match="cannot read gs://bucket/other"):
        files.read_bytes("gs://bucket/other")


def test_without_blobfile_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", None)
    for use in (files.exists, files.read_bytes, files.list_dir):
        with pytest.raises(UserError, match="pip install blobfile"):
            use("gs://bucket/a")


def test_what_cannot_be_read_or_made_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nothing.*No such file"):
        files.read_bytes(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*file/sub.*--out_dir"):
        files.make_dirs(tmp_path / "file" / "sub")
