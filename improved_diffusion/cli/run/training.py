"""What the training commands share."""

from collections.abc import Callable

from ...config import UserError
from ...config.settings import Training
from ...distributed import STOPPED
from ...training.run import train
from ..parsing import Parsed


def train_command(default_name: str) -> Callable[[Parsed[Training]], None]:
    """What a training command runs; see training.run.train for the run's name."""

    def run(parsed: Parsed[Training]) -> None:
        options = parsed.settings
        if not (options.data.data_dir or options.train.resume or options.train.resume_checkpoint):
            example = "; improved-diffusion train photos/ is a whole command" if default_name == "image_train" else ""
            raise UserError(f"--data_dir is missing: name a folder of images, a .zip or an .npz{example}")
        if train(parsed.settings, parsed.given, default_name, parsed.preset or "").stopped:
            raise SystemExit(STOPPED)

    return run


image_train, super_res_train, classifier_train, distill = map(
    train_command, ("image_train", "super_res_train", "classifier_train", "distill")
)
