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

OUT_DIR = "OUT_DIR"
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
        first += ["1", "--sample_interval", "0", "--out_dir", OUT_DIR]
        commands = {**COMMANDS, "train, the demo's first step": first}
        if context.quick:
            commands = {"python": ["-c", "pass"]}
        ways = [Way(name, _process(argv), 1, memory=False) for name, argv in commands.items()]
        context.compare(context.ways(ways), context.clock)


def _process(argv: Sequence[str]) -> Callable[[], Callable[[], Any]]:
    """Makes the call; in place of OUT_DIR stands a new folder each time."""

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *(word if word != OUT_DIR else folder for word in argv)]
            quiet: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            subprocess.run(command, check=True, cwd=DEMO.parents[1], **quiet)

    return lambda: call
