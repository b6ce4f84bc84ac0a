"""What a command is: its options and what it runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from ..config import UserError, unknown_name
from ..config.settings import Settings
from ..distributed import run_script
from ..logs import logger
from ..utils import stop_signals
from ..utils.terminal import show
from .parsing import Parsed, parse, split_lists


@dataclass(frozen=True)
class Command:
    """A command with flags.

    :param summary: a sentence on what it does.
    :param settings: its options.
    :param run: what it does with them: a function, or "module:function" of cli/run, imported when it runs.
    :param first: the options that matter most: --help shows these, --help-all all of them.
    :param words: the option that words before the flags are the values of.
    :param lists: the options that may have several values, separated by commas. `run` then takes a list: for each
        combination ({name: value} of the listed options that were given, the parsed settings with them).
    """

    summary: str
    settings: type[Settings]
    run: Callable[[Any], Any] | str
    first: Sequence[str] = ()
    words: str = ""
    lists: Sequence[str] = ()

    def main(self, argv: Sequence[str], program: str) -> None:
        """Parse the command line and run."""
        parsed: Any
        if self.lists:
            parsed = [(chosen, self.parse(words, program)) for chosen, words in split_lists(argv, self.lists)]
        else:
            parsed = self.parse(argv, program)
        run = self._function()
        stop_signals.begin()
        run(parsed)

    def _function(self) -> Callable[[Any], Any]:
        """The function to run, imported."""
        if not isinstance(self.run, str):
            return self.run
        module, _, name = self.run.partition(":")
        with _without_collections():
            function: Callable[[Any], Any] = getattr(import_module(f".run.{module}", __package__), name)
        return function

    def parse(self, argv: Sequence[str], program: str) -> Parsed[Any]:
        """The settings of a command line."""
        return parse(self.settings, argv, program=program, description=self.summary, first=self.first, words=self.words)


@dataclass(frozen=True)
class CommandGroup:
    """Several commands, the first word of the command line names one.

    :param default: the command of a line that begins with a flag; "" where there is none.
    """

    summary: str
    commands: Mapping[str, Command]
    default: str = ""

    def main(self, argv: Sequence[str], program: str) -> None:
        """Run the command that the first word names. Raises UserError where there is none of that name."""
        words = list(argv)
        if words[:1] in (["--help"], ["-h"]):
            show(self.help(program))
            return
        if self.default and words and words[0].startswith("-"):
            words = [self.default, *words]
        if not words or words[0].startswith("-"):
            names = ", ".join(self.commands)
            raise UserError(f"the command comes first: {program} with one of {names}; --help describes them")
        if words[0] not in self.commands:
            raise unknown_name("command", words[0], self.commands)
        self.commands[words[0]].main(words[1:], f"{program} {words[0]}")

    def help(self, program: str) -> str:
        """What --help prints."""
        width = max(map(len, self.commands))
        rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in self.commands.items())
        return (
            f"usage: {program} COMMAND [--flag value ...]\n\n{self.summary}\n\ncommands:\n{rows}\n\n"
            f"{program} COMMAND --help lists a command's flags."
        )


@contextmanager
def _without_collections() -> Iterator[None]:
    """What importing torch makes stays: looking for garbage in it takes a tenth of a command's start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_logged(main: Callable[[], None]) -> None:
    """Run a command and end the process; the error that ends it is in its log, where it has one."""
    run_script(partial(_logging_errors, main))


def _logging_errors(main: Callable[[], None]) -> None:
    try:
        main()
    except BaseException as error:
        logger.log_error(error)
        raise
    finally:
        stop_signals.ignore_until_exit()
