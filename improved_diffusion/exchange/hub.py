"""Models to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoints import checkpoint
from ..checkpoints.hub_model import MODEL_FILE
from ..checkpoints.loading import LoadedModel
from ..config import UserError, shown
from ..config.exchange import CardConfig, PushConfig
from ..config.settings import path_options
from ..logs import logger
from ..utils import files, hub
from ..utils.text import listed
from .card import CARD_FILE, GRID_FILE, Card, base_name

MakeCard = Callable[[CardConfig], Card]


def push(loaded: LoadedModel, options: PushConfig, token: Any, make_card: MakeCard) -> str:
    """Upload a model with its card in one commit; returns the commit's URL.

    What cannot work is found, as far as it can be, before samples are drawn. Raises UserError where it fails.
    """
    name = _checked(options)
    token = hub.find_token(token)
    if token is None:
        raise UserError("pushing to the Hugging Face Hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    try:
        commit = _look(name, token, options)
        with tempfile.TemporaryDirectory() as folder:
            card = make_card(options)
            card.save(folder)
            weights = files.join(folder, MODEL_FILE)
            checkpoint.save_state_dict(loaded.model.state_dict(), weights, _public(loaded.description()))
            return _upload(name, token, options, folder, [*card.contents(), MODEL_FILE], commit)
    except hub.Unreachable as error:
        raise UserError(f"cannot push to {name}: {error}") from None


def _checked(options: PushConfig) -> hub.HubName:
    name = hub.parse_name(options.repo)
    if name is None or name.revision or options.repo.startswith(hub.PREFIX):
        raise UserError(f"--repo {shown(options.repo)}: expected a repository on the Hub such as user/name")
    if not options.license:
        raise UserError("--license is missing: say how others may use the model: mit, cc-by-4.0, ..., other or unknown")
    options.require(bool(options.message.strip()), "message", "is empty: say what changed")
    return name


def _public(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description whose paths are base names: those of a private machine are nobody else's business."""
    paths = path_options()
    config = {
        name: ",".join(map(base_name, value.split(","))) if name in paths and isinstance(value, str) else value
        for name, value in description["config"].items()
    }
    return {**description, "config": config}


def _look(name: hub.HubName, token: str, options: PushConfig) -> str | None:
    """The commit that the repository is at; None where there is none yet. Says what will be replaced."""
    package = hub.package()
    with hub.asking(name, token) as api:
        try:
            info = api.model_info(name.repo, timeout=hub.FIRST_SECONDS)
        except package.errors.RepositoryNotFoundError:
            return None
        commit, private = info.sha, bool(info.private)
        there = sorted(str(each.rfilename) for each in info.siblings or ())
    if options.private and not private:
        raise UserError(f"{name} exists and is public: make it private in its settings first, or choose another --repo")
    ours = [each for each in there if each in (MODEL_FILE, CARD_FILE, GRID_FILE)]
    others = [each for each in there if each not in ours and each != ".gitattributes"]
    if ours:
        logger.warn(f"{name} has {listed(ours, 10)}: replaced; the old files stay in its history (commit {commit})")
    if others:
        logger.log(f"{name} keeps its other files: {listed(others, 10)}")
    return commit


def _upload(
    name: hub.HubName, token: str, options: PushConfig, folder: str, names: list[str], commit: str | None
) -> str:
    add = hub.package().CommitOperationAdd
    with hub.asking(name, token) as api:
        if commit is None:
            api.create_repo(name.repo, private=options.private or None)  # None: as the account has it
        done = api.create_commit(
            name.repo,
            [add(each, os.path.join(folder, each)) for each in names],
            commit_message=options.message,
            parent_commit=commit,  # refused where somebody else has pushed meanwhile
        )
    logger.log(f"pushed {', '.join(names)} to {hub.endpoint()}/{name}: commit {done.oid}")
    return done.commit_url
