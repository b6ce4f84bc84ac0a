"""How long commands take to start, and the demo to make its first step; in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .context import Context
from .ways import Way
from .workloads import DEMO

COMMANDS = {
    "python, import torch": ["-c", "import torch"],
    "import improved_diffusion": ["-c", "import improved_diffusion"],
    "--help": ["-m", "improved_diffusion", "--help"],
    "sample --help": ["-m", "improved_diffusion", "sample", "--help"],
    "train --help": ["-m", "improved_diffusion", "train", "--help"],
    "diffusers, import UNet2DModel": ["-c", "from diffusers import UNet2DModel"],
}


def run(context: Context) -> None:
    """Report the commands, and the demo's first step."""
    context.report.begin("startup", "commands, each in a new process with warm files")
    with tempfile.TemporaryDirectory() as scratch:
        digits = Path(scratch) / "digits"
        digits.mkdir()
        rng = np.random.default_rng(0)
        for i in range(100):
            array = rng.integers(256, size=(16, 16), dtype=np.uint8)
            Image.fromarray(array).save(digits / f"{i % 10}_{i:03d}.png")
        first = ["-m", "improved_diffusion", "train", "--config", str(DEMO), "--data_dir", str(digits), "--max_steps"]
        first += ["1", "--out_dir", str(Path(scratch) / "run"), "--sample_interval", "0"]
        commands = {**COMMANDS, "train, the demo's first step": first}
        if context.quick:
            commands = {"python": ["-c", "pass"]}
        ways = [Way(name, _process(argv), 1, memory=False) for name, argv in commands.items()]
        context.compare(context.ways(ways), context.clock)


def _process(argv: Sequence[str]) -> Callable[[], Callable[[], Any]]:
    command = [sys.executable, *argv]
    quiet: dict[str, Any] = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return lambda: lambda: subprocess.run(command, cwd=DEMO.parents[1], **quiet)
