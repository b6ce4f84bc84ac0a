"""A thousand hostile requests: each is refused with a 4xx, and the service goes on."""

import json
import random
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from http_helpers import TOKEN, arrays, png, post, running, status

AUTHORIZED = f"Authorization: Bearer {TOKEN}"
JSON = "Content-Type: application/json"
FAST = dict(sampler="dpmpp_2m", steps=3)
BODY = b'{"model": "pets"}'
NAMES = [
    "../../etc/passwd", "/etc/passwd", "..\\..\\windows", "pets.pt", "pets/../pets", "%2e%2e%2fpets", "pets\0", "~root",
    "file:///etc/passwd", "gs://bucket/model", "https://evil.example/model.pt", "user/name", "pets\n", "", ".", "-",
    "a" * 1000, "\U0001f600", "$(id)", "';--",
]  # fmt: skip
FOREIGN = [
    "model_path", "guide_path", "classifier_path", "out_dir", "data_dir", "compile", "batch_size", "__proto__",
    "save_steps", "print_steps", "num_samples", "base_samples", "max_image_pixels",
]  # fmt: skip
FIELDS = ["n", "steps", "sampler", "guidance_scale", "average", "timestep_grid", "precision", "stream", "model"]
VALUES = [[], {}, -1, 1e308, 2**63, 10**40, [[[]]], {"$ref": "/etc/passwd"}, ["1"]]
URLS = [
    "v1/models/../pets", "v1/models/%2e%2e%2f", "v1/models/..%5c", f"v1/models/{'x' * 3000}", "v1/models/%00",
    "v1/models/%ff", "%2e%2e/", ".git/config", "static/..%2f..%2f", "v1/results/../models", f"v1/results/{'a' * 22}",
]  # fmt: skip
NO_JSON = [b"", b"\xff\xfe", b"{", b"null", b"[]", b'"pets"', b"{'model': 'pets'}", b"\0" * 100, b"model=pets"]
MEDIA_TYPES = ["text/plain", "application/x-pickle", "application/octet-stream", "text/json", "x", ""]
TOKENS = [TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "", "Og==", "null", "%" * 50, "\t"]
HOSTS = ["evil.example", "localhost.evil.example", "169.254.169.254", "", "localhost@evil.example", "[::2]"]
SMUGGLING = [
    ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: xchunked"], ["Content-Length: +5"],
    ["Content-Length: 5", "Content-Length: 6"], ["Transfer-Encoding: chunked", "Transfer-Encoding: cow"],
    ["Transfer-Encoding:\x0bchunked"], ["Content-Length: 5, 6"], ["Transfer-Encoding : chunked"],
]  # fmt: skip
SMUGGLED = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A small PNG that says it is enormous."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sized(body, kind=JSON, path="/v1/samples"):
    body = body if isinstance(body, bytes) else body.encode()
    return post(AUTHORIZED, kind, f"Content-Length: {len(body)}", "Connection: close", body=body, path=path)


def fields(**values):
    return sized(json.dumps({"model": "pets", **values}))


def get(path, *lines, method="GET"):
    return "\r\n".join([f"{method} /{path} HTTP/1.1", "Host: localhost", *lines, "Connection: close", "", ""]).encode()


def form(*parts, boundary="x"):
    rows = [b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % part for part in parts]
    kind = f"Content-Type: multipart/form-data; boundary={boundary}"
    return sized(b"".join(rows) + b"--x--\r\n", kind, "/v1/edits/variations")


OPTIONS = (b'name="options"', json.dumps({"model": "pets", **FAST}).encode())
IMAGE = b'name="images"; filename="a.png"'
FORMS = [
    [], [OPTIONS], [OPTIONS, OPTIONS, (IMAGE, png())], [(IMAGE, png())], [OPTIONS, (IMAGE, b"no image")],
    [OPTIONS, (b'name="images"; filename="../../a.png"', b"\0" * 50)], [OPTIONS, (b'name="images"', b"text")],
    [OPTIONS, (b'name="other"; filename="a.png"', png())], [(IMAGE, png()), (b'name="options"', b"[" * 9000)],
    [OPTIONS, (IMAGE, png()), (b'name="mask"; filename="m.png"', png())], [(b"filename=x", b"")],
    [(b'name="options"; filename="a.json"', b"{}")], [OPTIONS, (IMAGE, png()[:40])], [OPTIONS, *[(IMAGE, png())] * 300],
]  # fmt: skip

