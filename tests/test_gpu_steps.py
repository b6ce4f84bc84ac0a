"""The program of test_gpu.py runs on a CPU too, so that it keeps up with the code where there is no GPU."""

import gpu_steps
import torch as th


def test_the_program_that_trains_on_a_gpu_runs(monkeypatch):
    monkeypatch.setattr(th.cuda, "set_sync_debug_mode", lambda mode: None)
    means = gpu_steps.train("bf16", 2)
    assert means["skipped_steps"] == 0 and means["loss"] > 0
