"""State dicts as other programs save them: inside a wrapper, beside others, or under longer names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch as th

from ..config import UserError, unknown_name
from ..config.messages import naming
from ..models.architecture import is_encoder

# Where programs keep the weights in a wrapper.
_WRAPPED = (
    "state_dict", "model_state_dict", "model", "net", "network", "unet", "denoiser", "diffusion", "module", "params",
    "weights",
)  # fmt: skip
_AVERAGE = re.compile(r"(?<![a-z])(emas?|averaged?|avg|swa|shadow)(?![a-z])")  # in a key or a prefix
_COUNTERS = ("initted", "n_averaged", "num_updates")  # ema-pytorch's, AveragedModel's, LitEma's: 0 before it begins
_DEEPEST = 4  # wrappers inside each other
_PARALLEL = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel, torch.compile
_FIRST = "time_embed.0.weight"  # a name that every network of ours has
_SHOWN = 8
MAX_NETWORKS = 64  # in a file; the time to find them grows with their number times that of the tensors


@dataclass(frozen=True)
class Network:
    """A network in what a checkpoint file holds.

    :param where: its keys and the prefix of its names; "" where the file is its state dict.
    :param rank: 0 for a moving average, 2 for one that has not begun, 1 for other weights.
    :param beside: all names in the state dict that it comes from.
    """

    where: str
    state_dict: dict[str, th.Tensor]
    rank: int
    beside: Iterable[str]


def unwrap(
    content: Any, path: str, network: str = "", names: Collection[str] = (), classifier: bool = False
) -> tuple[dict[str, th.Tensor], str]:
    """(the state dict in what a checkpoint file holds, a line on what was done to find it or "").

    :param network: where it is, of several, or the key of a wrapper; a moving average unless given.
    :param names: of the tensors of the model that it is for, where that is known: content with them is its state dict.
    :param classifier: prefer a classifier to a U-Net.
    Raises UserError, naming what the file holds, where there is none, and for a network of latents.
    """
    if names and isinstance(content, dict) and content.keys() == set(names):
        return content, ""
    with naming(path):
        found = networks(content, network, classifier)
    if not found:
        remedy = "give a modelNNNNNN.pt or an ema_*.pt"
        if isinstance(content, Mapping) and any(isinstance(value, Mapping) for value in content.values()):
            remedy += ", or write the weights under one of its keys to a file: improved-diffusion convert --network KEY"
        raise UserError(f"{path} is not a model's state dict: {_shown(content)}; {remedy}")
    by_name = {each.where: each for each in found}
    inside = [each for each in found if each.where.startswith(f"{network}/")]
    if network and network not in by_name and not inside:
        raise unknown_name(f"network in {path}", network, by_name)
    chosen = by_name.get(network, (inside or found)[0]) if network else found[0]
    if any(re.search(_LATENTS, name) for name in chosen.beside):
        refuse_foreign(chosen.beside, path)
    others = [where for where in by_name if where != chosen.where]
    note = f"{path}: read the weights under {chosen.where!a}" if chosen.where else ""
    note += ", a moving average" if note and chosen.rank == 0 else ""
    if others:
        note = note or f"{path}: read the weights"
        note += f"; it also holds {_listed(others)}: improved-diffusion convert --network writes another one to a file"
    unread = [where for where, _, _ in _nameless_averages(content, (), network) if where not in by_name]
    if unread:
        note = note or f"{path}: read the weights"
        note += f"; it also holds an average as a list without names, which cannot be read: {_listed(unread)}"
    return chosen.state_dict, note


def networks(content: Any, wanted: str = "", classifier: bool = False) -> list[Network]:
    """Every network in what a checkpoint file holds, the one to prefer first: of ours, of its kind, a moving average.

    :param wanted: keys to search beside those of known wrappers, with "/" between them.
    :param classifier: prefer classifiers to U-Nets.
    Raises UserError for more than MAX_NETWORKS.
    """
    found = list(islice(_search(content, (), wanted), MAX_NETWORKS + 1))
    _bound(found)
    ours = [network for network in found if is_ours(network.state_dict)] or found
    for where, tensors, rank in _nameless_averages(content, (), wanted):
        ours += [_named(where, tensors, rank, of) for of in ours if of.rank == 1 and _are_alike(tensors, of)][:1]
        _bound(ours)
    return sorted(ours, key=lambda network: (is_encoder(network.state_dict) != classifier, network.rank))


def _bound(found: Sized) -> None:
    if len(found) > MAX_NETWORKS:
        raise UserError(
            f"it holds more than {MAX_NETWORKS} networks: write the weights of one of them to a file with torch.save"
        )


def _search(content: Any, keys: tuple[str, ...], wanted: str) -> Iterator[Network]:
    """The networks under the keys of wrappers, in the order of the wrappers and the lengths of their prefixes."""
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST:
        return
    tensors = OrderedDict((n, t) for n, t in content.items() if isinstance(n, str) and isinstance(t, th.Tensor))
    found = _by_prefix(tensors)
    if not found and tensors and len(tensors) == len(content):  # some other module
        prefix = _parallel_prefix(tensors)
        found = {prefix: _without(tensors, prefix)}
    for prefix, state_dict in found.items():
        where = "/".join((*keys, prefix) if prefix else keys)
        if hasattr(content, "_metadata"):
            state_dict._metadata = content._metadata  # type: ignore[attr-defined]
        is_average = _AVERAGE.search(where.lower()) and "online" not in where
        rank = (0 if _has_begun(tensors, prefix) else 2) if is_average else 1
        yield Network(where, state_dict, rank, tensors)
    for inner in _wrappers(content, keys, wanted):
        yield from _search(content[inner[-1]], inner, wanted)


def _wrappers(content: Mapping[Any, Any], keys: tuple[str, ...], wanted: str) -> list[tuple[str, ...]]:
    """The keys of what may hold networks: averages, known wrappers, and what leads to the wanted one."""
    names = [key for key in content if isinstance(key, str)]
    averages = [key for key in names if _AVERAGE.search(key.lower())]
    leading = [key for key in names if f"{wanted}/".startswith("/".join((*keys, key)) + "/")]
    return [(*keys, key) for key in dict.fromkeys([*averages, *_WRAPPED, *leading]) if key in content]


def _nameless_averages(
    content: Any, keys: tuple[str, ...], wanted: str
) -> Iterator[tuple[str, Sequence[th.Tensor], int]]:
    """(keys, tensors, rank) of averages that are lists in the order of the parameters, such as torch_ema's."""
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST:
        return
    for inner in _wrappers(content, keys, wanted):
        value, where = content[inner[-1]], "/".join(inner)
        if not isinstance(value, (list, tuple)):
            yield from _nameless_averages(value, inner, wanted)
        elif value and all(isinstance(item, th.Tensor) for item in value) and _AVERAGE.search(where.lower()):
            updates = content.get("num_updates")
            yield where, value, 2 if isinstance(updates, int) and updates == 0 else 0


