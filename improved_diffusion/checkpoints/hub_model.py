"""Models of the Hugging Face Hub, downloaded into its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import UserError, one_line
from ..logs import logger
from ..utils import files, hub
from ..utils.downloads import MAX_BYTES
from ..utils.text import listed

MODEL_FILE = "model.safetensors"  # what we push
_SHARD = r"[\w.-]*-\d+-of-\d+\."
_WEIGHTS = re.compile(rf"(?!opt\d|optimizer|{_SHARD})\w[\w.-]{{0,199}}\.(safetensors|pt)", re.ASCII)
# What has weights too, to say so.
_OTHERS = re.compile(r"(unet/)?(?!opt)\w[\w.-]{0,199}\.(safetensors|pt|bin|ckpt|pth|pkl)", re.ASCII)
# A pipeline of diffusers: in folders, or, as older ones are, in one.
_PIPELINE = ("model_index.json", "config.json")
_SETTINGS = (*_PIPELINE, "unet/config.json", "scheduler_config.json", "scheduler/scheduler_config.json")
_NETWORKS = tuple(
    f"{folder}diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin") for folder in ("unet/", "")
)


class Choice(NamedTuple):
    """What of a repository makes a model.

    :param names: the files to download.
    :param path: the one to load, or "" for their folder.
    """

    names: list[str]
    path: str


def fetch(text: str, token: Any = None) -> str:
    """The local path of a model on the Hub: a file, or a folder for a pipeline of diffusers.

    Where the Hub cannot be reached, that of the cache. Files are chosen by their names, are never executed, and are not
    larger than the Hub's list says. The log says what was loaded.
    Raises UserError where there is no such repository, or no model in it.
    """
    name = hub.parse_name(text)
    if name is None:
        raise UserError(f"{text} does not exist: a model on the Hugging Face Hub is user/name or user/name@revision")
    try:
        token = hub.find_token(token)
        sizes, commit = _list(name, token)
        choice = choose(sizes, str(name))
        folder = _download(name, choice, sizes, commit, token)
    except hub.Unreachable as error:
        folder, choice = _cached(name, error)
        commit = os.path.basename(folder)
        logger.warn(f"{one_line(error)}: loading the copy in the cache")
    except UserError as error:
        raise UserError(f"{text} is no path here, so it was looked for on the Hugging Face Hub: {error}") from None
    logger.log(f"{name}: loading {choice.path or ', '.join(choice.names)} of commit {commit[:12]}")
    return os.path.join(folder, *choice.path.split("/")) if choice.path else folder


def choose(sizes: Mapping[str, int | None], where: str) -> Choice:
    """What to load of a repository with these files. Raises UserError where there is no model, or several."""
    weights = sorted(filter(_WEIGHTS.fullmatch, sizes))
    network = next((name for name in _NETWORKS if name in sizes), None)
    if MODEL_FILE in weights:
        choice = Choice([MODEL_FILE], MODEL_FILE)
    elif network and not sizes.keys().isdisjoint(_PIPELINE):
        choice = Choice([*(name for name in _SETTINGS if name in sizes), network], "")
    elif len(weights) == 1:
        choice = Choice(weights, weights[0])
    elif weights:
        raise UserError(f"{where} has several models ({listed(weights, 10)}): download the one you want, and load it")
    else:
        others = listed(sorted(filter(_OTHERS.fullmatch, sizes)), 10)
        but = f", but {others}, which are shards, a variant or of another kind" if others else ""
        raise UserError(f"{where} has no model{but}: expected {MODEL_FILE}, a .safetensors or .pt file, or a pipeline")
    for name in choice.names:
        most = MAX_BYTES if name not in _SETTINGS else files.MAX_TEXT_BYTES
        if (sizes[name] or 0) > most:
            raise UserError(f"{name} of {where} has {sizes[name]:,} bytes, more than the {most:,} that are allowed")
    return choice


def _list(name: hub.HubName, token: str | None) -> tuple[dict[str, int | None], str]:
    """(the size of each file of a repository, the commit)."""
    with hub.asking(name, token) as api:
        revision = name.revision or None
        info = api.model_info(name.repo, revision=revision, files_metadata=True, timeout=hub.FIRST_SECONDS)
        found = {str(each.rfilename): each.size for each in info.siblings or ()}
        commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit) or not all(_is_size(size) for size in found.values()):
        raise UserError(f"the list of the files of {name} is damaged: use another server than {hub.endpoint()}")
    return found, commit


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _download(
    name: hub.HubName, choice: Choice, sizes: Mapping[str, int | None], commit: str, token: str | None
) -> str:
    """The folder in the cache with the files of this commit."""
    tqdm = hub.package().utils.tqdm
    for each in choice.names:
        size = sizes[each]
        with hub.asking(name, token) as api:
            path = api.hf_hub_download(
                name.repo,
                each,
                revision=name.revision or None,  # rather than the commit, so that the cache knows the name
                etag_timeout=hub.FIRST_SECONDS,
                tqdm_class=_bar(tqdm, each, MAX_BYTES if size is None else size),
            )
        folder = path.removesuffix(os.path.join(os.sep, *each.split("/")))
        if os.path.basename(folder) != commit:
            raise UserError(f"{name} changed while it was downloaded: load it again")
    return folder


def _bar(kind: Any, file: str, size: int) -> Any:
    """A progress bar that ends a download of more bytes than the file has."""

    class Bar(kind):
        received = 0.0

        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any):
            super().__init__(*args, name=name, **kwargs)
            self.is_limited = name == "huggingface_hub.http_get"  # Xet, the other way, checks what it receives

        def update(self, n: float | None = 1) -> Any:
            self.received += n or 0
            if self.is_limited and self.received > size:
                raise UserError(f"the server sends more of {file} than its {size:,} bytes: use another server")
            return super().update(n)

    return Bar


def _cached(name: hub.HubName, error: hub.Unreachable) -> tuple[str, Choice]:
    """(the folder in the cache with what was downloaded of a repository before, what to load of it)."""
    package = hub.package()
    try:
        folder = package.snapshot_download(name.repo, revision=name.revision or None, local_files_only=True)
        return folder, choose(dict.fromkeys(_names_below(folder)), str(name))
    except (OSError, ValueError):  # nothing is there, or the cache is damaged
        raise UserError(
            f"{name} is neither a path here nor in the cache of the Hugging Face Hub, and {one_line(error)}: check the "
            "name, or the network"
        ) from None


def _names_below(folder: str) -> list[str]:
    """The files in a folder and its folders, as paths with slashes; links to files that are gone are none."""
    found = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in found if os.path.exists(path)]
