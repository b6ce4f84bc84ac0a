"""Checkpoint files that describe themselves.

A checkpoint is a plain state dict. Its description is JSON in the state dict's `_metadata`, which torch keeps and other
code ignores: {"config": {...}, "class_names": [...], "step": n}. A .safetensors file has it in its own metadata.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch as th

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..utils import files, torch_files
from . import diffusers_folder, safetensors_file
from .description import KEY as METADATA_KEY
from .description import read_description
from .dialects import unwrap

_OTHER_FORMATS = {".onnx": "onnx", ".pt2": "exported-program"}  # suffix -> what writes such a file


def describe(state_dict: Mapping[str, th.Tensor], metadata: Mapping[str, Any]) -> dict[str, th.Tensor]:
    """A copy of the state dict in host memory, with its description."""
    described: Any = OrderedDict((name, tensor.detach().to("cpu", copy=True)) for name, tensor in state_dict.items())
    described._metadata = OrderedDict(getattr(state_dict, "_metadata", {}))
    described._metadata[METADATA_KEY] = {"json": json.dumps(metadata)}
    return described


def save_state_dict(state_dict: Mapping[str, th.Tensor], path: str, metadata: Mapping[str, Any]) -> None:
    """Write a state dict with its description, in the format that the path's suffix names: .safetensors, else .pt.

    Raises UserError if that fails; an old file is then unchanged.
    """
    if safetensors_file.has_suffix(path):
        files.write_bytes(path, safetensors_file.to_bytes(state_dict, metadata))
    else:
        save(describe(state_dict, metadata), path)


def require_file_name(path: str) -> None:
    """Raise UserError where `save_state_dict` would write a file that its path is not the name of."""
    if path.endswith(("/", os.sep)) or files.is_dir(path):
        raise UserError(f"--out {path} is a folder: name a file in it, such as {files.join(path, 'model.pt')}")
    for suffix, other in _OTHER_FORMATS.items():
        if path.lower().endswith(suffix):
            raise UserError(f"--out {path} is not the name of a file with weights, but of export --to {other}")


def to_bytes(obj: Any) -> memoryview:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    th.save(obj, buffer)
    return buffer.getbuffer()


def save(obj: Any, path: str) -> None:
    """torch.save in one step: after a crash or on a full disk the old file is unchanged."""
    files.write_bytes(path, to_bytes(obj))


def load(
    path: str, *, network: str = "", names: Collection[str] = (), classifier: bool = False, trust: bool = False
) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """(state dict on the CPU, its description, {} for a foreign file) of a .pt or .safetensors file. Collective.

    Weights in a wrapper, or under the longer names of wrapped modules, are found, and a line says so. Nothing in the
    file is executed.
    :param network: which of several networks in the file; an average unless given.
    :param names: of the tensors of the model that the file is for: one with just these is not searched for a network.
    :param classifier: of several networks, prefer a classifier to a U-Net.
    :param trust: leave out objects that are not plain, which are an error otherwise.
    Raises UserError for a missing, damaged or unsafe file, for other contents, for a description that
    no run writes, and for weights that are not finite numbers.
    """
    state_dict, note = unwrap(_read(path, trust), path, network, names, classifier)
    if note:
        logger.log(note)
    if diffusers_folder.is_weights(path):
        state_dict = diffusers_folder.convert(state_dict, path)
    check_finite(state_dict, path)
    return state_dict, _description(state_dict, path)


def read_outline(path: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """(the shape of each tensor, description) of a checkpoint; the tensors of a local file are not read. Collective.

    Raises UserError as `load` does, but not for numbers that are not finite.
    """
    if files.is_url(path):
        content = _read(path)
    elif safetensors_file.recognises(path):
        content = safetensors_file.read_outline(path)
    else:
        content = torch_files.load_mapped(path)
    state_dict, _ = unwrap(content, path)
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, _description(state_dict, path)


def _read(path: str, trust: bool = False) -> Any:
    """What a file of either format holds. Collective."""
    if distributed.from_rank0(safetensors_file.recognises, path):
        return safetensors_file.load(path)
    if trust:
        content, left_out = torch_files.load_tensors(io.BytesIO(distributed.read_bytes(path)), path)
        if left_out:
            logger.log(f"{path}: left out objects of other programs, whose code did not run: {left_out}")
        return content
    return distributed.load_state_dict(path, map_location="cpu")


def described_step(path: str) -> int | None:
    """The training steps that a checkpoint says it has, None where it says none or cannot be read. Not collective."""
    try:
        with files.open_read(path) as f:
            state_dict, _ = unwrap(torch_files.load(f, path, mapped=not files.is_url(path), map_location="cpu"), path)
        return _description(state_dict, path).get("step")
    except UserError:
        return None


def _description(state_dict: Mapping[str, th.Tensor], path: str) -> dict[str, Any]:
    kept = getattr(state_dict, "_metadata", {})
    entry = kept.get(METADATA_KEY, {"json": "{}"}) if isinstance(kept, dict) else None
    return read_description(entry.get("json") if isinstance(entry, dict) else None, path)


def check_finite(tensors: Mapping[str, th.Tensor], path: str) -> None:
    """Raise UserError for a tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path} has numbers in {name!a} that are not finite, so that it is damaged, or its training diverged: "
                "use an earlier checkpoint"
            )


