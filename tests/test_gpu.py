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


def succeed(program, *args, cwd):
    """Run a program of this folder where the GPU is visible."""
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    del env["CUDA_VISIBLE_DEVICES"], env["TRITON_INTERPRET"]
    argv = [sys.executable, str(HERE / program), *map(str, args)]
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    "precision, sampler",
    [("fp32", "uniform"), ("bf16", "uniform"), ("fp16", "uniform"), ("bf16", "loss-second-moment")],
)
def test_no_step_waits_for_the_device_between_rows_of_the_log(precision, sampler, tmp_path):
    succeed("gpu_steps.py", precision, sampler, tmp_path, cwd=tmp_path)


def test_a_host_copy_arrives_whole(tmp_path):
    succeed("gpu_host_copy.py", cwd=tmp_path)


def test_samples_wait_for_nothing_and_fit_the_memory(tmp_path):
    succeed("gpu_sampling.py", tmp_path, cwd=tmp_path)


def test_metrics_are_those_of_the_cpu(tmp_path):
    succeed("gpu_metrics.py", cwd=tmp_path)


@pytest.mark.parametrize(
    "check", ["norms", "fused_norms", "graphs", "layouts", "compiled", "sampling", "deterministic"]
)
def test_ways_to_run_a_network_agree(check, tmp_path):
    succeed("gpu_speed.py", check, tmp_path, cwd=tmp_path)
