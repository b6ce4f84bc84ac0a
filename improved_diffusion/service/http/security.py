"""Who may use a door (the web page, the HTTP service), and how much a request may be: one ASGI middleware for both.

    app = Guard(app, access_for(options))                          # the service: a bearer token, or HTTP Basic
    app = Guard(app, access_for(options, login=True, policy=P))    # the web page: a login form and a cookie as well

Options are a `DoorConfig`. Whatever the application does, the guard
- refuses Host names that are not this machine's, on loopback addresses: DNS rebinding,
- demands the token, where there is one, everywhere but on the `public` paths,
- refuses what browsers send from other sites, unless it bears the token in its Authorization header: CSRF,
- bounds the body in bytes as it streams and in seconds, the bytes of all bodies at a time, and the seconds that a
  client may take to read,
- adds the headers that browsers should have.
Websockets are refused. Only the standard library and anyio are used.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import string
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio

from ...config import UserError
from ...config.service import DoorConfig
from ...utils import files
from .replies import Refused, busy

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_VARIABLE = "IMPROVED_DIFFUSION_TOKEN"
SHORTEST_TOKEN = 16  # characters: nobody guesses that many
LARGEST_TOKEN_FILE = 4096
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
API_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
MAX_BODY = 2**20  # bytes of a request that is no form with files
UPLOADS_AT_ONCE = 8  # of the largest size: so many bytes may the requests have that are being answered
LONGEST_HEAD = 32_768  # bytes
LOGIN_BODY = 4096
LOGIN_SECONDS = 12 * 3600
READ_SECONDS = 60.0  # that a client may take to read a part of the reply
LINGER_SECONDS = 2.0  # for what a refused client still sends, so that it reads the reply
COOKIE = "improved_diffusion_login"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ONCE = ("host", "authorization", "content-length", "transfer-encoding", "origin", "content-type")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use a door, and how much a request may be.

    :param token: that clients must send; "" for none.
    :param hosts: names that the Host header may have; None: any.
    :param own_names: further names of this service, whose pages are not another site's.
    :param login: offer browsers a form at /login, and a cookie.
    :param public: paths that need no token.
    :param policy: the Content-Security-Policy of replies that have none.
    :param max_upload: bytes of a form with files; max_body: of any other request.
    """

    token: str = ""
    hosts: frozenset[str] | None = LOOPBACK_NAMES
    own_names: frozenset[str] = frozenset()
    login: bool = False
    public: frozenset[str] = frozenset()
    policy: str = API_POLICY
    max_upload: int = 64 * 10**6
    max_body: int = MAX_BODY
    body_seconds: float = 60.0


