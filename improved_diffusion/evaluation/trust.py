"""Which feature programs may run. An exported program or TorchScript file can run any code when it is loaded, so that
only known content is loaded: files pinned below, and files that the user has allowed."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import UserError
from ..logs import logger
from ..utils import files

# The TorchScript Inception network of the published scores; k-diffusion and others pin the same checksum.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
PINNED = {INCEPTION_SHA256}


def trusted_list() -> Path:
    """The file of checksums that the user has allowed: $XDG_CONFIG_HOME/improved_diffusion/trusted_features, or the
    same below ~/.config.

    It is the user's own and not beside the programs, where whoever supplies a program could supply the note too.
    """
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "improved_diffusion/trusted_features"


def is_trusted(sha256: str) -> bool:
    """Whether content with this SHA-256 is pinned, or was allowed before."""
    return sha256 in PINNED or sha256 in {line.split(" ")[0] for line in _allowed()}


def trust(sha256: str, path: str | os.PathLike) -> None:
    """Remember that content with this SHA-256 may run, whatever file it is in. Says so in the log.

    :param path: where it is now, noted for people.
    """
    if is_trusted(sha256):
        return
    target = trusted_list()
    lines = [*_allowed(), f"{sha256}  {files.full_path(path)!a}"]
    try:
        files.make_dirs(target.parent)
        files.write_bytes(target, ("\n".join(lines) + "\n").encode())
    except (OSError, UserError) as error:
        logger.warn(f"{path} is trusted for this run only: {target} cannot be written ({error})")
        return
    logger.log(f"trusting {path} (SHA-256 {sha256}) from now on; the list of trusted programs is {target}")


def check_trusted(name: str, path: str, sha256: str, allow: bool, otherwise: str = "") -> None:
    """Raise UserError for a program that is neither pinned nor allowed.

    :param name: what messages call it, such as "--features f.pt2".
    :param allow: the user allows it now (--trust_features), which is remembered.
    :param otherwise: what else the user can do, for the message.
    """
    if allow:
        trust(sha256, path)
    elif not is_trusted(sha256):
        raise UserError(
            f"{name} was not loaded: a feature program can run any code on this machine, and this one (SHA-256 "
            f"{sha256}) is not known. If you trust where it comes from, give --trust_features once"
            f"{otherwise}"
        )


def _allowed() -> list[str]:
    target = trusted_list()
    if not target.exists():
        return []
    return [
        line
        for line in files.read_bytes(target, files.MAX_TEXT_BYTES).decode(errors="replace").splitlines()
        if line.strip()
    ]
