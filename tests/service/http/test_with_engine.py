"""The service with the real engine: images are those of the Python API, whatever else is asked for meanwhile."""

import asyncio
import io
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from http_helpers import TOKEN, Client, events, pixels, png, post, running, status
from model_helpers import CLASSES, save_checkpoint, tiny_settings

import improved_diffusion as idf
from improved_diffusion.config.service import EngineConfig
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.service.catalogue import Catalogue
from improved_diffusion.service.engine import Engine

FAST = dict(sampler="dpmpp_2m", steps=3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    large = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    return {
        "pets": save_checkpoint(
            folder / "pets.pt", tiny_settings(class_cond=True, label_drop=0.1), class_names=CLASSES
        ),
        "large": save_checkpoint(folder / "large.pt", large),
    }


@pytest.fixture(scope="module")
def engine(paths):
    with Engine(Catalogue(model_paths=[str(path) for path in paths.values()]), EngineConfig(max_queue=100)) as found:
        yield found


@pytest.fixture(scope="module")
def client(engine):
    return Client(engine)


@pytest.fixture(scope="module")
def models(paths):
    return {name: idf.load(path) for name, path in paths.items()}


def arrays(answer):
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content)) as found:
        return found["arr_0"]


@pytest.mark.parametrize(
    "body",
    [
        dict(n=3, seed=5, classes=["dog", "cat"]),
        dict(n=2, classes=[1], guidance_scale=2.0),
        dict(seeds="17,3-4", seed=1),
        dict(n=2, sampler="ancestral", steps=4, dynamic_threshold=0.9),
    ],
)
def test_samples_are_those_of_python(client, models, body):
    body = {**FAST, **body}
    answer = client.sample(model="pets", format="npz", **body)
    expected = models["pets"].sample(body.pop("n", None), progress=False, **body)
    np.testing.assert_array_equal(arrays(answer), expected.array)
    with np.load(io.BytesIO(answer.content)) as found:
        np.testing.assert_array_equal(found["arr_1"], expected.labels)


def test_a_stream_ends_with_the_same_images(client, models):
    answer = client.sample(model="pets", n=2, seed=9, classes=["cat"], stream=True, format="npz", **FAST)
    kind, data = events(answer.text)[-1]
    assert kind == "done"
    expected = models["pets"].sample(2, seed=9, classes=["cat"], progress=False, **FAST)
    np.testing.assert_array_equal(arrays(client("GET", data["result"])), expected.array)


def test_file_names_are_the_commands(client):
    rows = client.sample(model="pets", n=2, classes=["dog", "cat"], **FAST).json()["images"]
    assert [(row["name"], row["class"]) for row in rows] == [("dog_000000.png", "dog"), ("cat_000001.png", "cat")]


FILES = [("images", ("a.png", png((20, 30), seed=1))), ("images", ("b.png", png((8, 8), "L", seed=2)))]


def given():
    from PIL import Image

    return [Image.open(io.BytesIO(file[1])) for _, file in FILES]


def test_variations_are_those_of_python(client, models):
    options = dict(n=3, strength=0.5, seed=2, classes=["cat"], **FAST)
    expected = models["pets"].variations(given(), progress=False, **options)
    np.testing.assert_array_equal(
        arrays(client.edit("variations", FILES, model="pets", format="npz", **options)), expected.array
    )


def test_inpainting_is_that_of_python(client, models):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    options = dict(n=2, seed=2, classes=["cat"], sampler="ancestral", steps=4, jump_length=2, resamplings=2)
    expected = models["pets"].inpaint(given(), mask, progress=False, **options)
    files = [*FILES, ("mask", ("m.png", buffer.getvalue()))]
    np.testing.assert_array_equal(
        arrays(client.edit("inpaint", files, model="pets", format="npz", **options)), expected.array
    )


def test_interpolation_is_that_of_python(client, models):
    steps = dict(steps=3)
    expected = models["pets"].interpolate(*given(), 4, classes=["cat"], progress=False, **steps)
    answer = client.edit("interpolate", FILES, model="pets", frames=4, classes=["cat"], format="npz", **steps)
    np.testing.assert_array_equal(arrays(answer), expected.array)
    expected = models["pets"].interpolate(3, 7, 4, classes=["cat"], progress=False, **steps)
    parts = {
        "options": (
            None,
            json.dumps(dict(model="pets", seeds=[3, 7], frames=4, classes=["cat"], format="npz", **steps)),
        )
    }
    np.testing.assert_array_equal(arrays(client("POST", "/v1/edits/interpolate", files=parts)), expected.array)


