"""The published helpers for command lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import str2bool


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag for each entry, of its value's type; None makes a string, True and False a str2bool."""
    for name, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The given attributes of parsed arguments."""
    return {key: getattr(args, key) for key in keys}
