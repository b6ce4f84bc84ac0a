"""Write the weights in another program's checkpoint to a plain file."""

from ... import distributed
from ...checkpoints import conversion
from ...config import UserError
from ...config.settings import Converting
from ..parsing import Parsed


def convert(parsed: Parsed[Converting]) -> None:
    """Read the file, and write its weights."""
    options = parsed.settings.convert
    if not options.model_path:
        raise UserError("--model_path is missing: name the checkpoint to read")
    if not options.out:
        raise UserError("--out is missing: name the file to write, such as model.pt or model.safetensors")
    if distributed.get_rank() == 0:  # one process does it all: the others have nothing to do
        conversion.convert(options.model_path, options.out, network=options.network, trust=options.trust)
