"""Downloads: streamed to the disk, and never kept unless they are the right file. `fetch` has tests of its own."""

import hashlib
import http.server
import threading
import tracemalloc

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.utils import downloads

CONTENT = bytes(range(256)) * 2**16  # 16 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if "cut" in self.path else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/file.pt"
        server.shutdown()
        thread.join()


def test_a_file_is_written_as_it_arrives_and_reported(url, tmp_path):
    received = []
    tracemalloc.start()
    downloads.download(url, tmp_path / "f.pt", SHA256, lambda count, total: received.append((count, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "f.pt").read_bytes() == CONTENT
    assert peak < len(CONTENT) / 4
    assert sum(count for count, _ in received) == len(CONTENT)
    assert {total for _, total in received} == {len(CONTENT)}


def test_a_file_with_another_checksum_is_never_kept(url):
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError, match=wrong):
        downloads.cached(url, wrong)
    assert list(downloads.cache_dir().iterdir()) == []
    assert downloads.cached(url, SHA256) == downloads.cache_path(url)
    with pytest.raises(UserError, match="remove it"):  # the cache's own file is checked too
        downloads.cached(url, wrong)


def test_a_cut_download_leaves_the_old_file(url, tmp_path):
    (tmp_path / "f.pt").write_bytes(b"old")
    with pytest.raises(UserError, match="cannot download"):
        downloads.download(url + "?cut", tmp_path / "f.pt")
    assert (tmp_path / "f.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["f.pt"]


def test_a_full_disk_is_not_called_a_failed_download(url, tmp_path, monkeypatch):
    (tmp_path / "folder").touch()
    with pytest.raises(UserError, match="cannot write"):
        downloads.download(url, tmp_path / "folder" / "f.pt")
