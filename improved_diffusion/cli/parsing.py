"""Config <-> command line: flags, --config files and presets to options."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from ..config import UserError, str2bool, unknown_name
from ..config.presets import PRESETS, preset_options
from ..utils import files


class _Parser(argparse.ArgumentParser):
    """Errors like all our others: one message, and the nearest flag where one is misspelt."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


class Command(NamedTuple):
    """One of a script's commands: a sentence on what it does, and its groups of options."""

    description: str
    groups: Sequence[type]
    words: str = ""  # the option that words before the flags are for
    lists: Sequence[str] = ()  # the options that may have several values, separated by commas


def parse_command(
    commands: Mapping[str, Command], description: str, argv: Sequence[str] | None = None, default: str = ""
) -> tuple[str, argparse.Namespace]:
    """(the name of the command, its options) of a script with several: the name is the command line's first word.

    --help alone lists the commands, after a name that one's flags. Where a command takes lists, the options have
    `cells`: a namespace for each combination, whose `chosen` has the values that are listed. Raises UserError for a
    name that there is not.
    :param default: the command of a line that begins with a flag.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    program = os.path.basename(sys.argv[0])
    if words[:1] in (["--help"], ["-h"]):
        width = max(map(len, commands))
        rows = [f"  {name:<{width}}  {command.description}" for name, command in commands.items()]
        print(f"usage: {program} COMMAND [--flag value ...]\n\n{description.strip()}\n\ncommands:")
        print("\n".join(rows) + f"\n\n{program} COMMAND --help lists a command's flags.")
        raise SystemExit(0)
    if default and words and words[0].startswith("--"):
        words = [default, *words]
    if not words or words[0].startswith("-"):
        raise UserError(f"the command comes first: {program} with one of {', '.join(commands)}; --help describes them")
    name = words[0]
    if name not in commands:
        raise unknown_name("command", name, commands)
    command, words = commands[name], words[1:]
    if command.words:
        bare = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
        words = [*([f"--{command.words}", ",".join(bare)] if bare else []), *words[len(bare) :]]
    cells: list[argparse.Namespace] = []
    for chosen, cell in _combinations(words, command.lists):
        parsed = parse_options(command.groups, command.description, cell, name)
        parsed.chosen = chosen
        values = [getattr(parsed, axis) for axis in chosen]
        if values not in [[getattr(other, axis) for axis in chosen] for other in cells]:  # 1 and 1.0 are one
            cells.append(parsed)
    options = cells[0]
    if command.lists:
        options.cells = cells
    return name, options


def _combinations(argv: Sequence[str], lists: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """({name: value} of the listed options, the command line with them) for each combination of values."""
    words, values = [], {}
    position = 0
    while position < len(argv):
        flag, equals, value = argv[position].partition("=")
        name = flag.removeprefix("--")
        # A flag without a value is left for the parser to refuse, and so is a value that is no list.
        if flag.startswith("--") and name in lists and (equals or position + 1 < len(argv)):
            if not equals:
                position += 1
                value = argv[position]
            values[name] = list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip())) or [value]
        else:
            words.append(argv[position])
        position += 1
    names = [name for name in lists if name in values]  # in one order, whatever the command line's
    return [
        (chosen, [*words, *(word for name, value in chosen.items() for word in (f"--{name}", value))])
        for chosen in (dict(zip(names, product)) for product in itertools.product(*(values[name] for name in names)))
    ]


def parse_options(
    groups: Sequence[type], description: str, argv: Sequence[str] | None = None, command: str = ""
) -> argparse.Namespace:
    """The options of the given groups from the command line, as a namespace.

    Flags win over --config, which wins over --preset, which wins over the defaults. `given` holds the names that were
    not left at their defaults, `flags` those that came as flags. Raises UserError for a wrong name or value.
    :param command: the word that stood before the flags, for --help.
    """
    known = {f.name: f for group in groups for f in fields(group)}
    if "large_size" in known:
        del known["image_size"]  # super-resolution has two sizes instead
    parser = _Parser(
        usage=f"%(prog)s{f' {command}' if command else ''} [--flag value ...]",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help=f"flags of a published model: {', '.join(PRESETS)}")
    parser.add_argument("--config", help="YAML or JSON file of options, such as a run's config.json")
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").strip().splitlines()[0].rstrip("."))
        for f in (f for f in fields(group) if f.name in known):
            kind = f.metadata["parse"]
            extra: dict[str, Any] = {"nargs": "?", "const": "True", "metavar": "True|False"} if kind is str2bool else {}
            if f.metadata["choices"]:
                extra = {"metavar": "|".join(f.metadata["choices"])}
            default = f.default if f.default != "" else "empty"
            section.add_argument(
                f"--{f.name}", help=f"{f.metadata['help']} (default: {default})".replace("%", "%%"), **extra
            )
    flags, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise unknown_name("flag", word.split("=")[0], [f"--{name}" for name in (*known, "preset", "config")])
        raise UserError(f"unexpected argument {word!r}: every option is a flag, such as --batch_size 4")

    values = vars(flags)
    preset, config = values.pop("preset", None), values.pop("config", None)
    chosen = {**(_from_file(config, known) if config else {}), **values}
    given = {**(_from_preset(preset, known) if preset else {}), **chosen}
    for source in (chosen, values):
        if "batch_size" in source and "total_batch_size" not in source:
            given.pop("total_batch_size", None)  # the total of a weaker source gives way to a rank's own
    namespace = argparse.Namespace(given=set(given), flags=set(values), preset=preset)
    for group in groups:
        options = group(**{f.name: given[f.name] for f in fields(group) if f.name in given})
        for f in (f for f in fields(group) if f.name in known):
            setattr(namespace, f.name, getattr(options, f.name))
    return namespace


def _from_preset(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    options = preset_options(name)
    if ("large_size" in known) != ("large_size" in options):
        kind = "super-resolution" if "large_size" in options else "image"
        raise UserError(f"--preset {name} is for the {kind} scripts: choose a preset of the other kind")
    return {key: value for key, value in options.items() if key in known}  # a recipe has options of other scripts too


def _from_file(path: str, known: Mapping[str, Any]) -> dict[str, Any]:
    text = files.read_bytes(path).decode("utf-8", errors="replace")
    try:
        if path.endswith((".yaml", ".yml")):
            try:
                import yaml
            except ImportError:
                raise UserError(
                    "--config with YAML needs the package pyyaml: pip install pyyaml, or write JSON"
                ) from None
            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]  # a run's config.json
        return {key: value for key, value in content.items() if key in known}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold names and values, such as lr: 0.0001")
    for key in content:
        if key not in known:
            raise unknown_name(f"option in {path}", key, known)
    return content
