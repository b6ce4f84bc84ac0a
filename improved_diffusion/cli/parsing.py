"""Flags, --config files and presets to settings."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from ..config import UserError, checked_value, path_argument, repeated, shown
from ..config.messages import naming
from ..config.presets import PRESETS, options_for, until_chosen
from ..config.recipes import AUTO, RECIPES
from ..config.settings import Settings, merge_options, unknown_option
from ..logs import logger
from ..utils import files
from ..utils.terminal import show

MAX_YAML_BYTES = 2**20  # of a --config; reading more takes long

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Parsed(Generic[S]):
    """The settings of a command, and what the user gave."""

    settings: S
    given: frozenset[str]  # the options that came by flag, file or preset, rather than by default
    preset: str | None = None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are like all our others: one message, and the nearest flag where one is misspelt."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


class _Help(argparse.Action):
    """--help: the options that matter first; --help-all: every option."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        show(parser.format_help().rstrip("\n"))
        raise SystemExit(0)


def parse(
    kind: type[S],
    argv: Sequence[str] | None = None,
    *,
    program: str = "%(prog)s",
    description: str = "",
    first: Sequence[str] = (),
    words: str = "",
) -> Parsed[S]:
    """The settings of the given kind from a command line.

    Flags win over --config, which wins over --preset, which wins over the defaults. Raises UserError for a wrong name
    or value.
    :param program: what stands before the flags in the usage line.
    :param first: the options that --help shows; --help-all shows all.
    :param words: the option that words before the flags are the values of.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if words:
        bare = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        _check_quotes(bare)
        argv = [*([f"--{words}", ",".join(bare)] if bare else []), *argv[len(bare) :]]
    known = kind.options()
    parser = _build_parser(kind, program, description, first if "--help-all" not in argv else ())
    flags, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            flag = word.split("=")[0]
            raise unknown_option("flag", flag, (*known, "preset", "config"))
        raise _stray_word(word, argv, known, first)
    values = vars(flags)
    for name in kind.unused.keys() & values.keys():
        del values[name]
        logger.log(f"--{name} changes nothing here: {kind.unused[name]}")
    preset, config = values.pop("preset", None), values.pop("config", None)
    sources = [
        options_for(preset, kind) if preset else {},
        _from_file(path_argument("--config", config), kind, values) if config else {},
        values,
    ]
    given = merge_options(sources)
    return Parsed(kind.of(merge_options([until_chosen(preset), given])), frozenset(given), preset)


def _build_parser(kind: type[Settings], program: str, description: str, first: Sequence[str]) -> _Parser:
    """A parser of all options; its help shows those of `first`, or all where there are none."""
    parser = _Parser(
        usage=f"{program} [--flag value ...]",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        epilog="--help-all lists all options." if first else None,
    )
    parser.add_argument("-h", "--help", "--help-all", action=_Help, nargs=0, help=argparse.SUPPRESS)
    common = {
        "preset": (
            f"options for your own images: {AUTO} (by the images and the hardware), {', '.join(RECIPES)}; or of a "
            f"published model: {', '.join(PRESETS)}"
        ),
        "config": "YAML or JSON file of options, such as a run's config.json",
    }
    for name, text in common.items():
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS if first and name not in first else text)
    added: set[str] = set()
    for group in kind.groups().values():
        section = parser.add_argument_group((group.__doc__ or "").strip().splitlines()[0].rstrip("."))
        for f in (f for f in fields(group) if f.name not in added):
            added.add(f.name)
            default = kind.shown_defaults.get(f.name, f.default)
            _add_option(section, f, default, hidden=bool(first) and f.name not in first)
    if kind.unused:
        section = parser.add_argument_group("Accepted, and not used")
        for name, reason in kind.unused.items():
            section.add_argument(f"--{name}", nargs="?", metavar="VALUE", help=argparse.SUPPRESS if first else reason)
    return parser


def _add_option(section: Any, f: Any, default: Any, hidden: bool) -> None:
    """Add the flags of an option. :param default: as --help shows it."""
    bare = f.metadata["bare"]
    extra: dict[str, Any] = {"nargs": "?", "const": bare} if bare else {}
    if f.metadata["choices"] or bare:
        extra["metavar"] = "|".join(f.metadata["choices"] or ("True", "False"))
    shown_default = "empty" if default == "" else default
    text = f"{f.metadata['help']} (default: {shown_default})".replace("%", "%%")
    section.add_argument(f"--{f.name}", help=argparse.SUPPRESS if hidden else text, **extra)
    for name, convert in f.metadata["flags"].items():
        section.add_argument(f"--{name}", dest=f.name, type=_reporting(convert), help=argparse.SUPPRESS)


def _reporting(convert: Callable[[str], str]) -> Callable[[str], str]:
    """What converts a flag's value, with its own words for a wrong one in argparse's error."""

    def converted(value: str) -> str:
        try:
            return convert(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(value)}: {error}") from None

    return converted


def _from_file(path: str, kind: type[Settings], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a file. Raises UserError, naming the file, for values that cannot be and no flag replaces."""
    options, known = _options_in(path, kind), kind.options()
    with naming(f"--config {path}"):
        for name in options.keys() - flags.keys():
            checked_value(known[name], options[name])
    return options


