"""The weights in a checkpoint of another program, as a plain file."""

from __future__ import annotations

from ..config import UserError
from ..logs import logger
from ..utils import files
from . import checkpoint, sets
from .dialects import is_ours, refuse_foreign
from .loading import find_file


def convert(path: str, out: str, *, network: str = "", trust: bool = False) -> None:
    """Write one network of a checkpoint to a .pt, or to a .safetensors by the name, that all commands read.

    :param network: which of several networks in the file; a moving average unless given.
    :param trust: leave out objects that are neither tensors nor plain values. Their code is not run.
    Raises UserError for a file without weights of this package's networks, for objects in it without `trust`, and where
    the file to write is the one to read or one of a run's checkpoints.
    """
    path = find_file(path, flag="--model_path")
    sets.require_free(out, path)
    checkpoint.require_file_name(out)
    state_dict, metadata = checkpoint.load(path, network=network, trust=trust)
    if not is_ours(state_dict):
        refuse_foreign(state_dict, path)
        raise UserError(f"{path} holds no network of this package: it has {', '.join(list(state_dict)[:4])}, ...")
    files.make_dirs(files.folder_of(out))
    checkpoint.save_state_dict(state_dict, out, metadata)
    described = "with their description" if metadata else "without a description: sampling needs the model's flags"
    logger.log(f"{out}: {len(state_dict)} tensors of {path}, {described}")
