"""Files from URLs: fetched once, kept with their checksum, and never taken when damaged."""

import hashlib
import http.server
import io
import threading
import time
import zipfile

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import downloads
from improved_diffusion.utils import downloads as cache


def archive(content):
    """A zip archive, as feature programs are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("content", content)
    return file.getvalue()


CONTENT = archive(bytes(range(256)) * 3000)  # of several reads
PAGE = b"<html><body>Please log in</body></html>"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/garbage.pt":
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        if self.path == "/chunks.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nnot so many")
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("HERE", self.server.url))
            self.end_headers()
            return
        if self.path == "/endless.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                self.wfile.write(CONTENT[:1000])
        if self.path == "/drip.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                self.wfile.write(b"P")
                time.sleep(0.02)
        if self.path == "/stops.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nPK")
            self.server.done.wait(20)
            return
        if self.path == "/huge.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\nPK")
            return
        if self.path == "/negative.pt":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nPK")
            return
        if self.path == "/missing.pt":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/without_length.pt":
            self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut.pt" else self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; `asked` are the paths that it was asked for, `url` is where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    server.content, server.done, server.handle_error = CONTENT, threading.Event(), lambda *args: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.stop = lambda: (server.done.set(), server.shutdown(), thread.join(), server.server_close())
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
        ("negative.pt", "-5"),
        ("huge.pt", "99,999,999,999,999 bytes, but at most"),
        ("to/file:///etc/passwd", "file:///etc/passwd"),
        ("to/ftp://127.0.0.1/f.pt", "unknown url type: ftp"),
        ("to/HERE/to/HERE/missing.pt", "404"),
        ("file.pt", "refused"),
    ],
)
def test_a_download_that_fails_says_where_to_put_the_file(server, name, why):
    url = f"{server.url}/{name}"
    if why == "refused":
        server.stop()
    with pytest.raises(UserError) as caught:
        downloads.fetch(url, "--features")
    target = cache.cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name.rpartition('/')[2]}"
    message = str(caught.value)
    assert message.startswith(f"cannot download {url} (") and message.endswith(
        f": fetch it elsewhere and put it at {target}"
    )
    assert why in message and "\n" not in message
    assert not target.exists() and list(cache.cache_dir().iterdir()) == []
    target.write_bytes(by_hand := archive(b"by hand"))
    assert read(downloads.fetch(url, "--features")) == by_hand
    assert target.with_name(target.name + ".sha256").exists()


def test_a_host_that_does_not_exist_is_named(server):
    with pytest.raises(UserError, match=r"cannot download http://nowhere\.invalid/f\.pt .*fetch it elsewhere"):
        downloads.fetch("http://nowhere.invalid/f.pt", "--features")


def test_a_kept_file_that_changed_is_refused(server):
    url = f"{server.url}/file.pt"
    path = downloads.fetch(url, "--features")
    with open(path, "wb") as f:
        f.write(archive(b"other"))
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


# What is not a program


@pytest.mark.parametrize("name", ["file.pt", "without_length.pt"])
@pytest.mark.parametrize(
    "wrong", [PAGE, b"", b"PK", CONTENT[:-100], b'{"error": "quota"}', b"\x1b[2J" * 9, PAGE + CONTENT], ids=range(7)
)
def test_what_is_no_program_is_not_kept_and_asked_for_again(server, name, wrong):
    url = f"{server.url}/{name}"
    server.content = wrong
    with pytest.raises(UserError) as error:
        downloads.fetch(url, "--features")
    assert url in str(error.value) and "nothing was kept" in str(error.value) and str(error.value).isprintable()
    assert list(cache.cache_dir().iterdir()) == []
    server.content = CONTENT
    assert read(downloads.fetch(url, "--features")) == CONTENT


def test_a_page_that_the_cache_has_kept_is_replaced(server):
    url = f"{server.url}/file.pt"
    target = cache.cache_path(url)
    target.parent.mkdir(parents=True)
    target.write_bytes(PAGE)
    target.with_name(target.name + ".sha256").write_text(hashlib.sha256(PAGE).hexdigest())
    assert read(downloads.fetch(url, "--features")) == CONTENT
    assert target.with_name(target.name + ".sha256").read_text() == hashlib.sha256(CONTENT).hexdigest()


def test_a_damaged_note_is_named(server):
    url = f"{server.url}/file.pt"
    path = downloads.fetch(url, "--features")
    for damage in (b"", b"\xff" * 64, b"x" * 1000):
        with open(path + ".sha256", "wb") as f:
            f.write(damage)
        with pytest.raises(UserError, match=r"file\.pt\.sha256"):
            downloads.fetch(url, "--features")


@pytest.mark.parametrize(
    "name, why", [("endless.pt", "bytes, but at most"), ("drip.pt", "seconds"), ("stops.pt", "timed out")]
)
def test_a_download_without_end_ends(server, monkeypatch, name, why):
    monkeypatch.setattr(cache, "MAX_BYTES", 10**6)
    monkeypatch.setattr(cache, "TIMEOUT_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=why):
        downloads.fetch(f"{server.url}/{name}", "--features")
    assert time.monotonic() - start < 10 and list(cache.cache_dir().iterdir()) == []


@pytest.mark.parametrize("url", ["s3://b/f.pt", "ftp://h/f.pt", "htp://h/f.pt", "file:///etc/passwd", "://f.pt"])
def test_a_url_of_an_unknown_scheme_is_named_with_those_that_are_known(server, url):
    with pytest.raises(UserError, match=r"gs://, az://, https://"):
        downloads.fetch(url, "--features")


def test_long_names_of_urls_are_cut(server):
    url = f"{server.url}/file.pt?token=" + "x" * 1000
    assert read(downloads.fetch(url, "--features")) == CONTENT
