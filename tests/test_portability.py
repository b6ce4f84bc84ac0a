"""Modules can be imported where the operating system lacks what only Unix has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "improved_diffusion"

# Windows has none of these. Other packages are imported first: they look at the real operating system.
WITHOUT_UNIX = """
import json, importlib, logging, multiprocessing, os, random, signal, sys
import gradio, numpy, PIL.Image, torch, torch.distributed, torch.nn.parallel, torch.utils.data, uvicorn
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, name in ((signal, "SIGUSR1"), (os, "register_at_fork"), (os, "sysconf"), (os, "getuid")):
    delattr(module, name)
problems = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        problems[name] = f"{type(error).__name__}: {error}"
print(json.dumps(problems))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


@pytest.fixture(scope="module")
def problems():
    """Why modules cannot be imported, by name."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-c", WITHOUT_UNIX, *MODULES]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_nothing_that_only_unix_has(module, problems):
    assert module not in problems, problems[module]
