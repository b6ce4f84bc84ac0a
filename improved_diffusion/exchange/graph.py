"""A network as a graph of tensor operations: what is captured, what its file says of itself, and how it is checked.

The graph takes x [N, C, H, W] and timesteps [N] float32 as the network sees them, a class-conditional one also y [N]
int64, in which NULL_LABEL hides the class, and a super-resolution one low_res [N, C, h, w]. It gives the network's
output [N, C or 2C, H, W].
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..checkpoints.loading import LoadedModel
from ..config import UserError, height_width
from ..config.exchange import ExportConfig
from ..gaussian_diffusion import ModelMeanType, ModelVarType
from ..logs import logger
from ..nn import NULL_LABEL
from ..utils import files

POSITIONAL = ("x", "timesteps")  # as the diffusion calls the network; the other inputs have names
OUTPUT = "output"
TOLERANCE = 1e-4  # of the output's largest value
LARGEST_BATCH = 2**20  # torch 2.6 does not capture a batch without a largest size
CHECKED_BATCHES = (1, 3)  # of a graph that takes any number of images

_PREDICTIONS = {ModelMeanType.EPSILON: "noise", ModelMeanType.START_X: "x0", ModelMeanType.VELOCITY: "v"}
_VARIANCES = {
    ModelVarType.LEARNED_RANGE: "learned_range",
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.FIXED_SMALL: "fixed_small",
}

Inputs = dict[str, th.Tensor]


@contextmanager
def staged_file(out: str, suffix: str) -> Iterator[Path]:
    """Where to write a file that appears as `out` when the block ends. Raises UserError where it cannot be."""
    if not out.endswith(suffix):
        raise UserError(f"--out {out}: the file's name must end in {suffix}")
    with files.staging(out) as folder:
        yield folder / Path(out).name


def capture(network: th.nn.Module, loaded: LoadedModel, options: ExportConfig) -> ExportedProgram:
    """The graph of a network that `plain_network` gave, by torch.export."""
    inputs = _inputs(loaded, 2 if options.dynamic_batch else options.export_batch)
    shapes = {name: {0: Dim("batch", max=LARGEST_BATCH)} for name in inputs} if options.dynamic_batch else None
    args, named = _split(inputs)
    program = th.export.export(network, args, named, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def plain_network(loaded: LoadedModel) -> th.nn.Module:
    """A copy of the network that computes in float32 on the CPU, without gradient checkpointing."""
    network = copy.deepcopy(loaded.model).cpu().float().eval().requires_grad_(False)
    for module in network.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = False  # type: ignore[assignment]
    return _Network(network)


class _Network(th.nn.Module):
    """A network, each of whose inputs has a name: torch.export knows none of **kwargs."""

    def __init__(self, network: th.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x, timesteps, low_res=None, y=None):
        named = {"low_res": low_res, "y": y}
        return self.network(x, timesteps, **{name: value for name, value in named.items() if value is not None})


def describe(loaded: LoadedModel) -> str:
    """What a file says of its graph, as JSON: all that sampling needs, and the checkpoint's description.

    {"betas": [T numbers], "prediction": "noise" | "x0" | "v",
     "variance": "learned_range" | "fixed_large" | "fixed_small", "timestep_scale": what the timestep is multiplied by,
     "num_classes": 0 for none, "class_names": [...] | null, "hidden_class": the y that hides the class, or null
     where training hid none,
     "shape": [C, H, W] of an image, "low_res_shape": [C, h, w] | null, "version": ..., "checkpoint": {...}}
    """
    model, diffusion = loaded.settings.model, loaded.diffusion  # type: ignore[attr-defined]
    classes = _num_classes(loaded)
    low_res = _shape(model.channels, model.small_size) if model.kind == "super_res" else None
    return json.dumps({
        "betas": diffusion.base_betas.tolist(),
        "prediction": _PREDICTIONS[diffusion.model_mean_type],
        "variance": _VARIANCES[diffusion.model_var_type],
        "timestep_scale": diffusion.network_timestep(1.0),
        "num_classes": classes,
        "class_names": loaded.metadata.get("class_names"),
        "hidden_class": NULL_LABEL if classes and loaded.metadata.get("config", {}).get("label_drop") else None,
        "shape": _shape(model.channels, model.size),
        "low_res_shape": low_res,
        "version": __version__,
        "checkpoint": loaded.description(),
    })  # fmt: skip


def lost(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """What a graph does not hold of a model, one line each."""
    shape = "x".join(map(str, _shape(loaded.settings.model.channels, loaded.settings.model.size)))  # type: ignore[attr-defined]
    count = "any number of images" if options.dynamic_batch else f"{options.export_batch} at a time"
    return [f"other sizes of images: the graph takes {shape}, {count}", "what training needs, such as dropout"]


@th.no_grad()
def call(network: Callable[..., th.Tensor], inputs: Mapping[str, th.Tensor]) -> th.Tensor:
    """The output of a network, called as the diffusion calls it."""
    args, named = _split(inputs)
    return network(*args, **named)


def check(
    name: str, run: Callable[[Inputs], th.Tensor], network: th.nn.Module, loaded: LoadedModel, options: ExportConfig
) -> None:
    """Log how far a graph is from its network. Raises UserError where that is more than TOLERANCE of the output.

    :param name: the package that runs the graph.
    :param run: gives the graph's output.
    """
    sizes = CHECKED_BATCHES if options.dynamic_batch else (options.export_batch,) * -(-4 // options.export_batch)
    differences, largest = [], []
    for inputs in _samples(loaded, sizes):
        expected = call(network, inputs)
        differences.append((run(inputs) - expected).abs().max())
        largest.append(expected.abs().max())
    difference, scale = float(th.stack(differences).max()), float(th.stack(largest).max())
    measured = f"the graph differs from the network by at most {difference:.2g}, where outputs reach {scale:.2g}"
    if not difference <= TOLERANCE * scale:
        raise UserError(f"{measured}, when {name} runs it: nothing was written; try other versions of torch and {name}")
    logger.log(f"checked with {name}: {measured} (batches of {' and '.join(map(str, dict.fromkeys(sizes)))})")


def _split(inputs: Mapping[str, th.Tensor]) -> tuple[tuple[th.Tensor, ...], Inputs]:
    """(the positional inputs, the others by name)."""
    args = tuple(inputs[name] for name in POSITIONAL)
    return args, {name: value for name, value in inputs.items() if name not in POSITIONAL}


def _num_classes(loaded: LoadedModel) -> int:
    """The classes that the network takes, 0 for none."""
    network: Any = loaded.model
    return network.num_classes or 0


def _shape(channels: int, size: Any) -> list[int]:
    return [channels, *height_width(size)]


def _inputs(loaded: LoadedModel, count: int) -> Inputs:
    """The inputs of a network for `count` images, all zeros."""
    model = loaded.settings.model  # type: ignore[attr-defined]
    inputs = {"x": th.zeros(count, *_shape(model.channels, model.size)), "timesteps": th.zeros(count)}
    if model.kind == "super_res":
        inputs["low_res"] = th.zeros(count, *_shape(model.channels, model.small_size))
    if _num_classes(loaded):
        inputs["y"] = th.zeros(count, dtype=th.int64)
    return inputs


def _samples(loaded: LoadedModel, sizes: tuple[int, ...]) -> Iterator[Inputs]:
    """Inputs in batches of these sizes: noise, at timesteps from the first to the last, with classes and without."""
    generator = th.Generator().manual_seed(0)
    last = loaded.diffusion.original_num_steps - 1
    timesteps = [loaded.diffusion.network_timestep(t) for t in (last, 0, last / 3, last / 1.5)]
    classes = [0, NULL_LABEL, _num_classes(loaded) - 1, NULL_LABEL]
    start = 0
    for size in sizes:
        rows = [i % 4 for i in range(start, start + size)]
        inputs = _inputs(loaded, size)
        for name in inputs.keys() & {"x", "low_res"}:
            inputs[name].normal_(generator=generator)
        inputs["timesteps"] = th.tensor([timesteps[row] for row in rows])
        if "y" in inputs:
            inputs["y"] = th.tensor([classes[row] for row in rows])
        yield inputs
        start += size
