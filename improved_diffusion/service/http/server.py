"""Serving an application: the socket, the limits on connections, and how it stops. uvicorn does the HTTP."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...config import UserError
from ...config.service import DoorConfig
from .replies import Refused, busy
from .security import LONGEST_HEAD, TOKEN_VARIABLE, Access, App

HEADER_SECONDS = 10.0  # that a client may take for the head of a request
KEEP_ALIVE_SECONDS = 15
FLUSH_SECONDS = 5  # for the last replies, once the engine has stopped


def listen(options: DoorConfig) -> socket.socket:
    """A socket that listens on the address. Raises UserError where that cannot be."""
    where = f"--host {options.host} --port {options.port}"
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except socket.gaierror as error:
        raise UserError(f"--host {options.host} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{where}: another program uses this port: give another --port, or 0 for a free one"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"{where}: this user may not use the port: give one of 1024 or more") from None
        raise UserError(f"{where} cannot be listened on: {error.strerror or error}") from None


def announcement(listener: socket.socket, options: DoorConfig, access: Access) -> str:
    """Where the service is, and who may use it, for the terminal."""
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    who = "programs on this machine only" if options.is_loopback else "other machines can reach it"
    token = "no token is needed"
    if access.token:
        source = f"--token_file {options.token_file}" if options.token_file else TOKEN_VARIABLE
        token = f"clients need the token of {source}"
    advice = "" if options.is_loopback else "; use a proxy with TLS: without one the token crosses the network as text"
    return f"listening on http://{host}:{port} ({who}; {token}{advice})"


def serve(
    app: App, listener: socket.socket, options: DoorConfig, stop: Callable[[float], None], *, has_lifespan: bool = False
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then let `stop` finish what is running, while new work is refused.

    A second signal ends at once, with the exit code of that signal.
    :param stop: called in a thread with the seconds that it may take, and with 0 after a second signal.
    :param has_lifespan: whether the application must be told that it starts and ends.
    """
    server = make_server(app, options, stop, has_lifespan)
    run(server, listener)
    if server.second:
        raise SystemExit(128 + server.second)


def run(server: _Server, listener: socket.socket) -> None:
    """Let a server answer on a socket until it stops."""
    asyncio.run(server.serve(sockets=[listener]))


def make_server(app: App, options: DoorConfig, stop: Callable[[float], None], has_lifespan: bool = False) -> _Server:
    """The server of an application; see `serve`."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each wrong form
    config = uvicorn.Config(
        app,
        http=_bounded(options.max_connections),
        ws="none",
        lifespan="on" if has_lifespan else "off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        h11_max_incomplete_event_size=LONGEST_HEAD,
    )
    return _Server(config, options.stop_seconds, stop)


class _Server(uvicorn.Server):
    """uvicorn's server, which goes on answering while the engine stops."""

    def __init__(self, config: uvicorn.Config, seconds: float, stop: Callable[[float], None]):
        super().__init__(config)
        self.seconds = seconds
        self.stop = stop
        self.first = self.second = 0  # the signals that have come
        self.stopper: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On the first signal stop, on the second at once."""
        if self.first:
            self.second = sig
        self.first = self.first or sig

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true to leave."""
        if self.first and self.stopper is None:
            self.stopper = threading.Thread(target=self.stop, args=(self.seconds,), daemon=True)
            self.stopper.start()
        if self.second:
            self.force_exit = True
            self.stop(0)
        if self.second or (self.stopper is not None and not self.stopper.is_alive()):
            self.should_exit = True
        return await super().on_tick(counter)


def _bounded(most: int) -> type[H11Protocol]:
    """uvicorn's protocol with a limit on connections, and on the time for a request's head."""

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(_raw(busy(f"more than {most} connections are open", 5, status=503)))
                transport.close()
                return
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()  # a request is here: its body has a limit of its own
            elif self._head_timer is None:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_raw(Refused(400, "this is not valid HTTP")))
            self.transport.close()

        def _expect_head(self) -> None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._head_timer = None
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                self.transport.write(_raw(Refused(408, f"no request came within {HEADER_SECONDS:g} seconds")))
                self.transport.close()

    return Protocol


def _raw(refused: Refused) -> bytes:
    """A whole HTTP reply, for a connection that is closed after it."""
    headers, body = refused.encoded()
    lines = [b"HTTP/1.1 %d \r\n" % refused.status, *(b"%s: %s\r\n" % pair for pair in headers)]
    return b"".join([*lines, b"connection: close\r\n\r\n", body])
