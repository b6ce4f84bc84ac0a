"""The guard of the web page and the service, around an application that answers every request."""

import asyncio
import base64
from unittest import mock

import httpx
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.config.service import DoorConfig
from improved_diffusion.service.http import security
from improved_diffusion.service.http.security import Access, Guard, access_for

TOKEN = "a-token-of-these-tests-0123456789"


async def echo(scope, receive, send):
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(access, method="GET", path="/", app=echo, base="http://localhost:8000", **kwargs):
    async def go():
        transport = httpx.ASGITransport(Guard(app, access), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_loopback_answers_to_its_own_names(host):
    assert ask(Access(), headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "[", "0"]
)
def test_loopback_refuses_other_names(host):
    answer = ask(Access(), headers={"Host": host})
    assert answer.status_code == 421 and answer.json()["error"]["parameter"] == "Host"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": TOKEN},
        {"Authorization": "Basic %%%"},
        {"Authorization": "Bearer \xe9".encode("latin-1")},
        basic(""),
        basic("wrong"),
        {"Cookie": f"{security.COOKIE}=99999999999.00"},
    ],
)
@pytest.mark.parametrize("login", [False, True])
def test_a_wrong_token_is_refused(headers, login):
    answer = ask(Access(token=TOKEN, login=login), headers=headers)
    assert answer.status_code == 401 and "WWW-Authenticate" in answer.headers
    assert answer.json()["error"]["type"] == "unauthorized" and TOKEN not in answer.text


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer  {TOKEN}"}, basic(TOKEN)]
)
def test_the_token_opens(headers):
    assert ask(Access(token=TOKEN), headers=headers).status_code == 200


def test_public_paths_need_no_token():
    access = Access(token=TOKEN, public=frozenset({"/healthz"}))
    assert ask(access, path="/healthz").status_code == 200
    assert [ask(access, path=path).status_code for path in ("/healthz/", "//healthz", "/")] == [401] * 3


OTHER_SITES = [
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "null"},
    {"Origin": "http://[bad"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", OTHER_SITES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_other_sites_change_nothing(headers, method):
    assert ask(Access(), method, headers=headers).status_code == 403
    assert ask(Access(token=TOKEN), method, headers={**headers, **basic(TOKEN)}).status_code == 403
    assert ask(Access(), "GET", headers=headers).status_code == 200
    with_bearer = {**headers, "Authorization": f"Bearer {TOKEN}"}
    assert ask(Access(token=TOKEN), method, headers=with_bearer).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "http://localhost:8000"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
)
def test_own_pages_and_programs_may_post(headers):
    assert ask(Access(), "POST", headers=headers).status_code == 200


def test_pages_of_a_named_proxy_are_own():
    access = access_for(DoorConfig(allowed_hosts="pictures.example, other.example"))
    headers = {"Host": "localhost:8000", "Origin": "https://pictures.example"}
    assert ask(access, "POST", headers=headers).status_code == 200
    assert ask(access, headers={"Host": "pictures.example"}).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(0, 200), (100, 200), (101, 413), (5000, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_bounded_as_it_streams(size, status, chunked):
    async def parts():
        for start in range(0, size, 64):
            yield b"x" * min(64, size - start)

    answer = ask(Access(max_body=100), "POST", content=parts() if chunked else b"x" * size)
    assert answer.status_code == status
    assert answer.text == str(size) if status == 200 else answer.json()["error"]["type"] == "too_large"


def test_forms_with_files_have_their_own_bound():
    access = Access(max_body=10, max_upload=1000)
    assert ask(access, "POST", files={"images": b"x" * 100}).status_code == 200
    assert ask(access, "POST", files={"images": b"x" * 1000}).status_code == 413


def test_the_bodies_of_all_requests_are_bounded_together(monkeypatch):
    monkeypatch.setattr(security, "LINGER_SECONDS", 0.01)

    async def go():
        statuses, hold = [], asyncio.Event()

        async def keep(scope, receive, send):
            if (await receive())["body"] == b"x" * 900:
                await hold.wait()
            await echo(scope, mock.AsyncMock(return_value={"body": b""}), send)

        guard = Guard(keep, Access(max_upload=1000))
        transport = httpx.ASGITransport(guard)

        async def post(size):
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                statuses.append((await client.post("/", content=b"x" * size)).status_code)

        waiting = [asyncio.create_task(post(900)) for _ in range(security.UPLOADS_AT_ONCE)]
        await asyncio.sleep(0.1)
        await post(500)
        await post(801)
        hold.set()
        await asyncio.gather(*waiting)
        await post(1000)
        return statuses, guard._held

    assert asyncio.run(go()) == ([200, 503, *[200] * security.UPLOADS_AT_ONCE, 200], 0)


def test_a_slow_body_times_out(monkeypatch):
    monkeypatch.setattr(security, "LINGER_SECONDS", 0.01)
    sent = []

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(Guard(echo, Access(body_seconds=0.1))(scope, receive, send))
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Length", "3"), ("Transfer-Encoding", "chunked")],
        [("Content-Length", "+3")],
        [("Content-Length", "٣".encode())],
        [("Host", "localhost"), ("Host", "localhost")],
        [("Host", "localhost"), ("Authorization", "Bearer a"), ("Authorization", "Bearer b")],
        [("Content-Length", "3"), ("Content-Length", "4")],
    ],
)
def test_ambiguous_headers_are_refused(headers):
    raw = [(name.lower().encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    if not any(name == b"host" for name, _ in raw):
        raw.append((b"host", b"localhost"))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    asyncio.run(Guard(echo, Access())(scope, receive, send))
    assert sent[0]["status"] == 400


def test_replies_have_security_headers_and_keep_their_own():
    async def own(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"max-age=5")]})
        await send({"type": "http.response.body", "body": b""})

    for answer in (ask(Access()), ask(Access(), headers={"Host": "evil.example"})):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
    assert ask(Access(), app=own).headers["Cache-Control"] == "max-age=5"