def test_a_transformation_encodes_and_decodes(client, models):
    latents = models["pets"].encode(given(), classes=["cat"], steps=3)
    expected = models["pets"].decode(latents, classes=["dog"], progress=False)
    answer = client.edit(
        "transform", FILES, model="pets", image_classes=["cat"], classes=["dog"], n=0, format="npz", steps=3
    )
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_upscaling_is_that_of_python(client, models):
    expected = models["large"].upscale(given(), seed=4, progress=False, **FAST)
    answer = client.edit("upscale", FILES, model="large", seed=4, format="npz", **FAST)
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_many_clients_get_their_own_images(engine, models):
    """64 clients ask for 4 images each, at once."""
    client, before = Client(engine), engine.health()
    body = dict(model="pets", n=4, classes=["cat", "dog"], sampler="ddim", steps=10, format="npz")

    async def ask(http, seed):
        return await http.post("/v1/samples", json={**body, "seed": seed})

    async def go():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as http:
            return await asyncio.gather(*(ask(http, seed) for seed in range(64)))

    answers = asyncio.run(go())
    assert engine.health().batches - before.batches < 64 / 4
    options = dict(classes=["cat", "dog"], sampler="ddim", steps=10, progress=False)
    for seed, answer in enumerate(answers):
        np.testing.assert_array_equal(arrays(answer), models["pets"].sample(4, seed=seed, **options).array)


def test_leaving_frees_the_engine(engine):
    with running(engine, stop=False) as service:
        connections = []
        body = json.dumps({"model": "pets", "n": 64, "sampler": "ancestral", "steps": 20}).encode()
        import socket

        for _ in range(8):
            connection = socket.create_connection(("127.0.0.1", service.port))
            connection.sendall(post("Content-Type: application/json", f"Content-Length: {len(body)}", body=body))
            connections.append(connection)
        deadline = time.monotonic() + 10
        while engine.health().waiting + engine.health().running < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        while engine.health().waiting + engine.health().running:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# 1,000 hostile requests

AUTHORIZED = f"Authorization: Bearer {TOKEN}"
JSON = "Content-Type: application/json"
PATHS = [
    "../../etc/passwd", "/etc/passwd", "..\\..\\windows", "pets.pt", "pets/../pets", "%2e%2e%2fpets", "pets\0", "~root", "file:///etc/passwd",
    "gs://bucket/model", "https://evil.example/model.pt", "user/name", "pets\n", "", ".", "-", "a" * 1000, "\ud83d\ude00", "con", "$(id)", "';--",
]  # fmt: skip
WRONG = [None, True, [], {}, -1, 0, 1e308, "1", "NaN", 2**63, 10**40, [[[]]], "\u0000", {"$ref": "/etc/passwd"}]
FIELDS = [
    "n",
    "seed",
    "steps",
    "sampler",
    "classes",
    "guidance_scale",
    "format",
    "average",
    "seeds",
    "timestep_grid",
    "precision",
]
HARMLESS = {("classes", "None"), ("format", "None"), ("seed", "0"), ("seed", "9223372036854775808")}


