"""Write a model in the format of another program."""

from ... import distributed
from ...api import load
from ...checkpoints.loading import find_file, read_kind
from ...config import UserError
from ...config.settings import Exporting
from ..parsing import Parsed


def export(parsed: Parsed[Exporting]) -> None:
    """Load the model, and write it."""
    options, given = parsed.settings.export, parsed.given
    if not options.model_path:
        raise UserError("--model_path is missing: name a run's folder, or a checkpoint such as ema_0.9999_010000.pt")
    if not options.out:
        raise UserError("--out is missing: name the file or the folder to write")
    if distributed.get_rank() == 0:  # one process does it all: the others have nothing to do
        values, known = parsed.settings.values(), read_kind(find_file(options.model_path)).options()
        model = load(options.model_path, **{name: values[name] for name in given & known.keys()})
        asked = {name: value for name, value in vars(options).items() if name in given}
        model.export(asked.pop("out"), **{name: value for name, value in asked.items() if name != "model_path"})