def access_for(
    options: DoorConfig, *, login: bool = False, public: Collection[str] = (), policy: str = API_POLICY
) -> Access:
    """What the options allow. Raises UserError where other machines could use the door without a token."""
    token = read_token(options)
    if not options.is_loopback and not token:
        raise UserError(
            f"--host {options.host} can be reached from other machines: give a token that clients must send, in "
            f"--token_file or the variable {TOKEN_VARIABLE}, such as the output of "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    named = frozenset(name.strip().lower() for name in options.allowed_hosts.split(",") if name.strip())
    return Access(
        token=token,
        hosts=LOOPBACK_NAMES | {options.host.lower()} | named if options.is_loopback else named or None,
        own_names=named,
        login=login and bool(token),
        public=frozenset(public),
        policy=policy,
        max_upload=options.max_upload_mb * 10**6,
        body_seconds=options.body_seconds,
    )


def read_token(options: DoorConfig) -> str:
    """The token of --token_file or of the environment; "" where there is none. It is never a flag's value: other users
    of the machine can list those."""
    variable = os.environ.get(TOKEN_VARIABLE, "")
    if options.token_file and variable:
        raise UserError(f"--token_file {options.token_file} and the variable {TOKEN_VARIABLE}: give one of them")
    if not options.token_file and not variable:
        return ""
    where, token = f"the variable {TOKEN_VARIABLE}", variable
    if options.token_file:
        where = f"--token_file {options.token_file}"
        try:
            token = files.read_bytes(options.token_file, LARGEST_TOKEN_FILE).decode()
        except UnicodeDecodeError:
            raise UserError(f"{where} must hold one line of letters, digits and signs") from None
    token = token.strip()
    if not set(token) <= set(string.ascii_letters + string.digits + string.punctuation):
        raise UserError(f"{where} must hold one line of letters, digits and signs, without blanks")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(f"{where} has a token of {len(token)} characters: it needs {SHORTEST_TOKEN} or more")
    return token


class Guard:
    """The middleware: outside of everything else of an application."""

    def __init__(self, app: App, access: Access):
        self.app = app
        self.access = access
        self._held = 0  # bytes of the bodies of the requests that are being answered

    def hold(self, size: int) -> None:
        """Count bytes of a body. Refuses what is too much together with what other requests have."""
        self._held += size
        if self._held > UPLOADS_AT_ONCE * self.access.max_upload:
            raise busy("other uploads fill the memory of the service: try again later", 10, status=503)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            exchange = _Exchange(self.access, scope, receive, send, self.hold)
            try:
                await self._answer(scope, exchange)
            except Refused as refused:
                await exchange.refuse(refused)
            finally:
                self._held -= exchange.size

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = _headers(scope)
        exchange.expect_body(headers)
        self._check_host(headers)
        if self.access.login and scope["path"] == "/login":
            self._check_site(scope["method"], headers, bearer=False)
            await self._login(scope, exchange)
            return
        how = self._identify(headers)
        if not how and scope["path"] not in self.access.public:
            if self.access.login and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                await exchange.reply(303, "", location="/login")
                return
            raise Refused(
                401,
                "this needs the token: send the header 'Authorization: Bearer TOKEN'",
                "Authorization",
                {"WWW-Authenticate": 'Bearer, Basic realm="improved-diffusion"'},
            )
        self._check_site(scope["method"], headers, bearer=how == "bearer")
        await self.app(scope, exchange.receive, exchange.send)

    # Who asks

    def _check_host(self, headers: Mapping[str, str]) -> None:
        name = _host_name(headers.get("host", ""))
        if self.access.hosts is not None and name not in self.access.hosts:
            raise Refused(421, "this service has another name: the Host header is not one of its own", "Host")

    def _identify(self, headers: Mapping[str, str]) -> str:
        """How a client has shown that it may ask: "open" where there is no token, "bearer", "basic", "cookie"; "" where
        it has not."""
        if not self.access.token:
            return "open"
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(value.strip()):
            return "bearer"
        if scheme.lower() == "basic" and self._is_token(_password(value)):
            return "basic"
        return "cookie" if self.access.login and self._is_login(_cookie(headers)) else ""

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), _digest(self.access.token))

    def _check_site(self, method: str, headers: Mapping[str, str], bearer: bool) -> None:
        """Refuse what a page of another site makes a browser send, with the cookie or from this machine."""
        if method in _SAFE_METHODS or bearer:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        same = origin is None or _netloc(origin) == headers.get("host", "").lower()
        if not same and origin is not None:
            same = _host_name(_netloc(origin)) in self.access.own_names
        if not same or site not in ("same-origin", "none"):
            raise Refused(403, "this request comes from a page of another site", "Origin")

    # The login form

    async def _login(self, scope: Scope, exchange: _Exchange) -> None:
        if scope["method"] in ("GET", "HEAD"):
            await exchange.reply(200, _FORM.replace("MESSAGE", ""))
            return
        if scope["method"] != "POST":
            raise Refused(405, "the login form is for GET and POST", headers={"Allow": "GET, POST"})
        body = b""
        while not exchange.complete:
            message = await exchange.receive()
            body += message.get("body", b"")
            if len(body) > LOGIN_BODY:
                raise Refused(413, f"a login has at most {LOGIN_BODY} bytes")
        given = parse_qs(body.decode("latin-1"), max_num_fields=4).get("token", [""])[0]
        if not self._is_token(given.strip()):
            await exchange.reply(401, _FORM.replace("MESSAGE", "This is not the token."))
            return
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self._login_value(int(time.time()) + LOGIN_SECONDS)}; HttpOnly; SameSite=Strict; Path=/"
        await exchange.reply(303, "", location="/", set_cookie=f"{cookie}; Max-Age={LOGIN_SECONDS}{secure}")

    def _login_value(self, expires: int) -> str:
        """What the cookie holds: until when, signed by the token."""
        signature = hmac.new(self.access.token.encode(), f"login until {expires}".encode(), hashlib.sha256)
        return f"{expires}.{signature.hexdigest()}"

    def _is_login(self, value: str) -> bool:
        expires = value.partition(".")[0]
        if not (expires.isascii() and expires.isdigit() and len(expires) < 16) or int(expires) < time.time():
            return False
        return hmac.compare_digest(_digest(value), _digest(self._login_value(int(expires))))


