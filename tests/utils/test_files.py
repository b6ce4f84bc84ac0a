"""Files on this machine and behind URLs."""

import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from script_helpers import environment

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

            def read(self, size=-1):
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


def test_the_folder_of_a_file(tmp_path):
    assert files.folder_of("gs://bucket/run/model000000.pt") == "gs://bucket/run"
    assert files.folder_of(tmp_path / "model000000.pt") == str(tmp_path)
    assert files.folder_of("model000000.pt") == "."


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


def written(path):
    files.write_bytes(path, b"1")


def written_in_pieces(path):
    with files.open_write(path) as f:
        f.write(b"1")


@pytest.mark.parametrize("write", [written, written_in_pieces])
@pytest.mark.parametrize("name", ["a_folder", "a_file/below", "a_loop/below"])
def test_what_is_in_the_place_of_a_file_to_write_is_to_be_removed(tmp_path, write, name):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").touch()
    (tmp_path / "a_loop").symlink_to(tmp_path / "a_loop")
    with pytest.raises(UserError, match=f"cannot write .*{name}: .*remove what is in its place") as error:
        write(tmp_path / name)
    assert "free some space" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/a", "ftp://host/a", "htp://host/a", "file:///a", "http://host/a", "://a"])
def test_schemes_that_are_not_known_are_named_with_those_that_are(url):
    uses = (
        files.exists,
        files.is_dir,
        files.read_bytes,
        files.list_dir,
        files.make_dirs,
        files.remove,
        files.open_read,
    )
    for use in (*uses, lambda path: files.write_bytes(path, b""), lambda path: files.rename(path, path)):
        with pytest.raises(UserError, match="gs://, az://, https://") as error:
            use(url)
        assert url in str(error.value)


def test_a_web_page_is_not_storage():
    pytest.importorskip("blobfile")
    for use in (files.exists, files.is_dir, files.read_bytes, files.list_dir):
        with pytest.raises(UserError, match="https://host/a"):
            use("https://host/a")


# Signals


WRITERS = {
    "piece by piece": "with files.open_write('new.bin') as f: f.write(b'x'); end()",
    "in a folder": "with files.staging('new.bin') as folder: (folder / 'new.bin').write_bytes(b'x'); end()",
    "together": "files.write_together(end() if name == 'c' else (name, b'x') for name in 'abc')",
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_leaves_no_temporary_file(tmp_path, writer, number):
    code = (
        "import os, signal, time\nfrom improved_diffusion.utils import files\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"def end():\n    assert os.listdir()\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\n"
        f"{WRITERS[writer]}\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), timeout=60)
    assert ended.returncode == -number and list(tmp_path.iterdir()) == []


# Claims

CLAIM = """
import sys, time
from improved_diffusion.config import UserError
from improved_diffusion.utils import files
try:
    files.lock(sys.argv[1])
except UserError as error:
    print(error, flush=True)
else:
    print("claimed", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def claim_elsewhere(folder, seconds=0.0):
    """A process that claims the folder; the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder), str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def claimed_elsewhere(folder):
    """Whether another process can claim the folder."""
    process, line = claim_elsewhere(folder)
    process.communicate()
    assert line == "claimed" or str(folder) in line
    return line == "claimed"


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_a_folder_is_claimed_until_each_claim_of_the_process_is_released(tmp_path):
    first = files.lock(tmp_path)
    with files.lock(tmp_path):
        assert not claimed_elsewhere(tmp_path)
    first.release()
    first.release()  # counts once
    assert claimed_elsewhere(tmp_path)
    files.lock(tmp_path)  # a claim that nobody keeps lasts as well
    gc.collect()
    assert not claimed_elsewhere(tmp_path)
    files.lock(tmp_path).release()
    assert not claimed_elsewhere(tmp_path)


def test_a_claim_ends_with_its_process_even_a_killed_one(tmp_path):
    process, line = claim_elsewhere(tmp_path, 60)
    assert line == "claimed"
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        files.lock(tmp_path)
    process.kill()
    process.communicate()
    with files.lock(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_neither_holds_nor_drops_a_claim(tmp_path):
    claim = files.lock(tmp_path)
    go_on, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        claim.release()
        del claim
        files._locks.clear()
        gc.collect()
        os.read(go_on, 1)
        os._exit(0)
    try:
        assert not claimed_elsewhere(tmp_path)
        claim.release()
        assert claimed_elsewhere(tmp_path)
    finally:
        os.close(end)
        os.waitpid(child, 0)
        os.close(go_on)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted on Linux")
def test_claims_leak_no_descriptors(tmp_path):
    before = open_files()
    for _ in range(5):
        with files.lock(tmp_path), files.lock(tmp_path):
            assert open_files() == before + 1
    process, _ = claim_elsewhere(tmp_path, 60)
    before = open_files()
    for _ in range(3):
        with pytest.raises(UserError):
            files.lock(tmp_path)
    assert open_files() == before
    process.kill()
    process.communicate()


def test_claims_of_two_names_are_independent_and_urls_are_not_claimed(tmp_path):
    with files.lock(tmp_path, ".other"):
        assert claimed_elsewhere(tmp_path)
    with files.lock("gs://bucket/run"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/"):
        files.lock(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "NaN", "[1e999]", "-Infinity", '"\\ud800"', "{", "", b"\xff\xfe", "9" * 5000]
)
def test_text_that_is_not_json_is_a_users_error(text):
    with pytest.raises(UserError, match=r"a\.json"):
        files.parse_json(text, "a.json")


@pytest.mark.parametrize("digits", ["9" * 100, "-" + "9" * 4000, "9" * 4301, "9" * 10**6, "9" * 5000 + ".5"])
@pytest.mark.parametrize("text", ["{}", "[{}]", '{{"a": [1, {}]}}'])
def test_a_number_that_is_too_long_is_said_in_few_words(digits, text):
    with pytest.raises(UserError, match=r"a\.json") as error:
        files.parse_json(text.format(digits), "a.json")
    assert "Exceeds" not in str(error.value) and "string conversion" not in str(error.value)
    assert len(str(error.value)) < 300
    assert ("digits" in str(error.value)) == ("." not in digits)
    assert files.parse_json(text.format("9" * 99), "a.json")


def test_a_pipe_or_a_folder_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match=str(path)):
            files.read_bytes(path)


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(UserError, match="4 bytes"):
        files.read_bytes(tmp_path / "a", limit=4)


def stage(path, contents):
    with files.staging(path) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)