def test_browsers_log_in_by_a_form():
    access = Access(token=TOKEN, login=True)
    browser = {"Accept": "text/html,*/*"}
    answer = ask(access, headers=browser)
    assert answer.status_code == 303 and answer.headers["Location"] == "/login"
    assert "<form" in ask(access, path="/login", headers=browser).text
    assert ask(access, "POST", "/login", data={"token": "wrong"}).status_code == 401
    for headers in OTHER_SITES:
        assert ask(access, "POST", "/login", data={"token": TOKEN}, headers=headers).status_code == 403
    assert ask(access, "POST", "/login", data={"token": "x" * 5000}).status_code == 413
    answer = ask(access, "POST", "/login", data={"token": TOKEN})
    cookie = answer.headers["Set-Cookie"]
    assert answer.status_code == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    value = cookie.split(";")[0]
    assert ask(access, headers={"Cookie": f"a=b; {value}"}).status_code == 200
    assert ask(access, headers={"Cookie": value[:-1] + ("0" if value[-1] != "0" else "1")}).status_code == 401
    assert ask(access, "POST", headers={"Cookie": value, "Origin": "http://evil.example"}).status_code == 403
    assert ask(Access(token=TOKEN + "x", login=True), headers={"Cookie": value}).status_code == 401


def test_a_login_expires(monkeypatch):
    access = Access(token=TOKEN, login=True)
    value = ask(access, "POST", "/login", data={"token": TOKEN}).headers["Set-Cookie"].split(";")[0]
    now = security.time.time()
    monkeypatch.setattr(security.time, "time", lambda: now + security.LOGIN_SECONDS + 5)
    assert ask(access, headers={"Cookie": value}).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.com"])
def test_other_addresses_need_a_token(host, monkeypatch):
    monkeypatch.delenv(security.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="token"):
        access_for(DoorConfig(host=host))
    monkeypatch.setenv(security.TOKEN_VARIABLE, TOKEN)
    access = access_for(DoorConfig(host=host))
    assert access.token == TOKEN and access.hosts is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_loopback_needs_none(host, monkeypatch):
    monkeypatch.delenv(security.TOKEN_VARIABLE, raising=False)
    access = access_for(DoorConfig(host=host), login=True)
    assert access.token == "" and not access.login and host in access.hosts


@pytest.mark.parametrize("content", [b"short", b"two words of a long token", b"\xff" * 20, b"", "é".encode() * 20])
def test_a_token_file_holds_one_long_line(content, tmp_path, monkeypatch):
    monkeypatch.delenv(security.TOKEN_VARIABLE, raising=False)
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(UserError, match="token_file"):
        access_for(DoorConfig(token_file=str(path)))
    path.write_text(TOKEN + "\n")
    assert access_for(DoorConfig(token_file=str(path))).token == TOKEN
    monkeypatch.setenv(security.TOKEN_VARIABLE, TOKEN)
    with pytest.raises(UserError, match="one of them"):
        access_for(DoorConfig(token_file=str(path)))


def test_websockets_are_refused():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(echo, Access())({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