class _Exchange:
    """A request and its reply: the body within bounds, the reply with the headers that browsers should have."""

    def __init__(self, access: Access, scope: Scope, receive: Receive, send: Send, hold: Callable[[int], None]):
        """:param hold: is told of each part of the body, and raises Refused where all bodies are too much."""
        self.access = access
        self.scope = scope
        self.hold = hold
        self.size = 0  # of the body, so far
        self.complete = False  # the whole body has come
        self._receive = receive
        self._send = send
        self._limit = access.max_body
        self._deadline: float | None = None
        self._refusal: Refused | None = None
        self._answered: Refused | None = None
        self._started = False
        self._cut = False  # the reply comes before the body's end: nothing more is read from this connection

    def expect_body(self, headers: Mapping[str, str]) -> None:
        """Take the body's bounds from the headers. Refuses lengths that are too much, or that nobody can tell."""
        length, encoding = headers.get("content-length"), headers.get("transfer-encoding")
        if length is not None and encoding is not None:
            raise Refused(400, "Content-Length and Transfer-Encoding contradict each other", "Content-Length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length is not a number", "Content-Length")
        self.complete = encoding is None and not (length or "").strip("0")
        if headers.get("content-type", "").lower().startswith("multipart/form-data"):
            self._limit = self.access.max_upload
        if length is not None and (len(length) > 15 or int(length) > self._limit):
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the request is longer than {self._limit:,} bytes")

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part of the body; raises Refused where it is too long or comes too slowly."""
        if self._refusal is not None:
            raise self._refusal
        if self.complete:
            return await self._receive()
        if self._deadline is None:
            self._deadline = anyio.current_time() + self.access.body_seconds
        try:
            with anyio.fail_after(max(0.0, self._deadline - anyio.current_time())):
                message = await self._receive()
        except TimeoutError:
            self._refusal = Refused(408, f"the request did not come within {self.access.body_seconds:g} seconds")
            raise self._refusal from None
        size = len(message.get("body", b""))
        self.size += size
        self.complete = not message.get("more_body", False)
        try:
            self.hold(size)
            if self.size > self._limit:
                raise self._too_large()
        except Refused as refused:
            self._refusal = refused
            raise
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a part of the application's reply on; in place of its reply to a refused body, ours."""
        if self._refusal is not None and not self._started:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self.refuse(self._refusal)
            return
        if message["type"] == "http.response.start":
            self._started, self._cut = True, not self.complete
            message = {**message, "headers": self._with_ours(message.get("headers", ()))}
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and self._cut:
            await self._pass({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._pass(message)

    async def _pass(self, message: MutableMapping[str, Any]) -> None:
        """Send; a client that does not read is cut off: TimeoutError."""
        with anyio.fail_after(READ_SECONDS):
            await self._send(message)

    async def _linger(self) -> None:
        """Read on for a moment: a connection closed on data that nobody read loses the reply with it."""
        with anyio.move_on_after(LINGER_SECONDS):
            while not self.complete:
                message = await self._receive()
                self.complete = not message.get("more_body", False)

    def _with_ours(self, headers: Collection[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name.lower() for name, _ in headers}
        ours = {
            b"x-content-type-options": b"nosniff",
            b"x-frame-options": b"DENY",
            b"referrer-policy": b"no-referrer",
            b"cross-origin-resource-policy": b"same-origin",
            b"cross-origin-opener-policy": b"same-origin",
            b"content-security-policy": self.access.policy.encode(),
            b"cache-control": b"no-store",
        }
        if self._cut:
            ours[b"connection"] = b"close"
        return [*headers, *((name, value) for name, value in ours.items() if name not in names)]

    async def reply(self, status: int, page: str, **headers: str) -> None:
        """Answer with a page; headers by name, with _ for -."""
        body = page.encode()
        named = {"content-type": "text/html; charset=utf-8", "content-length": str(len(body)), **headers}
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
        pairs.append((b"content-security-policy", _FORM_POLICY))
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error. Raises it where another reply has begun."""
        if refused is self._answered:  # the application has passed it on, after its own reply to it
            return
        if self._started:
            raise refused
        self._refusal, self._answered = None, refused
        headers, body = refused.encoded()
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    """The headers by name. Refuses too many bytes, and headers given twice of which the second could mean something
    else."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > LONGEST_HEAD:
        raise Refused(431, f"the headers are longer than {LONGEST_HEAD:,} bytes")
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in found and name in _ONCE:
            raise Refused(400, f"the header {name} is given twice", name.title())
        found[name] = value.decode("latin-1").strip()
    return found


def _host_name(netloc: str) -> str:
    """The name in a Host header, without the port."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0].lower()
    return netloc.partition(":")[0].lower()


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _password(value: str) -> str:
    """The password of HTTP Basic, whatever the user is called."""
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except ValueError:  # neither base64 nor UTF-8
        return ""


def _cookie(headers: Mapping[str, str]) -> str:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


_FORM_POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>improved-diffusion</title>
<style>body{font:16px system-ui;max-width:24em;margin:4em auto;padding:0 1em}
input,button{font:inherit;width:100%;padding:.5em;margin:.25em 0;box-sizing:border-box}</style>
<h1>improved-diffusion</h1><form method="post" action="/login"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button>Log in</button></form><p role="alert">MESSAGE</p></html>
"""
