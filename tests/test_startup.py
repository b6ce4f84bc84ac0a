"""What is imported, and what is not: torch takes seconds, and so does its compiler."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT
from script_helpers import environment, write_images

from improved_diffusion.cli.main import COMMANDS

HEAVY = ("torch", "numpy", "matplotlib", "PIL", "mpi4py", "yaml", "tqdm", "filelock")
ANSWERS = """
import contextlib, io, sys
from improved_diffusion.cli.main import COMMANDS, dispatch
from improved_diffusion.config import UserError
lines = [[], ["--version"]]
for name in COMMANDS:
    lines += [[name, "--help"], [name, "--help-all"], [name, "--nonsense"]]
lines += [["edit", name, "--help"] for name in ("encode", "decode", "interpolate", "inpaint", "variations")]
lines += [["evaluate", name, "--help"] for name in ("score", "reference", "sweep", "compare")]
lines += [["sample", "--num_samples", "0"], ["train", "photos", "--preset", "nonsense"], ["sampel"]]
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    for words in lines:
        with contextlib.suppress(UserError, SystemExit):
            dispatch(words)
assert shown.getvalue().count("usage: ") > len(COMMANDS)
print([name for name in sys.argv[1:] if name in sys.modules])
"""
RUN = """
import sys
import improved_diffusion as idf
tiny = dict(image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", num_workers=0)
tiny.update(diffusion_steps=4, noise_schedule="cosine", class_cond=True)
idf.train("photos", out_dir="run", batch_size=4, max_steps=1, **tiny)
idf.load("run").sample(2, progress=False)
print([name for name in sys.argv[1:] if name in sys.modules])
"""


def run(code, *args, cwd=ROOT):
    argv = [sys.executable, "-c", code, *args]
    return subprocess.run(argv, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def test_help_and_mistakes_in_flags_of_all_commands_import_nothing_large():
    done = run(ANSWERS, *HEAVY)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_training_and_sampling_import_neither_torchs_compiler_nor_what_nobody_asked_for(tmp_path):
    write_images(tmp_path / "photos", 8)
    unwanted = ["torch._dynamo", "torch._inductor", "sympy", "mpi4py", "tensorboard", "wandb", "blobfile", "pandas"]
    done = run(RUN, *unwanted, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr


@pytest.mark.parametrize("words", [["sample", "--help"], ["train", "--nonsense"]], ids=" ".join)
def test_a_process_of_its_own_answers_without_torch(words, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    argv = [sys.executable, "-m", "improved_diffusion", *words]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "torch was imported" not in done.stderr
    assert done.returncode == (0 if "--help" in words else 1) and words[0] in COMMANDS
