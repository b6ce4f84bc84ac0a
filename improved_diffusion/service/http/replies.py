"""Error replies, all of one shape: {"error": {"type", "message", "parameter"}}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...config import UserError

# What each status is called in `type`.
TYPES = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    406: "not_acceptable", 408: "timeout", 411: "length_required", 413: "too_large", 415: "unsupported_media_type",
    421: "wrong_host", 422: "invalid", 429: "busy", 431: "too_large", 500: "internal", 503: "unavailable",
    504: "timeout", 507: "out_of_memory",
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error.

    :param parameter: the field, or the header, at fault; None where there is none.
    :param headers: further ones of the reply, such as Retry-After.
    """

    def __init__(
        self, status: int, message: str, parameter: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.parameter = parameter
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """What the reply says."""
        kind = TYPES.get(self.status, "invalid" if self.status < 500 else "internal")
        return {"error": {"type": kind, "message": self.message, "parameter": self.parameter}}

    def encoded(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """(headers, body) of the reply."""
        body = json.dumps(self.content()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()], body


def busy(message: str, retry_after: float, status: int = 429) -> Refused:
    """The reply to a client that should come back after some seconds."""
    return Refused(status, message, headers={"Retry-After": str(max(1, round(retry_after)))})


def mistake(error: UserError, status: int = 422) -> Refused:
    """The reply to a mistake: its message names an option as commands do, the reply by the field's name."""
    found = re.search(r"--([a-z][a-z0-9_]*)", str(error))
    return Refused(status, str(error), found[1] if found else None)
