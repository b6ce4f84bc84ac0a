"""Files from URLs: fetched once, kept with their checksum, and never taken when damaged."""

import hashlib
import http.server
import threading

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import downloads
from improved_diffusion.utils import downloads as cache

CONTENT = bytes(range(256)) * 3000  # of several reads


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/garbage.pt":
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        if self.path == "/chunks.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nnot so many")
            return
        if self.path == "/missing.pt":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/without_length.pt":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut.pt" else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; `asked` are the paths that it was asked for, `url` is where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.stop = lambda: (server.shutdown(), thread.join(), server.server_close())
    yield server
    if thread.is_alive():
        server.stop()


def read(path):
    with open(path, "rb") as f:
        return f.read()


@pytest.mark.parametrize("name", ["file.pt", "without_length.pt"])
def test_a_file_is_downloaded_once_and_kept_with_its_sha256(server, tmp_path, name):
    url = f"{server.url}/{name}"
    path = downloads.fetch(url, "--features")
    assert read(path) == CONTENT
    assert str(cache.cache_dir()) == str(tmp_path / "cache" / "improved_diffusion")
    assert sorted(each.name for each in cache.cache_dir().iterdir()) == [
        f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}",
        f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}.sha256",
    ]
    assert read(path + ".sha256").decode().strip() == hashlib.sha256(CONTENT).hexdigest()
    server.stop()
    assert downloads.fetch(url, "--features") == path
    assert server.asked == [f"/{name}"]


def test_files_of_one_name_from_two_places_are_two(server):
    first, second = (downloads.fetch(f"{server.url}/{folder}/file.pt", "--features") for folder in "ab")
    assert first != second and server.asked == ["/a/file.pt", "/b/file.pt"]


@pytest.mark.parametrize(
    "name, why",
    [
        ("missing.pt", "404"),
        ("cut.pt", "1000"),
        ("garbage.pt", "nonsense"),
        ("chunks.pt", "IncompleteRead"),
        ("a b.pt", "control characters"),
        ("file.pt", "refused"),
    ],
)
def test_a_download_that_fails_says_where_to_put_the_file(server, name, why):
    url = f"{server.url}/{name}"
    if why == "refused":
        server.stop()
    with pytest.raises(UserError) as caught:
        downloads.fetch(url, "--features")
    target = cache.cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    message = str(caught.value)
    assert message.startswith(f"cannot download {url} (") and message.endswith(
        f": fetch it elsewhere and put it at {target}"
    )
    assert why in message and "\n" not in message
    assert not target.exists() and list(cache.cache_dir().iterdir()) == []
    target.write_bytes(b"by hand")
    assert read(downloads.fetch(url, "--features")) == b"by hand"
    assert target.with_name(target.name + ".sha256").exists()


def test_a_host_that_does_not_exist_is_named(server):
    with pytest.raises(UserError, match=r"cannot download http://nowhere\.invalid/f\.pt .*fetch it elsewhere"):
        downloads.fetch("http://nowhere.invalid/f.pt", "--features")


def test_a_kept_file_that_changed_is_refused(server):
    url = f"{server.url}/file.pt"
    path = downloads.fetch(url, "--features")
    with open(path, "r+b") as f:
        f.write(b"other")
    with pytest.raises(UserError, match=rf"is not the file of {url}.*: remove it, and .*file\.pt\.sha256 beside it"):
        downloads.fetch(url, "--features")
    with open(path, "wb") as f:
        f.write(CONTENT)
    assert downloads.fetch(url, "--features") == path


def test_a_local_file_is_itself(tmp_path, server):
    (tmp_path / "f.pt").write_bytes(b"x")
    assert downloads.fetch(str(tmp_path / "f.pt"), "--features") == str(tmp_path / "f.pt")
    with pytest.raises(UserError, match=r"^--features .*absent\.pt does not exist$"):
        downloads.fetch(str(tmp_path / "absent.pt"), "--features")
    assert not cache.cache_dir().exists()


def test_the_cache_is_in_the_home_folder_unless_told(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "improved_diffusion"
