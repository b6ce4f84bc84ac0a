"""Config <-> command line: flags, --config files and presets to options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from . import files
from .config import UserError, str2bool, unknown_name
from .presets import PRESETS, preset_options


class _Parser(argparse.ArgumentParser):
    """Errors like all our others: one message, and the nearest flag where one is misspelt."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


def parse_options(groups: Sequence[type], description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the given groups from the command line, as a namespace.

    Flags win over --config, which wins over --preset, which wins over the defaults. `given` holds the names that were
    not left at their defaults, `flags` those that came as flags. Raises UserError for a wrong name or value.
    """
    known = {f.name: f for group in groups for f in fields(group)}
    if "large_size" in known:
        del known["image_size"]  # super-resolution has two sizes instead
    parser = _Parser(
        usage="%(prog)s [--flag value ...]",
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
