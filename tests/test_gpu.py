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


@pytest.mark.parametrize(
    "precision, sampler",
    [("fp32", "uniform"), ("bf16", "uniform"), ("fp16", "uniform"), ("bf16", "loss-second-moment")],
)
def test_no_step_waits_for_the_device_between_rows_of_the_log(precision, sampler, tmp_path):
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    del env["CUDA_VISIBLE_DEVICES"]
    argv = [sys.executable, str(HERE / "gpu_steps.py"), precision, sampler, str(tmp_path)]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_host_copy_arrives_whole():
    program = (
        "import torch as th\n"
        "from improved_diffusion.distributed import HostCopy\n"
        "x = th.zeros(2**24, device='cuda')\n"
        "copies = []\n"
        "for i in range(20):\n"
        "    x += 1\n"
        "    copies.append(HostCopy(x))\n"
        "x.zero_()\n"
        "for i, copy in enumerate(copies, 1):\n"
        "    assert copy.get().device.type == 'cpu' and (copy.get() == i).all(), i\n"
    )
    env = environment()
    del env["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
