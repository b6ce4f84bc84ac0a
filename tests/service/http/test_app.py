"""The routes, over an engine that draws at once."""

import asyncio
import base64
import io
import json
import zipfile

import numpy as np
import pytest
from http_helpers import TOKEN, Client, Engine, events, picture, pixels, png

from improved_diffusion.service import errors
from improved_diffusion.service.http.app import PUBLIC
from improved_diffusion.service.http.security import Access


@pytest.fixture
def client():
    return Client()


def test_json_is_the_default(client):
    answer = client.sample(n=2, seed=5)
    images = answer.json()["images"]
    assert answer.status_code == 200 and [row["name"] for row in images] == ["000000.png", "000001.png"]
    for i, row in enumerate(images):
        np.testing.assert_array_equal(pixels(base64.b64decode(row["png"])), picture(5, i))


@pytest.mark.parametrize("how", ["format", "accept"])
def test_every_format(client, how):
    def ask(name, media_type, **body):
        asked = {"format": name} if how == "format" else {}
        return client.sample(headers={"Accept": media_type if how == "accept" else "*/*"}, **asked, **body)

    answer = ask("png", "image/png", n=1)
    np.testing.assert_array_equal(pixels(answer.content), picture(0, 0))
    assert answer.headers["Content-Type"] == "image/png"
    answer = ask("zip", "application/zip", seeds="3,7")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["000003.png", "000007.png"]
        np.testing.assert_array_equal(pixels(archive.read("000007.png")), picture(0, 7))
    answer = ask("npz", "application/x-npz", n=3)
    with np.load(io.BytesIO(answer.content)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][2], picture(0, 2))
    assert "samples_3x8x8x3.npz" in answer.headers["Content-Disposition"]
    assert len(ask("json", "application/json", n=1).json()["images"]) == 1


def test_a_format_must_fit(client):
    assert client.sample(n=2, format="png").status_code == 422
    assert client.sample(headers={"Accept": "text/html"}).status_code == 406
    assert client.sample(headers={"Accept": "text/html, image/*"}).headers["Content-Type"] == "image/png"


@pytest.mark.parametrize(
    ("body", "status", "parameter"),
    [
        ({"model": "absent"}, 404, "model"),
        ({"model": "../../etc/passwd"}, 404, "model"),
        ({"n": 0}, 422, "n"),
        ({"n": 65}, 422, None),
        ({"n": "4"}, 422, "n"),
        ({"n": 10**30}, 422, "n"),
        ({"stepz": 3}, 422, "stepz"),
        ({"model_path": "a.pt"}, 422, "model_path"),
        ({"guide_path": "a.pt"}, 422, "guide_path"),
        ({"steps": 5000}, 422, "steps"),
        ({"sampler": "magic"}, 422, "sampler"),
        ({"sampler": "ddim", "churn": 1.0}, 422, "churn"),
        ({"guidance_scale": -1}, 422, "guidance_scale"),
        ({"classes": ["zebra"]}, 422, None),
        ({"seed": -1}, 422, "seed"),
        ({"seeds": "1-"}, 422, "seeds"),
        ({"format": "exe"}, 422, "format"),
        ({"model": "broken"}, 422, None),
    ],
)
def test_mistakes_name_the_field(client, body, status, parameter):
    answer = client.sample(**body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"type", "message", "parameter"}
    assert parameter is None or error["parameter"] == parameter
    assert "Extra inputs" not in error["message"]  # pydantic's own words
    assert not client.engine.jobs


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.OutOfMemory("no memory"), 507),
        (errors.TimedOut("too slow"), 504),
        (errors.Failed("a worker died"), 500),
        (errors.Cancelled("stopped"), 503),
        (errors.Stopping("stopped"), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_while_drawing(client, error, status, stream):
    client.engine.fail = error
    answer = client.sample(stream=stream)
    if stream:
        kind, data = events(answer.text)[-1]
        assert kind == "failed" and data["error"]["type"]
    else:
        assert answer.status_code == status and answer.json()["error"]["message"]
        assert (status == 503) == ("Retry-After" in answer.headers)


def test_an_unforeseen_error_says_nothing_of_itself(client):
    client.engine.fail = RuntimeError("secret")
    answer = client.sample()
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "internal" and "secret" not in answer.text


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (dict(steps=15), 200),
        (dict(steps=16), 422),
        (dict(), 422),
        (dict(sampler="ddim"), 422),
        (dict(sampler="heun"), 200),
        (dict(timestep_respacing="10"), 200),
        (dict(timestep_respacing="16"), 422),
        (dict(timestep_respacing="a"), 422),
        (dict(timestep_respacing="30"), 422),
    ],
)
def test_steps_are_bounded_however_they_are_given(options, status):
    assert Client(max_steps=15).sample(**options).status_code == status


