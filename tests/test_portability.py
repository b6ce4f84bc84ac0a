"""Every module can be imported on systems without what only Unix has."""

import subprocess
import sys

from helpers import ROOT

# Guarded by the training loop's rewrite.
UNGUARDED = ("training",)

PROGRAM = """
import os, pkgutil, signal, sys, traceback
import numpy, PIL.Image, torch, torch.distributed, torch.utils.data, torch.nn.parallel  # these guard themselves

for name in ("resource", "fcntl"):
    sys.modules[name] = None  # importing it raises ImportError
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
for name in ("register_at_fork", "fork", "pread", "sysconf", "statvfs", "geteuid"):
    delattr(os, name)

import improved_diffusion
for module in pkgutil.walk_packages(improved_diffusion.__path__, "improved_diffusion."):
    if module.name.endswith("__main__"):
        continue
    try:
        __import__(module.name)
    except Exception:
        frames = traceback.extract_tb(sys.exc_info()[2])
        ours = [frame.filename for frame in frames if "improved_diffusion" in frame.filename]
        print(module.name, ours[-1].rpartition("improved_diffusion/")[2], sys.exc_info()[1], sep="|")
print("done")
"""


def test_modules_import_without_resource_fcntl_sigusr1_and_fork():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    *failures, last = done.stdout.splitlines()
    assert last == "done", done.stderr
    assert [line for line in failures if not line.split("|")[1].startswith(UNGUARDED)] == []
