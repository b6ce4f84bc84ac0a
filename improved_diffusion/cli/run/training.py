"""What the training commands share."""

from collections.abc import Callable
from typing import Any

from ...config import UserError
from ...config.settings import Distilling, Training
from ...distributed import STOPPED, get_rank
from ...training.run import train
from ..parsing import Parsed

SAMPLE = "improved-diffusion sample --model_path"
EXAMPLE = "; for your own images improved-diffusion train photos/ is a whole command"


def train_command(default_name: str, use: str = "") -> Callable[[Parsed[Training]], None]:
    """What a training command runs; see training.run.train for the run's name, and `_train` for its use."""

    def run(parsed: Parsed[Training]) -> None:
        _train(parsed, default_name, parsed.preset or "", EXAMPLE, use)

    return run


image_train = train_command("image_train", SAMPLE)
super_res_train = train_command("super_res_train")
classifier_train = train_command("classifier_train")


def distill(parsed: Parsed[Distilling]) -> None:
    """What the distilling command runs. A preset describes the teacher, and does not name the run."""
    _train(parsed, "distill", "", ", best those that the teacher was trained on", SAMPLE)


def _train(parsed: Parsed[Any], default_name: str, preset: str, hint: str, use: str) -> None:
    """Train.

    :param hint: what else to say where --data_dir is missing.
    :param use: the command for a finished model, up to its folder; "" for none.
    """
    options = parsed.settings
    if not (options.data.data_dir or options.train.resume or options.train.resume_checkpoint):
        raise UserError(f"--data_dir is missing: name a folder of images, a .zip or an .npz{hint}")
    trained = train(options, parsed.given, default_name, preset)
    if trained.stopped:
        raise SystemExit(STOPPED)
    if use and trained.checkpoints and get_rank() == 0:
        print(f"to draw samples: {use} {trained.checkpoints}")
