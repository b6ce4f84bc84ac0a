"""ONNX: a graph that onnxruntime and others run without torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch as th

from ..checkpoints.checkpoint import METADATA_KEY
from ..checkpoints.loading import LoadedModel
from ..config import UserError
from ..config.exchange import ExportConfig
from ..logs import logger
from . import graph

OLDEST_TORCH = (2, 11)  # the oldest that was tested; 2.6 gives graphs that take the example's batch size only
LARGEST_FILE = 3 * 2**29  # bytes of weights; protobuf's limit is 2 GiB with all the rest


def write(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """Write the network to an .onnx file, checked by onnxruntime, where it is installed, first.

    The weights of a large network are in a second file beside it, named as it with .data at the end.
    """
    _require_packages()
    with graph.staged_file(options.out, ".onnx") as path:
        network = graph.plain_network(loaded)
        program = _translate(graph.capture(network, loaded, options), options.dynamic_batch)
        program.model.metadata_props[METADATA_KEY] = graph.describe(loaded)
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        program.save(path, external_data=size > LARGEST_FILE)
        if size > LARGEST_FILE:
            logger.log(f"{options.out}: the weights are in {path.name}.data beside it, which it needs")
        logger.log(f"{options.out}: opset {program.model.opset_imports['']}, by torch {th.__version__}")
        if find_spec("onnxruntime") is None:
            logger.warn(f"{options.out} was not checked, which needs onnxruntime: pip install onnxruntime")
        else:
            graph.check("onnxruntime", _Session(path), network, loaded, options)
    return graph.lost(loaded, options)


def _require_packages() -> None:
    """Raise UserError where a package is missing, or torch too old."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install 'improved_diffusion[onnx]'")
    if tuple(map(int, th.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise UserError(f"--to onnx needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {th.__version__}")


def _translate(program: th.export.ExportedProgram, dynamic_batch: bool) -> Any:
    """The ONNXProgram of a graph, its inputs and its output named."""
    shapes = {name: {0: "batch"} for name in program.graph_signature.user_inputs} if dynamic_batch else None
    with _quiet():
        translated: Any = th.onnx.export(
            program, dynamo=True, dynamic_shapes=shapes, output_names=[graph.OUTPUT], verbose=False
        )
    for node in translated.model.graph:
        node.metadata_props.clear()  # where in the source, on this machine, each operation is
    return translated


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: no torchvision, deprecated code of its own, one batch size for all inputs."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.filterwarnings("ignore", ".*axis name: batch will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)


class _Session:
    """A graph, run by onnxruntime on the CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: graph.Inputs) -> th.Tensor:
        (output,) = self.session.run([graph.OUTPUT], {name: value.numpy() for name, value in inputs.items()})
        return th.from_numpy(output)
