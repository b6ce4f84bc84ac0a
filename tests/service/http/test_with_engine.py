"""The service with the real engine: images are those of the Python API, whatever else is asked for meanwhile."""

import asyncio
import io
import json
import socket

import httpx
import numpy as np
import pytest
from http_helpers import Client, arrays, events, pixels, png, post, running, wait_until
from PIL import Image

FAST = dict(sampler="dpmpp_2m", steps=3)
FILES = [("images", ("a.png", png((20, 30), seed=1))), ("images", ("b.png", png((8, 8), "L", seed=2)))]


@pytest.fixture(scope="module")
def client(engine):
    return Client(engine)


def given():
    """The images of FILES."""
    return [Image.open(io.BytesIO(data)) for _, (_, data) in FILES]


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


def test_variations_are_those_of_python(client, models):
    options = dict(n=3, strength=0.5, seed=2, classes=["cat"], **FAST)
    expected = models["pets"].variations(given(), progress=False, **options)
    answer = client.edit("variations", FILES, model="pets", format="npz", **options)
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_inpainting_is_that_of_python(client, models):
    mask = png((16, 16), "L", seed=3)
    options = dict(n=2, seed=2, classes=["cat"], sampler="ancestral", steps=4, jump_length=2, resamplings=2)
    expected = models["pets"].inpaint(given(), pixels(mask), progress=False, **options)
    answer = client.edit("inpaint", [*FILES, ("mask", ("m.png", mask))], model="pets", format="npz", **options)
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_interpolation_is_that_of_python(client, models):
    options = dict(classes=["cat"], steps=3)
    asked = dict(model="pets", frames=4, format="npz", **options)
    expected = models["pets"].interpolate(*given(), 4, progress=False, **options)
    np.testing.assert_array_equal(arrays(client.edit("interpolate", FILES, **asked)), expected.array)
    expected = models["pets"].interpolate(3, 7, 4, progress=False, **options)
    parts = {"options": (None, json.dumps({**asked, "seeds": [3, 7]}))}
    np.testing.assert_array_equal(arrays(client("POST", "/v1/edits/interpolate", files=parts)), expected.array)


def test_a_transformation_encodes_and_decodes(client, models):
    latents = models["pets"].encode(given(), classes=["cat"], steps=3)
    expected = models["pets"].decode(latents, classes=["dog"], progress=False)
    options = dict(image_classes=["cat"], classes=["dog"], steps=3)
    answer = client.edit("transform", FILES, model="pets", format="npz", **options)
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_upscaling_is_that_of_python(client, models):
    expected = models["large"].upscale(given(), seed=4, progress=False, **FAST)
    answer = client.edit("upscale", FILES, model="large", seed=4, format="npz", **FAST)
    np.testing.assert_array_equal(arrays(answer), expected.array)


def test_many_clients_get_their_own_images(engine, models):
    """64 clients ask for 4 images each, at once."""
    client, before = Client(engine), engine.health()
    options = dict(sampler="ddim", steps=10)
    body = dict(model="pets", n=4, classes=["cat", "dog"], format="npz", **options)

    async def go():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=200) as http:
            asked = (http.post("/v1/samples", json={**body, "seed": seed}) for seed in range(64))
            return await asyncio.gather(*asked)

    answers = asyncio.run(go())
    assert engine.health().batches - before.batches < 64 / 4
    requests = [dict(n=4, classes=["cat", "dog"], seed=seed) for seed in range(64)]
    for seed, expected in enumerate(models["pets"].sample_together(requests, **options)):
        if seed % 16 == 0:
            alone = models["pets"].sample(4, classes=["cat", "dog"], seed=seed, progress=False, **options)
            np.testing.assert_array_equal(expected.array, alone.array)
        np.testing.assert_array_equal(arrays(answers[seed]), expected.array)


def test_leaving_frees_the_engine(engine):
    body = json.dumps({"model": "pets", "n": 64, "sampler": "ancestral", "steps": 20}).encode()
    with running(engine, stop=False) as service:
        connections = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(8)]
        for connection in connections:
            connection.sendall(post("Content-Type: application/json", f"Content-Length: {len(body)}", body=body))
        wait_until(lambda: engine.health().waiting + engine.health().running == 8)
        for connection in connections:
            connection.close()
        wait_until(lambda: engine.health().waiting + engine.health().running == 0)
