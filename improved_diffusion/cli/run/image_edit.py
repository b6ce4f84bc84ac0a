"""Edit images with a trained model: encode, decode, interpolate, inpaint or vary them."""

from functools import partial
from typing import Any

from ... import distributed
from ...checkpoints.loading import load_model
from ...editing.base import Edit
from ...editing.decode import Decode
from ...editing.encode import Encode
from ...editing.inpaint import Inpaint
from ...editing.interpolate import Interpolate
from ...editing.variations import Vary
from ...logs.run_folder import open_run
from ...utils.terminal import show
from ..parsing import Parsed


def edit(kind: type[Edit], parsed: Parsed[Any]) -> None:
    """Run an editing command."""
    distributed.join_ranks(parsed.settings.run)
    loaded = load_model(parsed.settings, parsed.given, parsed.settings.edit.model_path)
    model = kind.prepare(loaded)
    if parsed.settings.sampler.print_steps:
        distributed.from_rank0(show, model.sampler.table())
        return
    command = kind.read(model)
    command.write(open_run(parsed.settings.run, command.name))


encode, decode, interpolate, inpaint, vary = (
    partial(edit, kind) for kind in (Encode, Decode, Interpolate, Inpaint, Vary)
)