# What makes a request of each kind that must be refused.
KINDS = {
    "name": lambda rng: fields(model=rng.choice(NAMES)),
    "address": lambda rng: get(rng.choice(URLS), AUTHORIZED),
    "foreign field": lambda rng: fields(**{rng.choice(FOREIGN): "x"}),
    "wrong type": lambda rng: fields(**{rng.choice(FIELDS): rng.choice(VALUES)}),
    "size": lambda rng: fields(**{rng.choice(["n", "steps"]): rng.choice([10**6, 10**9, 2**64, -5])}),
    "digits": lambda rng: sized('{"model": "pets", "n": ' + "9" * rng.randrange(100, 9000) + "}"),
    "float": lambda rng: sized(
        '{"model": "pets", "guidance_scale": ' + rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1"]) + "}"
    ),
    "deep": lambda rng: sized(rng.choice(["[", '{"model":', '{"classes":[']) * rng.randrange(100, 50_000)),
    "no json": lambda rng: sized(rng.choice(NO_JSON)),
    "media type": lambda rng: sized(BODY, f"Content-Type: {rng.choice(MEDIA_TYPES)}"),
    "token": lambda rng: post(
        f"Authorization: {rng.choice(['Bearer', 'Basic', 'Digest', ''])} {rng.choice(TOKENS)}", JSON,
        "Connection: close", f"Content-Length: {len(BODY)}", body=BODY,
    ),
    "no token": lambda rng: get(rng.choice(["metrics", "v1/models", "docs", "", "openapi.json"])),
    "host": lambda rng: post(
        f"Host: {rng.choice(HOSTS)}", AUTHORIZED, JSON, "Connection: close", f"Content-Length: {len(BODY)}", body=BODY
    ),
    "method": lambda rng: get("v1/samples", AUTHORIZED, method=rng.choice(["DELETE", "PUT", "TRACE", "A" * 50])),
    "giant": lambda rng: post(
        AUTHORIZED, JSON, "Transfer-Encoding: chunked", "Connection: close",
        body=(b"20000\r\n" + b" " * 0x20000 + b"\r\n") * 9 + b"0\r\n\r\n",
    ),
    "giant length": lambda rng: post(
        AUTHORIZED, JSON, f"Content-Length: {rng.choice([2**21, 10**12, 10**30])}", "Connection: close", body=b""
    ),
    "giant head": lambda rng: get("", f"X: {'a' * rng.randrange(40_000, 100_000)}"),
    "form": lambda rng: form(*rng.choice(FORMS)),
    "boundary": lambda rng: form(OPTIONS, (IMAGE, png()), boundary=rng.choice(["y", "", "x" * 500, '"'])),
    "bomb": lambda rng: form(OPTIONS, (IMAGE, bomb(rng.choice([20_000, 100_000, 2**31 - 1])))),
    "smuggling": lambda rng: post(AUTHORIZED, JSON, *rng.choice(SMUGGLING), "Connection: close", body=SMUGGLED),
    "garbage": lambda rng: rng.randbytes(rng.randrange(1, 500)).replace(b"\n", b" ") + b"\r\n\r\n",
}  # fmt: skip


def test_a_thousand_hostile_requests_are_refused(engine, models, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_TOKEN", TOKEN)
    rng, before, started = random.Random(0), engine.health(), time.monotonic()
    kinds = [*KINDS, *rng.choices(list(KINDS), k=1000 - len(KINDS))]
    requests = [KINDS[kind](rng) for kind in kinds]
    slow = [post(AUTHORIZED, JSON, "Content-Length: 900", body=b"{")] * 10
    with running(engine, stop=False, body_seconds=1) as service:
        with ThreadPoolExecutor(16) as pool:
            late = [pool.submit(service.raw, data, 8) for data in slow]
            replies = list(pool.map(service.raw, requests))
            assert [status(each.result()) for each in late] == [408] * len(slow)
        wrong = [
            (kind, data[:300], reply[:300])
            for kind, data, reply in zip(kinds, requests, replies)
            if not reply.startswith(b"HTTP/1.1 4") or reply.count(b"HTTP/1.1") > 1
        ]
        assert wrong == []
        print(f"{len(requests) + len(slow)} requests in {time.monotonic() - started:.1f} s")
        with service.client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            body = dict(model="pets", n=2, classes=["cat"], format="npz", **FAST)
            answer = client.post("/v1/samples", json=body)
    expected = models["pets"].sample(2, classes=["cat"], progress=False, **FAST)
    np.testing.assert_array_equal(arrays(answer), expected.array)
    after = engine.health()
    assert (after.restarts, after.failed, after.workers) == (before.restarts, before.failed, 1)
