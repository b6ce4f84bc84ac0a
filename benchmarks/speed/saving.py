"""Saving the weights with their description, and loading them: ours checks what it reads and replaces files at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th

from improved_diffusion.checkpoints import checkpoint

from .context import Context
from .ways import Way


def run(context: Context) -> None:
    """Report saving and loading of each network."""
    context.report.begin("saving", "a checkpoint of the weights, in a temporary folder")
    chosen = {workload.source: workload for workload in context.workloads()}
    for number, workload in enumerate(chosen.values()):
        state_dict = workload.model().state_dict()
        clock = context.clock.part(1 / (len(chosen) - number))
        with tempfile.TemporaryDirectory() as folder:
            for what, part, ways in (("save", 0.5, _saving), ("load", 1.0, _loading)):
                found = context.ways(ways(Path(folder), state_dict))
                context.compare(found, clock.part(part), workload=f"{what} {workload.source}")


def _saving(folder: Path, state_dict: dict[str, th.Tensor]) -> list[Way]:
    def ours(name: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: checkpoint.save_state_dict(state_dict, str(folder / name), {"step": 1})

    return [
        Way("published, torch.save", lambda: lambda: th.save(state_dict, folder / "theirs.pt"), 1),
        Way("ours .pt", ours("ours.pt"), 1),
        Way("ours .safetensors", ours("ours.safetensors"), 1),
    ]


def _loading(folder: Path, state_dict: dict[str, th.Tensor]) -> list[Way]:
    return [
        Way("published, torch.load", lambda: lambda: th.load(folder / "theirs.pt", map_location="cpu"), 1),
        Way("ours .pt", lambda: lambda: checkpoint.load(str(folder / "ours.pt")), 1),
        Way("ours .safetensors", lambda: lambda: checkpoint.load(str(folder / "ours.safetensors")), 1),
    ]