def test_a_full_queue_is_429():
    client = Client(Engine(max_queue=0))
    answer = client.sample()
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "7"


def test_a_service_that_stops_refuses(client):
    assert client("GET", "/healthz").json() == {"ready": True}
    client.service.stop(3)
    answer = client.sample()
    assert answer.status_code == 503 and "Retry-After" in answer.headers and client.engine.stopped == 3
    assert client("GET", "/healthz").status_code == 503
    assert client("GET", "/healthz/live").status_code == 200


def test_a_stream_tells_progress_and_ends_with_the_result(client):
    answer = client.sample(stream=True, n=2, seed=3)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    found = dict(events(answer.text))
    assert list(found)[-1] == "done" and found["progress"] == {"done": 1, "total": 2, "seconds_left": 1.0}
    assert len(found["preview"]["images"]) == 2
    np.testing.assert_array_equal(pixels(base64.b64decode(found["done"]["images"][1]["png"])), picture(3, 1))
    answer = client("GET", found["done"]["result"].split("?")[0], params={"format": "npz"})
    with np.load(io.BytesIO(answer.content)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][1], picture(3, 1))


def test_a_stream_may_leave_the_result_to_be_fetched(client):
    found = dict(events(client.sample(stream=True, format="png", previews=False).text))
    assert set(found["done"]) == {"result"} and "preview" not in found
    np.testing.assert_array_equal(pixels(client("GET", found["done"]["result"]).content), picture(0, 0))
    assert client("GET", found["done"]["result"].replace("png", "exe")).status_code == 422


def test_results_are_bounded():
    client = Client(result_mb=1)
    client.service.results.most_bytes = 8 * 8 * 3 * 5
    first, second, third = (dict(events(client.sample(stream=True, n=2).text))["done"]["result"] for _ in range(3))
    assert [client("GET", path).status_code for path in (first, second, third)] == [404, 200, 200]


def test_results_expire():
    client = Client(result_minutes=1e-9)
    assert client("GET", dict(events(client.sample(stream=True).text))["done"]["result"]).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(client, stream):
    client.engine.hold.clear()
    body = json.dumps({"model": "tiny", "stream": stream}).encode()

    async def go():
        left, sent = asyncio.Event(), []

        async def receive():
            if not receive.asked:
                receive.asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        receive.asked = False

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"99")]
        scope = dict(
            type="http", method="POST", path="/v1/samples", raw_path=b"/v1/samples", query_string=b"",
            headers=headers, scheme="http", http_version="1.1", root_path="",
        )  # fmt: skip
        task = asyncio.ensure_future(client.app(scope, receive, send))
        while not client.engine.jobs:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(go())
    assert client.engine.jobs[0].state == "cancelled"


def test_models(client):
    answer = client("GET", "/v1/models").json()["models"]
    assert [row["name"] for row in answer] == client.engine.catalogue.names()
    assert "error" in next(row for row in answer if row["name"] == "broken")
    found = client("GET", "/v1/models/sub/run").json()
    assert found["size"] == [8, 8] and found["classes"] == ["cat", "dog"] and "secret" not in str(answer)
    for name in ("absent", "../tiny", "%2e%2e/tiny", "/etc/passwd", "tiny%00"):
        assert client("GET", f"/v1/models/{name}").status_code == 404


def test_edits(client):
    image, mask = ("images", ("a.png", png())), ("mask", ("m.png", png(mode="L")))
    assert client.edit("variations", [image, image], strength=0.5).status_code == 200
    assert client.edit("inpaint", [image, mask], n=3, jump_length=2).status_code == 200
    assert client.edit("interpolate", [image, ("images", ("b.png", png((9, 11))))], frames=4).status_code == 200
    assert client.edit("transform", [image], classes=["dog"], image_classes=["cat"]).status_code == 200
    assert client.edit("upscale", [image], model="large").status_code == 200
    works = [job.request for job in client.engine.jobs]
    assert [work.kind for work in works] == ["variations", "inpaint", "interpolate", "transform", "upscale"]
    assert [work.images.shape for work in works] == [
        (2, 8, 8, 3),
        (1, 8, 8, 3),
        (2, 8, 8, 3),
        (1, 8, 8, 3),
        (1, 4, 4, 3),
    ]
    assert works[1].mask.shape == (1, 8, 8) and works[1].n == 3 and works[2].n == 4
    np.testing.assert_array_equal(works[0].images[0], pixels(png()))


def test_interpolation_between_numbers_needs_no_image(client):
    answer = client(
        "POST", "/v1/edits/interpolate", files={"options": (None, json.dumps({"model": "tiny", "seeds": [3, 7]}))}
    )
    assert answer.status_code == 200 and client.engine.jobs[0].request.images is None


