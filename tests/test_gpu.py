"""What only a GPU can show. The other tests hide it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from script_helpers import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU"),
]
HERE = Path(__file__).resolve().parent


def run_on_gpu(script, *argv, cwd):
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    del env["CUDA_VISIBLE_DEVICES"]
    argv = [sys.executable, str(HERE / script), *argv]
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device_between_rows_of_the_log(precision, tmp_path):
    run_on_gpu("gpu_steps.py", precision, str(tmp_path), cwd=tmp_path)


@pytest.mark.parametrize("check", ["norms", "graphs", "layouts", "compiled", "sampling"])
def test_ways_to_run_a_network_agree(check, tmp_path):
    run_on_gpu("gpu_speed.py", check, str(tmp_path), cwd=tmp_path)
