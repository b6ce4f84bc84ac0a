"""The page as a server sends it, and what it refuses."""

import re

import pytest
from starlette.testclient import TestClient
from web_helpers import in_loop

from improved_diffusion.service.http.security import Access, Guard
from improved_diffusion.web.page import POLICY, PUBLIC, create_app


@pytest.fixture(scope="module")
def client(app_state):
    guarded = Guard(in_loop(lambda: create_app(app_state)), Access(policy=POLICY, public=frozenset(PUBLIC)))
    with TestClient(guarded, base_url="http://localhost") as client:
        yield client


def test_the_page_and_its_theme_name_no_other_host(client):
    page, theme = client.get("/"), client.get("/theme.css")
    assert page.status_code == theme.status_code == 200
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(https?:)?//([^/\"]+)", page.text)
    assert {host for _, host in loaded} <= {"localhost"}
    assert re.findall(r"url\((?!\"data:)", theme.text) == []


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/monitoring", "/gradio_api/mcp/"])
def test_what_the_page_does_not_need_is_not_there(client, path):
    assert client.get(path).status_code in (403, 404)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "RUNS/digits/model000010.pt", "CWD/pyproject.toml"]
)
def test_files_of_the_machine_are_not_served(client, runs, path):
    found = path.replace("RUNS", str(runs))
    assert client.get(f"/gradio_api/file={found}").status_code in (403, 404)


def test_other_sites_and_other_names_are_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code >= 400
    headers = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    assert client.post("/gradio_api/queue/join", json={}, headers=headers).status_code in (403, 421)


def test_a_guarded_page_demands_its_token(app_state):
    guarded = Guard(
        in_loop(lambda: create_app(app_state)),
        Access(token="t" * 20, login=True, policy=POLICY, public=frozenset(PUBLIC)),
    )
    with TestClient(guarded, base_url="http://localhost") as client:
        assert client.get("/config").status_code == 401
        assert client.get("/healthz").status_code in (200, 503)  # 503 while the worker starts
