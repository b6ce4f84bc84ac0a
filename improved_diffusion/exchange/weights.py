"""The weights with their description, as this package's commands write them."""

from __future__ import annotations

from ..checkpoints import checkpoint
from ..checkpoints.loading import LoadedModel
from ..config.exchange import ExportConfig
from ..utils import files


def write(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """Write a state dict with published names."""
    files.make_dirs(files.folder_of(options.out))
    checkpoint.save_state_dict(loaded.model.state_dict(), options.out, loaded.description())
    return []
