"""What the training commands share."""

from collections.abc import Callable

from ..config.settings import Training
from ..distributed import STOPPED
from ..training.run import train
from ..training.signals import ignore_until_exit
from .parsing import Parsed


def train_command(default_name: str) -> Callable[[Parsed[Training]], None]:
    """What a training command runs; the run is called by its preset, or by `default_name`."""

    def run(parsed: Parsed[Training]) -> None:
        try:
            stopped = train(parsed.settings, parsed.given, parsed.preset or default_name).stopped
        finally:
            ignore_until_exit()
        if stopped:
            raise SystemExit(STOPPED)

    return run
