"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it, on this machine, in a thread."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import pytest

from improved_diffusion.utils import hub as hub_rules

TOKEN = "hf_secretOfTheTests42"


@dataclass
class Repository:
    """Its commits, each {file name: content}; the newest is the last."""

    private: bool = False
    gated: bool = False
    commits: list = field(default_factory=list)

    def commit_of(self, revision):
        """(the commit's id, its files), or None."""
        for number, files in reversed(list(enumerate(self.commits))):
            if revision in ("main", commit_id(number)):
                return commit_id(number), files
        return None


def commit_id(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


class HubServer(http.server.ThreadingHTTPServer):
    """`repositories` by name; `asked`: (method, path, authorization) of each request.

    `answers` are functions (handler) -> whether it has answered, tried first. `sizes` and `etags` are what is said of
    files instead of the truth.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.large, self.asked, self.answers, self.sizes, self.etags = {}, {}, [], [], {}, {}
        self.done, self.handle_error = threading.Event(), lambda *args: None
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        if self.thread.is_alive():
            self.done.set()
            self.shutdown()
            self.thread.join()
            self.server_close()

    def add(self, name, files, **how):
        """A repository with one commit."""
        self.repositories[name] = Repository(commits=[dict(files)], **how)
        return self.repositories[name]

    def paths(self, method):
        return [path for verb, path, _ in self.asked if verb == method]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.respond()

    do_HEAD = do_POST = do_PUT = do_GET

    def respond(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        self.path = unquote(urlsplit(self.path).path)
        if self.server.done.is_set():  # of a connection that was kept open
            self.close_connection = True
            return
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if any(answer(self) for answer in self.server.answers):
            return
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, self.path):
                method(self, *match.groups())
                return
        self.fail(404, "EntryNotFound")

    def send(self, content, status=200, **headers):
        content = json.dumps(content).encode() if isinstance(content, (dict, list)) else content
        headers = {"Content-Length": str(len(content)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status, code="", message=""):
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.send({"error": message or code}, status, **{k: v for k, v in headers.items() if v})

    def repository(self, name):
        """The repository, where it exists and the request may see it; otherwise the answer is sent."""
        found, authorized = self.server.repositories.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not authorized):
            self.fail(404 if authorized else 401, "RepoNotFound")
        elif found.gated and not authorized and "/resolve/" in self.path:
            self.fail(403, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return found
        return None

    def may_write(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(403, "", "You don't have the rights")
            return False
        return True

    # What is asked

    def info(self, name, revision=None):
        if not (found := self.repository(name)):
            return
        commit = found.commit_of(revision or "main")
        if not commit:
            self.fail(404, "RevisionNotFound")
            return
        files = [
            {"rfilename": each, "size": self.server.sizes.get(each, len(content)), "blobId": "0" * 40}
            for each, content in commit[1].items()
        ]
        self.send({"id": name, "sha": commit[0], "private": found.private, "siblings": files, "tags": []})

    def resolve(self, name, revision, path):
        if not (found := self.repository(name)):
            return
        commit = found.commit_of(revision)
        if not commit:
            self.fail(404, "RevisionNotFound")
        elif path not in commit[1]:
            self.fail(404, "EntryNotFound")
        else:
            content = commit[1][path]
            etag = self.server.etags.get(path, f'"{hashlib.sha256(content).hexdigest()}"')
            self.send(content, ETag=etag, X_Repo_Commit=commit[0])

    def create(self):
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        if name in self.server.repositories:
            self.fail(409, "", "You already created this model repo")
            return
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=bool(is_private), commits=[{".gitattributes": b"x"}])
        self.send({"url": f"{self.server.url}/{name}"})

    def validate(self):
        self.send({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        if self.may_write():
            large = lambda path: path.endswith(".safetensors")  # noqa: E731
            self.send({"files": [
                {"path": each["path"], "uploadMode": "lfs" if large(each["path"]) else "regular", "shouldIgnore": False}
                for each in json.loads(self.body)["files"]
            ]})  # fmt: skip

    def lfs_batch(self, name):
        if self.may_write():
            objects = json.loads(self.body)["objects"]
            href = f"{self.server.url}/lfs/"
            self.send({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": href + each["oid"]}}} for each in objects
            ]})  # fmt: skip

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self.send({})

    def commit(self, name, revision):
        if not self.may_write():
            return
        found = self.server.repositories[name]
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        parent, newest = header["value"].get("parentCommit"), commit_id(len(found.commits) - 1)
        if parent not in (None, newest):
            self.fail(412, "", "A commit has happened since")
            return
        files = dict(found.commits[-1])
        for line in lines:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            files[value["path"]] = self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        found.commits.append(files)
        oid = commit_id(len(found.commits) - 1)
        self.send({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(.+)", Handler.lfs_put),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, as the Hub of this process and of those that it starts; nobody is logged in, the cache is empty."""
    pytest.importorskip("huggingface_hub")
    package = hub_rules.package()
    home = tmp_path / "hf"
    server = HubServer()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    variables = {
        "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1", "no_proxy": "*",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # What the package read of the environment when it was imported.
    monkeypatch.setattr(package.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(package.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(package.constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(package.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(package.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two tries
    monkeypatch.setattr(hub_rules, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(hub_rules, "TIMEOUT_SECONDS", 1.0)
    server.cache = home / "hub"
    yield server
    server.stop()
    package.close_session()