def test_a_staged_file_and_what_belongs_to_it_replace_the_old_ones(tmp_path):
    for number in (b"1", b"2"):
        stage(tmp_path / "new" / "a.bin", {"a.bin": number, "a.bin.data": number * 2})
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == {"a.bin": b"2", "a.bin.data": b"22"}


def test_a_staged_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), files.staging(tmp_path / "a.bin") as folder:
        (folder / "a.bin").write_bytes(b"half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["folder", "file/a.bin", "gs://bucket/a.bin"])
def test_what_cannot_be_staged_is_named_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="folder" if name == "folder" else "file" if "file" in name else "gs://"):
        stage(name if "://" in name else tmp_path / name, None)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_folder_whose_lock_is_no_plain_file_is_not_claimed(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"cannot write .*\.lock: it is a (link|folder|pipe)"):
        files.lock(tmp_path)


def write_whole(path):
    files.write_bytes(path, b"new")


def write_in_pieces(path):
    with files.open_write(path) as f:
        f.write(b"new")


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "file"])
@pytest.mark.parametrize("write", [write_whole, write_in_pieces])
def test_a_link_in_the_place_of_a_written_file_is_replaced_and_not_followed(tmp_path, write, kind):
    target, other = tmp_path / "a.txt", tmp_path / "other"
    if kind == "link":
        other.write_text("not ours")
    make = {"pipe": os.mkfifo, "file": Path.touch}.get(kind, lambda path: path.symlink_to(other))
    make(tmp_path / f".a.txt.{os.getpid()}.tmp")
    if kind != "pipe":
        make(target)
    write(str(target))
    assert target.read_text() == "new" and not target.is_symlink()
    assert other.read_text() == "not ours" if kind == "link" else not other.exists()


def write_staged(path):
    stage(path, {Path(path).name: b"new"})


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
@pytest.mark.parametrize("write", [write_whole, write_in_pieces, write_staged])
def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path, write, kind):
    path = tmp_path / "a.bin"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(os.devnull)
    before = os.lstat(path)
    with pytest.raises(UserError, match=re.escape(f"cannot write {path}")):
        write(path)
    assert os.lstat(path) == before and list(tmp_path.iterdir()) == [path]