def check_fits(model: th.nn.Module, state_dict: Mapping[str, th.Tensor], path: str) -> None:
    """Raise UserError, naming the first difference, unless the state dict has the model's tensors."""
    own = model.state_dict()
    for name in [*own, *state_dict]:
        if name not in state_dict or name not in own:
            where = "lacks" if name not in state_dict else "has, and the model lacks,"
            raise UserError(f"{path} does not fit the model: it {where} {name}: check the model's flags")
        if own[name].shape != state_dict[name].shape:
            raise UserError(
                f"{path} does not fit the model: {name} is {tuple(state_dict[name].shape)} there and "
                f"{tuple(own[name].shape)} in the model: check the model's flags"
            )
        if own[name].is_floating_point() != state_dict[name].is_floating_point():
            raise UserError(f"{path} does not fit the model: {name} is of {state_dict[name].dtype}: use another file")


def load_into(model: th.nn.Module, state_dict: Mapping[str, th.Tensor], path: str) -> None:
    """model.load_state_dict; raises UserError if the tensors do not fit."""
    check_fits(model, state_dict, path)
    model.load_state_dict(state_dict)


def parse_resume_step_from_filename(filename: str) -> int:
    """The step NNNNNN of a path that ends in modelNNNNNN.pt; 0 for another path."""
    match = re.search(r"model(\d+)(?:\.[^/]*)?$", str(filename))
    return int(match.group(1)) if match else 0


def model_name(step: int) -> str:
    """The file name of the parameters of a step."""
    return f"model{step:06d}.pt"


def ema_name(label: float | str, step: int) -> str:
    """The file name of a moving average of a step; the label is its rate or another name."""
    return f"ema_{label}_{step:06d}.pt"


def optimizer_name(step: int) -> str:
    """The file name of the optimizer's state of a step."""
    return f"opt{step:06d}.pt"


def model_steps(directory: str) -> list[int]:
    """The steps, in ascending order, whose model is in the folder."""
    if not files.is_dir(directory):
        return []
    matches = (re.fullmatch(r"model(\d+)\.pt", name) for name in files.list_dir(directory))
    return sorted(int(match.group(1)) for match in matches if match)


def find_in_set(main_checkpoint: str, name: str, what: str) -> str:
    """The path of another file of the same step as a modelNNNNNN.pt. Raises UserError if it is missing."""
    path = files.join(files.folder_of(main_checkpoint), name)
    if not files.exists(path):
        raise UserError(
            f"cannot resume from {main_checkpoint}: {what} {path} is missing; "
            "to start at step 0 from these weights alone, use --init_checkpoint"
        )
    return path
