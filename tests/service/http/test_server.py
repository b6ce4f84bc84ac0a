"""The service on a real socket: limits on connections, time and bytes; how it stops."""

import contextlib
import json
import signal
import socket
import threading
import time

import httpx
import pytest
from http_helpers import TOKEN, post, running, status, wait_until

from improved_diffusion.config import UserError
from improved_diffusion.config.service import ServeConfig
from improved_diffusion.service.http import server
from improved_diffusion.service.http.security import access_for


@pytest.fixture(scope="module")
def service():
    with running(body_seconds=1) as found:
        yield found


def test_samples(service):
    with service.client() as client:
        answer = client.post("/v1/samples", json={"model": "tiny", "n": 3})
        assert len(answer.json()["images"]) == 3
        assert "server" not in answer.headers and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_events_come_as_they_happen(service):
    service.engine.hold.clear()
    try:
        with (
            service.client() as client,
            client.stream("POST", "/v1/samples", json={"model": "tiny", "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("event: preview"))
            service.engine.hold.set()
            assert next(line for line in lines if line.startswith("event: done"))
    finally:
        service.engine.hold.set()


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_cancels(service, stream):
    service.engine.hold.clear()
    before = len(service.engine.jobs)
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        body = json.dumps({"model": "tiny", "stream": stream}).encode()
        connection.sendall(post("Content-Type: application/json", f"Content-Length: {len(body)}", body=body))
        wait_until(lambda: len(service.engine.jobs) > before)
    wait_until(lambda: service.engine.jobs[-1].state == "cancelled")
    service.engine.hold.set()


def test_a_giant_body_without_length_is_cut_off(service):
    def parts():
        for _ in range(10_000):
            yield b"x" * 65_536

    # The connection may be closed before all is sent, as it should be.
    with service.client() as client, contextlib.suppress(httpx.WriteError):
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/samples", content=parts(), headers=headers).status_code == 413
    body = b"100000\r\n" + b" " * 2**20 + b"\r\n1\r\nx\r\n0\r\n\r\n"
    assert status(service.raw(post("Transfer-Encoding: chunked", body=body), seconds=1)) == 413


def test_a_slow_body_is_cut_off(service):
    started = time.monotonic()
    reply = service.raw(post("Content-Length: 100", "Content-Type: application/json"), seconds=10)
    assert status(reply) == 408 and time.monotonic() - started < 6


def test_slow_heads_are_cut_off(monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    with running() as service:
        for data in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            assert status(service.raw(data)) == 408
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            found = b""
            while not found.endswith(b"}"):
                found += connection.recv(65536)
            connection.sendall(b"GET /heal")
            assert status(connection.recv(65536)) == 408


def test_connections_are_bounded():
    with running(max_connections=3) as service, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
        wait_until(lambda: len(service.server.server_state.connections) == 3)
        reply = service.raw(b"")
        assert status(reply) == 503 and b"retry-after" in reply


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,  # TLS
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"),
        post("Content-Length: 5", "Content-Length: 50"),
        post("Content-Length: -1"),
        post("Transfer-Encoding: gzip, chunked"),
        post("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        post("Transfer-Encoding:\x0bchunked"),
        post("Transfer-Encoding: chunked", body=b"zz\r\n"),
        post("Transfer-Encoding : chunked"),
        post(" folded: x"),
    ],
)  # fmt: skip
def test_what_is_not_plain_http_is_refused(service, data):
    reply = service.raw(data, seconds=1)
    assert 400 <= status(reply) < 500 and reply.count(b"HTTP/1.1") == 1
    with service.client() as client:
        assert client.get("/healthz").status_code == 200


def test_a_stop_finishes_what_is_running():
    with running() as service, service.client() as client:
        service.engine.hold.clear()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/samples", json={"model": "tiny"})))
        asking.start()
        wait_until(lambda: service.engine.jobs)
        service.engine.stop_waits = True
        service.signal()
        wait_until(lambda: service.service.stopping)
        with service.client() as other:
            assert other.post("/v1/samples", json={"model": "tiny"}).status_code == 503
            assert other.get("/healthz").status_code == 503
        service.engine.hold.set()
        asking.join(10)
        assert answers[0].status_code == 200
        service.thread.join(10)
        assert not service.thread.is_alive() and service.server.second == 0


def test_a_second_signal_ends_at_once():
    with running() as service, service.client() as client:
        service.engine.hold.clear()
        service.engine.stop_waits = True
        errors = []

        def ask():
            try:
                errors.append(client.post("/v1/samples", json={"model": "tiny"}).status_code)
            except httpx.HTTPError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: service.engine.jobs)
        service.signal()
        wait_until(lambda: service.service.stopping)
        started = time.monotonic()
        service.signal(signal.SIGINT)
        service.thread.join(10)
        assert not service.thread.is_alive() and time.monotonic() - started < 5
        assert service.server.second == signal.SIGINT
        asking.join(10)
        assert errors and errors != [200]


def test_a_port_in_use_is_one_mistake():
    with server.listen(ServeConfig(port=0)) as listener, pytest.raises(UserError, match="another program uses this"):
        server.listen(ServeConfig(port=listener.getsockname()[1]))


@pytest.mark.parametrize("host", ["no such host", "203.0.113.7", "256.1.1.1"])
def test_a_host_that_is_not_here_is_one_mistake(host):
    with pytest.raises(UserError, match="--host"):
        server.listen(ServeConfig(host=host, port=0))


@pytest.mark.parametrize(
    ("host", "token", "said"),
    [
        ("127.0.0.1", "", ["http://127.0.0.1:", "this machine only", "no token"]),
        ("127.0.0.1", TOKEN, ["IMPROVED_DIFFUSION_TOKEN"]),
        ("0.0.0.0", TOKEN, ["other machines", "IMPROVED_DIFFUSION_TOKEN", "TLS"]),
    ],
)
def test_the_start_says_who_may_use_it(host, token, said, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_TOKEN", token)
    options = ServeConfig(host=host, port=0)
    with server.listen(options) as listener:
        text = server.announcement(listener, options, access_for(options))
        assert f":{listener.getsockname()[1]} " in text
    assert all(word in text for word in said) and TOKEN not in text
