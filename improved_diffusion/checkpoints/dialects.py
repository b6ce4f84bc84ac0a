"""State dicts as other programs save them: inside a wrapper, or under longer names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th

from ..config import UserError

# Where programs keep the weights in a wrapper, the moving average first: it makes the better samples.
_WRAPPED = (
    "ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "state_dict", "model_state_dict", "model", "net",
    "network", "module", "params", "weights",
)  # fmt: skip
_DEEPEST = 4  # wrappers inside each other
_PARALLEL = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel, torch.compile
_FIRST = "time_embed.0.weight"  # a name that every network of ours has
_SHOWN = 8


def unwrap(content: Any, path: str) -> tuple[dict[str, th.Tensor], str]:
    """(the state dict in what a checkpoint file holds, a line on what was done to find it or "").

    Raises UserError, naming what the file holds, where there is none.
    """
    keys: list[str] = []
    state_dict = content
    while isinstance(state_dict, Mapping) and not _is_state_dict(state_dict) and len(keys) < _DEEPEST:
        key = next((key for key in _WRAPPED if isinstance(state_dict.get(key), Mapping) and state_dict[key]), None)
        if key is None:
            break
        keys.append(key)
        state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not _is_state_dict(state_dict):
        raise UserError(f"{path} is not a model's state dict: {_shown(content)}; give a modelNNNNNN.pt or an ema_*.pt")
    state_dict, prefix = _without_prefix(state_dict)
    notes = [f"the weights under {'/'.join(map(repr, keys))}"] if keys else []
    notes += [f"names without {prefix!r}"] if prefix else []
    return state_dict, f"{path}: read {', '.join(notes)}" if notes else ""


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, th.Tensor) for name, value in content.items())


def _without_prefix(state_dict: dict[str, th.Tensor]) -> tuple[dict[str, th.Tensor], str]:
    """(the state dict with the network's own names, the prefix that was taken off). Of several networks under prefixes,
    as Lightning saves them, a moving average comes first."""
    found = [name.removesuffix(_FIRST) for name in state_dict if name.endswith(_FIRST)]
    prefix = min(found, key=lambda prefix: ("ema" not in prefix, len(prefix)), default=_parallel_prefix(state_dict))
    if not prefix.endswith("."):
        return state_dict, ""
    own: Any = type(state_dict)((n.removeprefix(prefix), t) for n, t in state_dict.items() if n.startswith(prefix))
    if hasattr(state_dict, "_metadata"):
        own._metadata = state_dict._metadata
    return own, prefix


def _parallel_prefix(names: Mapping[str, Any]) -> str:
    """What all names begin with, of the prefixes that wrappers of a module put before them."""
    prefix = ""
    while names and (more := next((p for p in _PARALLEL if all(n.startswith(prefix + p) for n in names)), "")):
        prefix += more
    return prefix


def _shown(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    keys = [str(key) for key in content]
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"it holds {', '.join(key[:40] for key in keys[:_SHOWN])}{more}" if keys else "it is empty"
