"""The fastest that accelerators can multiply and add, by their data sheets."""

from __future__ import annotations

import torch as th

# TFLOP/s of dense products by a part of the device's name: in fp32, TF32, and 16 bits with sums in fp32. TF32 is 0 for
# devices that have none; these have no bfloat16 either. The longer of two names comes first.
PEAKS = {
    "B200": (75.0, 1100.0, 2250.0),
    "GB200": (75.0, 1100.0, 2250.0),
    "H200": (67.0, 494.7, 989.4),
    "GH200": (67.0, 494.7, 989.4),
    "H100 PCIe": (51.2, 378.0, 756.0),
    "H100 NVL": (60.0, 417.5, 835.0),
    "H100": (67.0, 494.7, 989.4),
    "A100": (19.5, 156.0, 311.9),
    "A10G": (31.2, 35.0, 70.0),
    "A10": (31.2, 62.5, 125.0),
    "A30": (10.3, 82.5, 165.0),
    "A40": (37.4, 74.8, 149.7),
    "L40S": (91.6, 183.2, 366.4),
    "L40": (90.5, 90.5, 181.0),
    "L4": (30.3, 60.5, 121.0),
    "V100": (15.7, 0.0, 125.0),
    "T4": (8.1, 0.0, 65.0),
    "RTX A6000": (38.7, 77.4, 154.8),
    "RTX 6000 Ada": (91.1, 182.1, 364.2),
    "RTX 3080": (29.8, 29.8, 59.5),
    "RTX 3090": (35.6, 35.6, 71.0),
    "RTX 4080": (48.7, 48.7, 97.5),
    "RTX 4090": (82.6, 82.6, 165.2),
    "RTX 5080": (56.3, 56.3, 112.6),
    "RTX 5090": (104.8, 104.8, 209.5),
}


OTHERS = {"Ti", "SUPER", "Laptop", "Max", "MIG"}  # words that make another device of one in the table


def peak_flops(name: str, precision: str, tf32: bool = True) -> float | None:
    """The FLOP/s that a device can do, by its name ("NVIDIA H100 80GB HBM3"); None where it is not known.

    :param precision: fp32, bf16 or fp16.
    :param tf32: whether products in fp32 may use TF32, where the device has it.
    """
    words = name.replace("-", " ").split()
    known = next((known for known in PEAKS if f" {known} " in f" {' '.join(words)} "), None)
    if known is None or OTHERS.intersection(words):
        return None
    fp32, with_tf32, half = PEAKS[known]
    if precision == "fp32":
        return 1e12 * max(fp32, with_tf32 if tf32 else 0.0)
    return 1e12 * half if with_tf32 or precision == "fp16" else None


def device_peak(device: th.device, precision: str) -> float | None:
    """`peak_flops` of a device as torch is set up now; None for CPUs and for devices that are not known."""
    if device.type != "cuda":
        return None
    # Torch lets convolutions, which are most of the work here, use TF32 unless it is told otherwise.
    return peak_flops(th.cuda.get_device_name(device), precision, tf32=th.backends.cudnn.allow_tf32)
