"""The Hugging Face Hub, by the package huggingface_hub: names of models, tokens, limits, and what errors mean."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..config import UserError, shown

TIMEOUT_SECONDS = 60.0  # without a byte from the server
FIRST_SECONDS = 10.0  # without an answer to the first question: the network may be down
PREFIX = "hf://"
LONGEST_NAME = 96  # of a repository, as the Hub has it
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface|hf)\.co/(?P<repo>(?!(?:datasets|spaces)/)[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)
_REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
_TOKEN = re.compile(r"[!-~]{1,1000}")  # what an HTTP header can hold
_FILES = re.compile(r".*\.(pt|pth|ckpt|bin|safetensors|npz|zip|json|onnx|pt2)", re.IGNORECASE)
_ETAG = re.compile(r'(?:W/)?"?(?!\.{1,2}"?$)[\w.:=+-]{1,200}"?', re.ASCII)  # names a file of the cache
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A model on the Hub: user/name, and the branch, tag or commit; "" for the newest."""

    repo: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class Unreachable(Exception):
    """The Hub gives no answer for now; the message says why."""


def parse_name(text: str) -> HubName | None:
    """The model that user/name, user/name@revision, or hf:// before either, names; None for anything else."""
    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    if len(repo) > LONGEST_NAME or not _REPOSITORY.fullmatch(repo) or re.search(r"\.\.|--|[.-](/|$)|\.git$", repo):
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return HubName(repo, revision)


def name_in_url(url: str) -> HubName | None:
    """The model whose page, branch or file on the Hub's site a URL is; None for anything else."""
    match = _PAGE.match(url)
    if not match:
        return None
    revision = match["revision"] or "main"
    return parse_name(match["repo"] if revision == "main" else f"{match['repo']}@{revision}")


def may_be_name(path: str) -> bool:
    """Whether a path that does not exist here may name a model on the Hub rather than be misspelt.

    It is misspelt where its first part is a folder here, or its end is that of a file; hf:// before it says which.
    """
    if path.startswith(PREFIX):
        return True
    name = parse_name(path)
    return name is not None and not os.path.isdir(name.repo.partition("/")[0]) and not _FILES.fullmatch(path)


def package() -> Any:
    """The package huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError(
            "models on the Hugging Face Hub need the package huggingface_hub: pip install 'improved_diffusion[hub]'"
        ) from None
    return huggingface_hub


def endpoint() -> str:
    """The server: HF_ENDPOINT, or the Hub itself."""
    return (os.environ.get("HF_ENDPOINT") or package().constants.ENDPOINT).rstrip("/")


def find_token(given: Any = None) -> str | None:
    """The token given, else that of HF_TOKEN or of the Hub's own login; None where there is none.

    Raises UserError for one that cannot be a token. Its text is in no message.
    """
    found = _own_token() if given is None else given
    if found is not None and not (isinstance(found, str) and _TOKEN.fullmatch(found)):
        raise UserError("the token for the Hugging Face Hub is not one: expected text such as hf_..., without blanks")
    return found


def _own_token() -> str | None:
    get_token = package().get_token
    try:
        return get_token()
    except Exception as error:  # a login that is over is renewed, which can fail in many ways
        kind = type(error).__name__
        raise UserError(
            f"the login of the Hugging Face Hub cannot be used ({kind}): log in again, or set HF_TOKEN"
        ) from None


@contextmanager
def asking(name: HubName, token: str | None) -> Iterator[Any]:
    """An HfApi whose answers are waited for no longer than TIMEOUT_SECONDS.

    Whatever goes wrong inside becomes a UserError without the token, or Unreachable. Use it for calls of
    huggingface_hub only.
    """
    found = package()
    session = found.get_session()
    before, session.timeout = session.timeout, TIMEOUT_SECONDS
    hooks = session.event_hooks["response"]
    hooks.append(_check_headers)
    try:
        yield found.HfApi(endpoint=endpoint(), token=token or False, library_name="improved_diffusion")
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, name, token) from None
    finally:
        hooks.remove(_check_headers)
        session.timeout = before


def _check_headers(response: Any) -> None:
    """Raise UserError for an answer that would name files outside the cache."""
    if response.request.method != "HEAD":
        return
    for header, pattern in (("etag", _ETAG), ("x-linked-etag", _ETAG), ("x-repo-commit", _COMMIT)):
        value = response.headers.get(header)
        if value is not None and not pattern.fullmatch(value):
            raise UserError(f"{endpoint()} sends the {header} {shown(value)}, which no Hub does: use another server")


def _explained(error: Exception, name: HubName, token: str | None) -> Exception:
    """What an error of huggingface_hub, or of what it is built on, means: UserError or Unreachable."""
    errors = package().errors
    while isinstance(error.__cause__, Exception) and not (hasattr(error, "response") or _is_of_transport(error)):
        error = error.__cause__  # the package's own words hide the reason
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name.repo} is gated: accept its conditions at {endpoint()}/{name.repo}, and {_LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name.repo} has no revision {name.revision or 'main'}: choose a branch, a tag or a commit")
    if isinstance(error, errors.EntryNotFoundError) and status:
        return UserError(f"{name} lacks a file that its list has: load it again")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        access = "the token gives no access to it" if token else f"is private: {_LOG_IN}"
        return UserError(f"{name.repo} does not exist on {endpoint()}, or {access}")
    if status == 403:
        return UserError(f"{endpoint()} refuses access to {name.repo}: use a token with the permission it needs")
    if status in (409, 412):
        return UserError(f"{name.repo} has changed meanwhile: look at it, then run the same again")
    why = " ".join(_without(token, f"{type(error).__name__}: {error}").split())[:400]
    if isinstance(error, OSError) and (error.filename or error.errno in _FULL):
        return UserError(
            f"{name}: the cache of the Hub cannot be used ({why}): free some space, or set HF_HOME to a folder"
        )
    if status == 429:
        return Unreachable(f"{endpoint()} gets too many requests from here: wait some minutes")
    if status >= 500 or isinstance(error, (ConnectionError, TimeoutError)) or _is_of_transport(error):
        return Unreachable(f"{endpoint()} gives no answer ({why})")
    remedy = "" if status else ": use another server, or another version of huggingface_hub"
    return UserError(f"{name} on {endpoint()}: {why}{remedy}")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def _is_of_transport(error: Exception) -> bool:
    """Whether it is an error of the connection, of httpx under whichever name huggingface_hub has it."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _without(token: str | None, text: str) -> str:
    """The text, which may come from a server, without the token."""
    return text.replace(token, "(token)") if token else text
