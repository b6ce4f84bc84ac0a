"""torch.export's format: a graph that torch runs without this package."""

from __future__ import annotations

import io
import warnings
from functools import partial

import torch as th

from ..checkpoints.checkpoint import METADATA_KEY
from ..checkpoints.loading import LoadedModel
from ..config.exchange import ExportConfig
from . import graph

DESCRIPTION = f"{METADATA_KEY}.json"  # the extra file with what graph.describe says


def write(loaded: LoadedModel, options: ExportConfig) -> list[str]:
    """Write the network to a .pt2 file, checked against the network first."""
    with graph.staged_file(options.out, ".pt2") as path:
        network = graph.plain_network(loaded)
        program = graph.capture(network, loaded, options)
        buffer = io.BytesIO()
        th.export.save(program, buffer, extra_files={DESCRIPTION: graph.describe(loaded)})
        buffer.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*buffer is not writable", UserWarning)  # torch 2.11 of its own bytes
            module = th.export.load(buffer).module()
        graph.check("torch", partial(graph.call, module), network, loaded, options)
        path.write_bytes(buffer.getbuffer())
    return graph.lost(loaded, options)