def _are_alike(tensors: Sequence[th.Tensor], network: Network) -> bool:
    if len(tensors) != len(network.state_dict):
        return False
    return [tensor.shape for tensor in tensors] == [tensor.shape for tensor in network.state_dict.values()]


def _named(where: str, tensors: Sequence[th.Tensor], rank: int, network: Network) -> Network:
    """A nameless average, with the names and the description of the network that it is of."""
    state_dict = OrderedDict(zip(network.state_dict, tensors, strict=True))
    if hasattr(network.state_dict, "_metadata"):
        state_dict._metadata = network.state_dict._metadata  # type: ignore[attr-defined]
    return Network(where, state_dict, rank, network.beside)


def _by_prefix(tensors: Mapping[str, th.Tensor]) -> dict[str, OrderedDict[str, th.Tensor]]:
    """The networks of ours in one state dict, each with its own names, by the prefix that stands before them."""
    prefixes = [name.removesuffix(_FIRST) for name in tensors if name.endswith(_FIRST)]
    prefixes = sorted((p for p in prefixes if not p or p.endswith(".")), key=len)
    _bound(prefixes)
    found = {prefix: _without(tensors, prefix, prefixes) for prefix in prefixes}
    return found | _without_dots(tensors, found)


def _without(
    tensors: Mapping[str, th.Tensor], prefix: str, prefixes: Iterable[str] = ()
) -> OrderedDict[str, th.Tensor]:
    """The tensors under a prefix, without it; those under longer ones of the prefixes are left out."""
    longer = tuple(p for p in prefixes if len(p) > len(prefix) and p.startswith(prefix))
    return OrderedDict(
        (name.removeprefix(prefix), tensor)
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(longer)
    )