def hostile(rng):
    """The bytes of a request that must be refused."""

    def sized(body, *lines, path="/v1/samples", kind=JSON):
        body = body if isinstance(body, bytes) else body.encode()
        return post(AUTHORIZED, kind, f"Content-Length: {len(body)}", "Connection: close", *lines, body=body, path=path)

    def form(*parts, path="/v1/edits/variations", boundary="x"):
        body = (
            b"".join(
                b"--x\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
            )
            + b"--x--\r\n"
        )
        return sized(body, path=path, kind=f"Content-Type: multipart/form-data; boundary={boundary}")

    options = (b'name="options"', json.dumps({"model": "pets", **FAST}).encode())
    number = rng.randrange(10**6)
    kinds = {
        "model": lambda: sized(json.dumps({"model": rng.choice(PATHS)})),
        "model page": lambda: f"GET /v1/models/{rng.choice(['../pets', '%2e%2e%2f', '..%5c', 'x' * 3000, '%00', '%ff'])} HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}\r\nConnection: close\r\n\r\n".encode(),
        "path": lambda: f"GET /{rng.choice(['../', '%2e%2e/', '.git/config', 'static/..%2f..%2f', 'v1/results/../models', 'v1/results/' + 'a' * 22])}{number} HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}\r\nConnection: close\r\n\r\n".encode(),
        "unknown field": lambda: sized(json.dumps({"model": "pets", rng.choice(["model_path", "guide_path", "classifier_path", "out_dir", "data_dir", "compile", "batch_size", "__proto__", "save_steps"]): "x"})),
        "size": lambda: sized(json.dumps({"model": "pets", rng.choice(["n", "steps"]): rng.choice([10**6, 10**9, 2**64, 10**40, -5])})),
        "digits": lambda: sized('{"model": "pets", "n": ' + "9" * rng.randrange(100, 9000) + "}"),
        "float": lambda: sized('{"model": "pets", "guidance_scale": ' + rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1"]) + "}"),
        "deep": lambda: sized(rng.choice(["[", '{"model":', '{"classes":[']) * rng.randrange(100, 50_000)),
        "no json": lambda: sized(rng.choice([b"", b"\xff\xfe", b"{", b"null", b"[]", b'"pets"', b"{'model': 'pets'}", b"\0" * 100, b"model=pets"])),
        "media type": lambda: sized("{}", kind="Content-Type: " + rng.choice(["text/plain", "application/x-pickle", "application/octet-stream", "text/json", "x"])),
        "token": lambda: post(f"Authorization: {rng.choice(['Bearer', 'Basic', 'Digest', ''])} {rng.choice([TOKEN[:-1], TOKEN + 'x', '', 'Og==', 'null', '%' * 50])}", JSON, "Connection: close", "Content-Length: 17", body=b'{"model": "pets"}'),
        "no token": lambda: b"GET " + rng.choice([b"/metrics", b"/v1/models", b"/docs", b"/"]) + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "host": lambda: post(f"Host: {rng.choice(['evil.example', 'localhost.evil.example', '169.254.169.254', ''])}", AUTHORIZED, JSON, "Connection: close", "Content-Length: 17", body=b'{"model": "pets"}'),
        "method": lambda: f"{rng.choice(['DELETE', 'PUT', 'PATCH', 'TRACE', 'PROPFIND', 'A' * 50])} /v1/samples HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}\r\nConnection: close\r\n\r\n".encode(),
        "giant": lambda: post(AUTHORIZED, JSON, "Transfer-Encoding: chunked", "Connection: close", body=(b"20000\r\n" + b" " * 0x20000 + b"\r\n") * 9 + b"0\r\n\r\n"),
        "giant length": lambda: post(AUTHORIZED, JSON, f"Content-Length: {rng.choice([2**21, 10**12, 10**30])}", "Connection: close", body=b""),
        "form": lambda: form(*rng.choice([
            [], [options], [options, options], [(b'name="images"; filename="a.png"', b"no image")],
            [options, (b'name="images"; filename="../../a.png"', rng.randbytes(50))],
            [options, (b'name="images"; filename="a.png"', png()[: rng.randrange(60)])],
            [options, (b'name="other"; filename="a.png"', png())], [(b'name="images"; filename="a.png"', png()), (b'name="options"', b"[" * 9000)],
            [options, (b'name="images"; filename="a.png"', png()), (b'name="mask"; filename="a.png"', png())],
            [options, (b'name="images"', b"text")], [(b"filename=x", b"")], [(b'name="options"; filename="a.json"', b"{}")],
        ])),
        "boundary": lambda: form(options, boundary=rng.choice(["y", "", "x" * 500, '"'])),
        "bomb": lambda: form(options, (b'name="images"; filename="a.png"', bomb(rng))),
        "smuggling": lambda: post(AUTHORIZED, JSON, *rng.choice([
            ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: xchunked"], ["Content-Length: 5", "Content-Length: 6"],
            ["Transfer-Encoding: chunked", "Transfer-Encoding: cow"], ["Transfer-Encoding:\x0bchunked"], ["Content-Length: +5"], ["Content-Length: 5, 6"],
            ["Transfer-Encoding : chunked"],
        ]), "Connection: close", body=b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "garbage": lambda: rng.randbytes(rng.randrange(1, 500)).replace(b"\n", b" ") + b"\r\n\r\n",
    }  # fmt: skip
    name = rng.choice(list(kinds))
    if rng.random() < 0.25:
        field, value = rng.choice(FIELDS), rng.choice(WRONG)
        if (field, str(value)) not in HARMLESS:
            name, kinds["wrong type"] = "wrong type", lambda: sized(json.dumps({"model": "absent", field: value}))
    return name, kinds[name]()


def bomb(rng):
    """A small PNG that says it is enormous."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = rng.choice([20_000, 100_000, 2**31 - 1])
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    )


def test_a_thousand_hostile_requests_are_refused(engine, monkeypatch, models):
    monkeypatch.setenv("IMPROVED_DIFFUSION_TOKEN", TOKEN)
    rng, started, before = random.Random(0), time.monotonic(), engine.health()
    with running(engine, stop=False, body_seconds=1) as service:
        requests = [hostile(rng) for _ in range(1000)]
        slow = [post(AUTHORIZED, JSON, "Content-Length: 900", body=b"{")] * 10
        with ThreadPoolExecutor(16) as pool:
            late = [pool.submit(service.raw, data, 8) for data in slow]
            replies = list(pool.map(lambda request: service.raw(request[1], 5), requests))
        assert [status(each.result()) for each in late] == [408] * len(slow)
        wrong = [
            (name, data[:300], reply[:300])
            for (name, data), reply in zip(requests, replies)
            if not reply.startswith(b"HTTP/1.1 4")
        ]
        assert wrong == []
        seconds = time.monotonic() - started
        answer = service.client(headers={"Authorization": f"Bearer {TOKEN}"}).post(
            "/v1/samples", json=dict(model="pets", n=2, classes=["cat"], format="npz", **FAST)
        )
    np.testing.assert_array_equal(
        arrays(answer), models["pets"].sample(2, classes=["cat"], progress=False, **FAST).array
    )
    assert engine.health().restarts == before.restarts and engine.health().failed == before.failed
    assert seconds < 60, seconds
    assert threading.active_count() < 100 and pixels
