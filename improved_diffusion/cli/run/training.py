"""What the training commands share."""

from collections.abc import Callable
from typing import Any

from ...config import UserError
from ...config.settings import Distilling, Training
from ...distributed import STOPPED
from ...training.run import train
from ..parsing import Parsed

EXAMPLE = "; for your own images improved-diffusion train photos/ is a whole command"


def train_command(default_name: str) -> Callable[[Parsed[Training]], None]:
    """What a training command runs; see training.run.train for the run's name."""

    def run(parsed: Parsed[Training]) -> None:
        _train(parsed, default_name, parsed.preset or "", EXAMPLE)

    return run


image_train = train_command("image_train")
super_res_train = train_command("super_res_train")
classifier_train = train_command("classifier_train")


def distill(parsed: Parsed[Distilling]) -> None:
    """What the distilling command runs. A preset describes the teacher, and does not name the run."""
    _train(parsed, "distill", "", ", best those that the teacher was trained on")


def _train(parsed: Parsed[Any], default_name: str, preset: str, hint: str) -> None:
    """Train.

    :param hint: what else to say where --data_dir is missing.
    """
    options = parsed.settings
    if not (options.data.data_dir or options.train.resume or options.train.resume_checkpoint):
        raise UserError(f"--data_dir is missing: name a folder of images, a .zip or an .npz{hint}")
    if train(options, parsed.given, default_name, preset).stopped:
        raise SystemExit(STOPPED)
