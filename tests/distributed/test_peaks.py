"""Peaks of devices, by name."""

import pytest
import torch as th

from improved_diffusion.distributed.peaks import PEAKS, device_peak, peak_flops


@pytest.mark.parametrize(
    "name, precision, tf32, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 67.0),
        ("NVIDIA H100 PCIe", "fp16", True, 756.0),
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA GH200 480GB", "bf16", True, 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 311.9),
        ("NVIDIA A10G", "bf16", True, 70.0),
        ("NVIDIA A10", "bf16", True, 125.0),
        ("NVIDIA L4", "fp32", False, 30.3),
        ("Tesla T4", "fp16", True, 65.0),
        ("Tesla T4", "fp32", True, 8.1),
        ("Tesla T4", "bf16", True, None),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
        ("NVIDIA GeForce RTX 4090", "bf16", True, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", True, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", True, None),
        ("NVIDIA GeForce GTX 1080", "fp32", True, None),
        ("", "fp32", True, None),
    ],
)
def test_peaks_by_name(name, precision, tf32, tflops):
    peak = peak_flops(name, precision, tf32)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_longer_name_comes_before_one_that_is_part_of_it():
    names = list(PEAKS)
    for i, name in enumerate(names):
        assert not any(f" {name} " in f" {later} " for later in names[i + 1 :])


def test_cpus_have_no_peak():
    assert device_peak(th.device("cpu"), "fp32") is None
