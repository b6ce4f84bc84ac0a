"""Upload a model to the Hugging Face Hub."""

from ... import distributed
from ...api import load
from ...checkpoints.loading import find_file, read_kind
from ...config import UserError
from ...config.settings import Pushing
from ...exchange.card import require_own
from ...logs import logger
from ..parsing import Parsed


def push(parsed: Parsed[Pushing]) -> None:
    """Load the model, and upload it."""
    options, given = parsed.settings.push, parsed.given
    if not options.model_path:
        raise UserError("--model_path is missing: name a run's folder, or a checkpoint such as ema_0.9999_010000.pt")
    if not (options.repo or options.out):
        raise UserError("--repo is missing: name the repository on the Hub, such as user/name")
    if options.out:
        require_own(options.out)
    if distributed.get_rank() == 0:  # one process does it all: the others have nothing to do
        path, values = find_file(options.model_path), parsed.settings.values()
        model = load(path, **{name: values[name] for name in given & read_kind(path).options().keys()})
        asked = {name: value for name, value in vars(options).items() if name not in ("model_path", "out")}
        if options.out:
            card = {name: value for name, value in asked.items() if name not in ("private", "message")}
            logger.log(f"wrote {model.card(**card).save(options.out)}")
        else:
            model.push_to_hub(**asked)