def _options_in(path: str, kind: type[Settings]) -> dict[str, Any]:
    """The options in a file, or in a run's config.json, whose options of other commands are left out."""
    known = kind.options()
    is_yaml = path.lower().endswith((".yaml", ".yml"))
    content = _read_yaml(path) if is_yaml else files.read_json(path)
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        return {key: value for key, value in content["config"].items() if key in known}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold names and values, such as lr: 0.0001")
    for key, value in content.items():
        if key not in known and isinstance(value, dict):
            raise UserError(
                f"--config {path}: {shown(key)} holds further names, but options have no groups: move them to the top "
                f"level and remove {shown(key)}"
            )
        if key not in known:
            raise unknown_option(f"option in {path}", str(key), known)
    return content


def _read_yaml(path: str) -> Any:
    """The content of a YAML file, of whose values each is the text that a flag would have, or a list of them."""
    try:
        import yaml
    except ImportError:
        raise UserError("--config with YAML needs the package pyyaml: pip install pyyaml, or write JSON") from None

    class TextLoader(yaml.BaseLoader):
        """Leaves values as they are spelt: yes, 1e-4, 48x64 and 2024-01-01 are read as on the command line."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not supported: write the value itself")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if (name := repeated(names)) is not None:
                raise yaml.YAMLError(f"{shown(name)} stands there twice")
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
            return None if is_null else super().construct_scalar(node)

    try:
        return yaml.load(files.read_bytes(path, MAX_YAML_BYTES).decode("utf-8-sig"), Loader=TextLoader)
    except UnicodeDecodeError:
        raise UserError(f"--config {path} cannot be read: it is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"--config {path} cannot be read: it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None


def _stray_word(word: str, argv: Sequence[str], known: Mapping[str, Any], first: Sequence[str]) -> UserError:
    """The error for a word of the command line that is neither a flag nor the value of one."""
    flag, values = _flag_before(word, argv)
    f = known.get(flag.removeprefix("--"))
    if f is not None and isinstance(f.default, str) and not f.metadata["choices"]:
        _check_quotes(values)
        return UserError(
            f"unexpected argument {shown(word)} after {flag} {values[0]}: separate several values by commas "
            f"({flag} {','.join(values)}) and put a value with blanks in quotes"
        )
    example = f"did you mean --{first[0]} {word}?" if first else "such as --batch_size 4"
    return UserError(f"unexpected argument {shown(word)}: every option is a flag; {example}")


def _flag_before(word: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """(the flag that stands before a word that is not its value, all words between it and the next flag)."""
    flag, values = "", []
    for each in [*argv, "--"]:
        if not each.startswith("--"):
            values.append(each)
            continue
        if word in (values[1:] if flag else values):
            break
        flag, equals, value = each.partition("=")
        values = [value] if equals else []
    return flag, values


def _check_quotes(words: Sequence[str]) -> None:
    """Raise UserError for words that are the parts of a path with blanks, and no paths themselves."""
    path = " ".join(words)
    if os.path.exists(path) and not all(map(os.path.exists, words)):
        raise UserError(f'{path} exists, but blanks separate arguments: put it in quotes, "{path}"')


def split_lists(argv: Sequence[str], lists: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """({name: value} of the listed options, the command line with them) for each combination of their values.

    :param lists: the options that may have several values, separated by commas.
    """
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


def program_name() -> str:
    """The name of the running program, for usage lines."""
    name = os.path.basename(sys.argv[0])
    return "python -m improved_diffusion" if name == "__main__.py" else name