def test_images_are_bounded_in_pixels():
    client = Client(max_pixels=150)
    assert client.edit("variations", [("images", ("a.png", png()))] * 2).status_code == 200
    assert client.edit("variations", [("images", ("a.png", png()))] * 3).status_code == 422
    assert client.edit("variations", [("images", ("a.png", png((13, 12))))]).status_code == 422


@pytest.mark.parametrize(
    ("files", "options", "status"),
    [
        ([("images", ("a.png", b"no image"))], {}, 422),
        ([("images", ("a.png", png()[:40]))], {}, 422),
        ([("images", ("a.png", b""))], {}, 422),
        ([("images", ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"))], {}, 422),
        ([("mask", ("a.png", png()))], {}, 422),
        ([("other", ("a.png", png()))], {}, 422),
        ([("images", ("a.png", png()))], {"strength": 2}, 422),
        ([("images", ("a.png", png()))], {"n": 1000}, 422),
        ([("images", ("a.png", png()))], {"images": "/etc/passwd"}, 422),
        ([("images", ("a.png", png()))], {"model": "absent"}, 404),
        ([("images", ("a.png", png()))], {"model": "large"}, 422),
        ([("images", ("a.png", png()))] * 300, {}, 400),
    ],
)
def test_wrong_forms(client, files, options, status):
    answer = client.edit("variations", files, **options)
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert "/secret" not in answer.text and not client.engine.jobs


@pytest.mark.parametrize("options", ["", "{", "[]", "[" * 50_000, '{"model": "tiny", "n": NaN}', "null"])
def test_options_are_a_json_object(client, options):
    answer = client("POST", "/v1/edits/variations", files=[("images", ("a.png", png()))], data={"options": options})
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


def test_other_media_types(client):
    assert client("POST", "/v1/samples", content=b'{"model":"tiny"}').status_code == 415
    assert client("POST", "/v1/samples", data={"model": "tiny"}).status_code == 415
    assert client("POST", "/v1/edits/inpaint", json={"model": "tiny"}).status_code == 415
    assert client("GET", "/v1/samples").status_code == 405
    assert client("GET", "/v2").json()["error"]["type"] == "not_found"


def test_the_token_guards_everything_but_health():
    client = Client(access=Access(token=TOKEN, public=frozenset(PUBLIC)))
    for method, path in (
        ("POST", "/v1/samples"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/absent"),
    ):
        assert client(method, path).status_code == 401
    assert client("GET", "/healthz").status_code == 200
    assert client.sample(headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_metrics(client):
    client.sample()
    client.sample(n=0)
    client("GET", "/v1/models/absent")
    client("GET", "/no/such/place")
    client("BREW", "/v1/samples")
    text = client("GET", "/metrics").text
    assert 'improved_diffusion_requests_total{method="POST",route="/v1/samples",status="200"} 1.0' in text
    assert 'improved_diffusion_requests_total{method="POST",route="/v1/samples",status="422"} 1.0' in text
    assert 'route="/v1/models/{name:path}",status="404"' in text
    assert "no/such" not in text and "absent" not in text and "BREW" not in text
    assert 'batch_images_bucket{le="1"} 1.0' in text and 'batch_images_bucket{le="2"} 2.0' in text
    assert 'batch_images_bucket{le="+Inf"} 2.0' in text and "batch_images_sum 3.0" in text
    assert 'gpu_used_bytes{worker="1"} 60.0' in text and 'gpu_total_bytes{worker="1"} 100.0' in text
    assert "improved_diffusion_images_total 3.0" in text and "improved_diffusion_request_seconds_bucket" in text


def test_the_log_has_no_secret(capsys):
    client = Client(access=Access(token=TOKEN))
    client("GET", "/v1/models/private-name?token=hidden", headers={"Authorization": f"Bearer {TOKEN}"})
    client("GET", "/hidden-page", headers={"Authorization": "Bearer hidden-guess"})
    out = capsys.readouterr().out
    assert "/v1/models/{name:path} 404" in out and " 401 " in out
    assert not any(word in out for word in ("hidden", "private", TOKEN))


def test_the_description_loads_nothing_from_elsewhere(client):
    page = client("GET", "/docs")
    assert "src=" not in page.text and "http://" not in page.text and "https://" not in page.text
    assert "/v1/edits/inpaint" in page.text and "guidance_scale" in page.text and "jump_length" in page.text
    schema = client("GET", "/openapi.json").json()
    assert {"/v1/samples", "/v1/upscale", "/v1/models", "/healthz", "/metrics"} <= schema["paths"].keys()