def _without_dots(
    tensors: Mapping[str, th.Tensor], found: Mapping[str, Mapping[str, th.Tensor]]
) -> dict[str, OrderedDict[str, th.Tensor]]:
    """Averages under names without dots, as latent-diffusion's LitEma keeps them beside the networks found."""
    first = _FIRST.replace(".", "")
    averages: dict[str, OrderedDict[str, th.Tensor]] = {}
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)] if found else []
    _bound(prefixes)
    for prefix in prefixes:
        for network in found.values():
            names = {name: prefix + name.replace(".", "") for name in network}
            if tensors.keys() >= set(names.values()):
                averages[prefix] = OrderedDict((name, tensors[long]) for name, long in names.items())
    return averages


def _has_begun(tensors: Mapping[str, th.Tensor], prefix: str) -> bool:
    """Whether an average has taken in any weights, by the counters beside it."""
    return all(
        bool(tensor.any())
        for name, tensor in tensors.items()
        if (at := name.rfind(".") + 1) <= len(prefix) and name[at:] in _COUNTERS and prefix.startswith(name[:at])
    )


def _parallel_prefix(names: Mapping[str, Any]) -> str:
    """What all names begin with, of the prefixes that wrappers of a module put before them."""
    prefix = ""
    while names and (more := next((p for p in _PARALLEL if all(n.startswith(prefix + p) for n in names)), "")):
        prefix += more
    return prefix


def _listed(names: Iterable[str]) -> str:
    shown = [f"{name[:80]!a}" for name in names]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


def _shown(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    keys = [str(key) for key in content]
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"it holds {', '.join(key[:40] for key in keys[:_SHOWN])}{more}" if keys else "it holds no tensors"


# Networks that are not ours

_THEIRS = "sample from it with the code that made it"
# (pattern of a name, what has such names, what to do)
_LATENTS = r"(^|\.)(first|cond)_stage_model\.|\.transformer_blocks\.\d+\.attn2\."
_FOREIGN = (
    (
        _LATENTS,
        "a latent diffusion model such as Stable Diffusion, which draws latents of an autoencoder, not pixels",
        "use it with the package diffusers",
    ),
    (r"^(encoder|decoder)\.(down|up|mid)(_blocks)?\.|^quant_conv\.", "an autoencoder of latent diffusion", _THEIRS),
    (r"\.encoder_kv\.", "a U-Net of GLIDE, which needs text", _THEIRS),
    (r"\.lora_(A|B|up|down)\.|^lora_", "a LoRA, which changes another network", "use it with the package diffusers"),
    (
        r"(^|\.)down_blocks\.\d+\.(resnets|attentions)\.",
        "a network of diffusers",
        "give the folder of its pipeline, not the file in it",
    ),
    (
        r"(^|\.)(init_conv\.weight$|downs\.\d+\.\d+\.)",
        "the U-Net of denoising-diffusion-pytorch, which is another one than this package's",
        _THEIRS,
    ),
    (
        r"(^|\.)temb\.dense\.\d+\.",
        "a U-Net of DDPM or DDIM, in the names of pytorch_diffusion",
        "use its form for diffusers, such as the folder of google/ddpm-cifar10-32",
    ),
    (
        r"(^|/)(conv_in|conv_out|temb|down_\d+|mid|up_\d+)/",
        "a network of TensorFlow, such as the U-Net of DDPM",
        "use its form for diffusers, such as the folder of google/ddpm-cifar10-32",
    ),
    (r"(^|\.)(enc|dec)\.\d+x\d+_", "a network of EDM or EDM2", _THEIRS),
    (r"(^|\.)all_modules\.\d+\.", "a network of score_sde", _THEIRS),
    (r"\.adaLN_modulation\.", "a diffusion transformer (DiT)", _THEIRS),
    (r"(^|\.)layer1\.0\.conv1\.weight$", "a ResNet", "train a classifier of noisy images with classifier-train"),
)


def is_ours(names: Container[str]) -> bool:
    """Whether a state dict has the names of a network of this package."""
    return _FIRST in names


def refuse_foreign(names: Iterable[str], path: str) -> None:
    """Raise UserError for the names of a network of another program, where it is known."""
    text = "\n".join(names)
    for pattern, what, remedy in _FOREIGN:
        if re.search(pattern, text, re.MULTILINE):
            raise UserError(f"{path} is {what}: {remedy}")
