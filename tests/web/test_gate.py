"""What reaches Gradio, from somebody who sends other requests than the page does."""

import asyncio
import io
import json
import os

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.testclient import TestClient
from web_helpers import in_loop

from improved_diffusion.service.http.security import Access, Guard
from improved_diffusion.web.gate import MOST_FILES, MOST_PIXELS, Gate
from improved_diffusion.web.page import POLICY, create_app


@pytest.fixture(scope="module")
def gate(app_state):
    return in_loop(lambda: create_app(app_state))


@pytest.fixture(scope="module")
def client(gate):
    with TestClient(Guard(gate, Access(policy=POLICY)), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def call(gate, client):
    """Calls a function of the page, by its name; the values that are not given are those of its controls."""

    def call(name, values=(), **changed):
        number, function = next((i, fn) for i, fn in gate.page.fns.items() if fn.name == name)
        data = [getattr(control, "value", None) for control in function.inputs]
        for place, value in dict(values).items():
            data[place] = value
        body = {"fn_index": number, "data": data, "session_hash": "abc", **changed}
        headers = {"content-type": "application/json"}
        return client.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers)

    return call


def png(width=8, height=8):
    found = io.BytesIO()
    Image.new("L", (width, height)).save(found, "PNG")
    return found.getvalue()


def upload(client, content, name="a.png"):
    return client.post("/gradio_api/upload", files={"files": (name, content)}).json()[0]


def file(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def refused(reply):
    found = reply.json()
    return reply.status_code == 400 and found["detail"] == found["error"]["message"]


def test_gradio_takes_only_files_that_were_uploaded(gate):
    assert gate.page.has_launched  # what its own check depends on


@pytest.mark.parametrize("name, place", [("take_upload", 0), ("vary", 2), ("show_in_editor", 2)])
def test_a_file_of_the_machine_is_no_upload(call, runs, tmp_path, name, place):
    (tmp_path / "linked").symlink_to("/etc/passwd")
    ours = runs / "digits" / "model000010.pt"
    inside = os.path.join(get_upload_folder(), "..", "x")
    for path in ("/etc/passwd", str(ours), str(tmp_path / "linked"), "etc/passwd", inside, "", "/", 5, "\0", ["/etc"]):
        assert refused(call(name, {place: file(path)})), path
    assert ours.exists()


def test_gradio_fetches_nothing_from_the_network(call, client):
    for address in ("http://example.com/a.png", "https://example.com/a.png", "file:///etc/passwd"):
        assert refused(call("vary", {2: file(address)}))
        assert client.get(f"/gradio_api/file={address}").status_code == 404


def test_files_of_an_editor_are_uploads_too(call, client):
    good = file(upload(client, png()))
    for editor in ({"background": file("/etc/passwd"), "layers": []}, {"layers": [file("/etc/passwd")]}):
        assert refused(call("inpaint", {5: editor}))
    assert refused(call("inpaint", {5: {"layers": [good] * (MOST_FILES + 1)}}))
    assert refused(call("vary", {2: good}, event_data={"value": {"image": file("/etc/passwd")}}))


@pytest.mark.parametrize("content", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\3\4"])
def test_what_is_no_image_is_refused_before_gradio_reads_it(call, client, content):
    assert refused(call("vary", {2: file(upload(client, content, "a.svg"))}))


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(call, client):
    assert refused(call("vary", {2: file(upload(client, png(MOST_PIXELS // 1000 + 1, 1000)))}))


@pytest.mark.parametrize(
    "values",
    [
        {0: ["digits"]}, {0: 5}, {0: "a\nb"}, {0: "\x1b[2J"}, {0: "x" * 10_000}, {2: [["3"]]}, {2: [{}]}, {3: "4"},
        {3: [4]}, {3: {}}, {3: True}, {3: float("nan")}, {3: float("inf")}, {11: "yes"}, {11: 1}, {14: ["0,1"]},
    ],
)  # fmt: skip
def test_values_that_no_control_has_are_refused(call, values):
    assert refused(call("draw", values))


@pytest.mark.parametrize(
    "changed",
    [
        {"fn_index": -1}, {"fn_index": 10**30}, {"fn_index": "9"}, {"fn_index": True}, {"fn_index": None},
        {"data": []}, {"data": None}, {"data": {}}, {"data": [[[[[]]]]]}, {"session_hash": None},
        {"session_hash": "x" * 65}, {"session_hash": "../x"}, {"event_data": {"index": 1e999}},
    ],
)  # fmt: skip
def test_calls_that_the_page_does_not_make_are_refused(call, changed):
    assert refused(call("draw", **changed))


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"fn_index":' + b"9" * 9999])
def test_bodies_that_are_no_call_are_refused(client, body):
    assert refused(client.post("/gradio_api/queue/join", content=body))


@pytest.mark.parametrize(
    "path",
    [
        "run/draw", "call/draw", "call/v2/draw", "vibe-edit", "vibe-code", "component_server", "process_recording",
        "stream/x", "queue/join/",
    ],
)  # fmt: skip
def test_other_functions_of_gradio_are_not_there(client, path):
    assert client.post(f"/gradio_api/{path}", json={}).status_code == 404


@pytest.mark.parametrize(
    "path", ["dev/reload", "proxy=http://localhost/", "info", "openapi.json", "vibe-code", "token"]
)
def test_other_pages_of_gradio_are_not_there(client, path):
    assert client.get(f"/gradio_api/{path}").status_code == 404


def test_uploads_are_served_to_nobody_as_pages(client):
    path = upload(client, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "a.svg")
    reply = client.get(f"/gradio_api/file={path}")
    assert reply.status_code == 200 and reply.headers["content-disposition"].startswith("attachment")


def test_what_the_page_sends_passes_as_it_is(gate, client):
    passed = []

    async def inner(scope, receive, send):
        passed.append((await receive())["body"])

    number = next(i for i, fn in gate.page.fns.items() if fn.name == "_select")
    shown = {"image": {**file(upload(client, png())), "url": "http://localhost/x"}, "caption": "4 \N{MIDDLE DOT} 0"}
    event = {"index": 0, "value": shown}
    body = {"fn_index": number, "data": [None], "session_hash": "abc", "event_data": event, "trigger_id": 1}
    content = json.dumps(body).encode()
    parts = [{"body": content[50:]}, {"body": content[:50], "more_body": True}]

    async def receive():
        return {"type": "http.request", **parts.pop()}

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join"}
    asyncio.get_event_loop().run_until_complete(Gate(inner, gate.page, gate.folder)(scope, receive, None))
    assert passed == [content]


def test_a_gate_has_no_other_folder(tmp_path):
    gate = Gate(None, in_loop(gr.Blocks), str(tmp_path / "a"))
    (tmp_path / "ab").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to("/etc/passwd")
    (tmp_path / "a" / "c").write_text("")
    assert not any(gate._holds(str(tmp_path / path)) for path in ("ab", "a", "a/b", "a/../ab", "a/d"))
    assert gate._holds(str(tmp_path / "a" / "c"))
