"""The console command `improved-diffusion`, whose first word names a command, and the scripts of the same commands.

torch, whose import takes seconds, is imported when a command line has been read, so that --help and a mistake in a flag
answer at once, and after the signals of these moments are caught.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..utils import stop_signals

# Name: (module, what it does). A module is imported when its command is asked for.
COMMANDS = {
    "train": ("image_train", "train a model on images"),
    "sample": ("image_sample", "draw images from a model"),
    "edit": ("image_edit", "encode, decode, interpolate, inpaint or vary images"),
    "nll": ("image_nll", "measure bits per dimension on images"),
    "loss-floor": ("loss_floor", "measure the least loss possible on images, by noise level"),
    "evaluate": ("evaluate", "FID, KID and other scores of samples, in a report"),
    "super-res-train": ("super_res_train", "train a super-resolution model"),
    "super-res-sample": ("super_res_sample", "enlarge images with a super-resolution model"),
    "classifier-train": ("classifier_train", "train a classifier for guidance"),
    "distill": ("distill", "turn a trained model into one that samples in 1 to 4 steps"),
    "posthoc-ema": ("posthoc_ema", "make averages of other lengths after training"),
    "export": ("export", "write a model in the format of another program"),
    "convert": ("convert", "write the weights in another program's checkpoint to a plain file"),
    "push": ("push", "upload a model to the Hugging Face Hub, with a model card"),
    "serve": ("serve", "serve models over HTTP"),
    "web": ("web", "open a web page that samples, edits, trains and evaluates"),
}


def help_text(program: str) -> str:
    """What --help prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: {program} COMMAND [--flag value ...]\n\nTrain pixel-space diffusion models and sample from them.\n\n"
        f"commands:\n{rows}\n\n{program} COMMAND --help lists a command's options."
    )


def dispatch(argv: Sequence[str]) -> None:
    """Run the command that the first word names. Raises UserError where there is none of that name."""
    from ..config import UserError, unknown_name
    from ..utils.terminal import show
    from .parsing import program_name

    program = program_name()
    if not argv or argv[0] in ("-h", "--help"):
        show(help_text(program))
        return
    if argv[0] == "--version":
        from .. import __version__

        show(__version__)
        return
    if argv[0].startswith("-"):
        raise UserError(f"the command comes first, before {argv[0]}: one of {', '.join(COMMANDS)}")
    if argv[0] not in COMMANDS:
        raise unknown_name("command", argv[0], COMMANDS)
    module = _import(COMMANDS[argv[0]][0])
    words = module.with_recipe(argv[1:]) if argv[0] == "train" else argv[1:]
    module.COMMAND.main(words, f"{program} {argv[0]}")


def main() -> None:
    """The entry point of the console command."""
    words = sys.argv[1:]
    _run(lambda: dispatch(words), trains=bool(words) and _trains(words[0]))


def run_script(name: str) -> None:
    """The whole of a script in scripts/.

    :param name: of the command's module.
    """

    def run() -> None:
        from .parsing import program_name

        _import(name).COMMAND.main(sys.argv[1:], program_name())

    _run(run, trains=_trains(name))


def _trains(name: str) -> bool:
    """Whether a command of this name, or the script of this name, trains."""
    return name.endswith("train") or name == "distill"


def _run(command: Callable[[], None], trains: bool) -> None:
    """Run a command with this process's arguments; a user's mistake ends in one message and exit code 1."""
    stop_signals.catch_early(trains)
    from .command import run_logged

    run_logged(command)


def _import(name: str) -> Any:
    return import_module(f".{name}", __package__)
