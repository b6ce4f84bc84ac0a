"""What the page must know of a model to fit its controls to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..checkpoints.checkpoint import read_outline
from ..checkpoints.loading import MODEL_OPTIONS, with_own_steps
from ..config import UserError
from ..config.settings import Settings
from ..models.build import build_diffusion
from ..sampling.sampler import build_sampler
from .state import AppState


@dataclass(frozen=True)
class Facts:
    """What is known of a chosen model.

    :param path: of the checkpoint's file, as a command takes it.
    :param info: the catalogue's.
    :param metadata: what its file says of itself.
    """

    path: str
    info: Any
    metadata: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that the model was trained with, as far as its file says."""
        return self.metadata.get("config", {})

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, or their numbers; empty for a model without classes."""
        return self.info.class_names or [str(i) for i in range(self.info.num_classes)]

    @property
    def why_no_guidance(self) -> str:
        """Why classifier-free guidance cannot work; "" where it can."""
        if not self.classes:
            return "This model has no classes to guide towards."
        if not self.info.hides_classes:
            return "This model was never trained with its class hidden (label_drop), which guidance needs."
        return ""

    def settings(self, kind: type[Settings], chosen: Mapping[str, Any]) -> Any:
        """The settings of a command for this model. Raises UserError for options that cannot work."""
        own = {name: self.options[name] for name in MODEL_OPTIONS if name in self.options and name in kind.options()}
        return kind.of({**own, **chosen})

    def sampler(self, kind: type[Settings], chosen: Mapping[str, Any]) -> Any:
        """The sampler of these options. Raises UserError for options that cannot work."""
        settings = with_own_steps(self.settings(kind, chosen), self.metadata)
        return build_sampler(settings, build_diffusion(settings.diffusion))


def facts(app_state: AppState, name: str | None, average: str) -> Facts:
    """What is known of a model of the catalogue. Raises UserError without one, and for one that cannot be read."""
    if name is None:
        raise UserError("there is no model yet: train one in the Train tab, or upload the weights of one")
    path = app_state.catalogue.file(name, average)
    return Facts(path, app_state.catalogue.describe(name), _metadata(path, os.path.getmtime(path)))


def known_facts(app_state: AppState, name: str | None) -> Facts | None:
    """As `facts`; None without a model, and for one that cannot be read, as the picker says."""
    try:
        return facts(app_state, name, "") if name else None
    except UserError:
        return None


@lru_cache(maxsize=256)
def _metadata(path: str, _changed: float) -> Mapping[str, Any]:
    return read_outline(path)[1]
