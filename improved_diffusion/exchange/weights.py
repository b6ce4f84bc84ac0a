"""The weights with their description: a .pt file as this package's commands write it, or a .safetensors file."""

from __future__ import annotations

from ..checkpoints import checkpoint, safetensors_file
from ..checkpoints.loading import LoadedModel
from ..config import UserError
from ..config.exchange import ExportConfig
from ..utils import files


def write(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """Write a state dict with published names. Raises UserError where the file's name is of the other format."""
    checkpoint.require_file_name(options.out)
    if safetensors_file.has_suffix(options.out) != (options.to == "safetensors"):
        other = "give --to safetensors" if options.to == "pt" else f"name it {options.out}{safetensors_file.SUFFIX}"
        raise UserError(f"--out {options.out} is not the name of a file for --to {options.to}: {other}")
    files.make_dirs(files.folder_of(options.out))
    checkpoint.save_state_dict(loaded.model.state_dict(), options.out, loaded.description())
    return []
