"""Compile the kernels of group norm for NVIDIA GPUs, without one. Run by test_fused_norm.py."""

import torch as th
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from improved_diffusion import norm_kernels

IMAGES = {"x", "out", "grad", "grad_x"}


def compile_for(capability, kernel, shape, dtype, modulated, silu):
    """Raises where triton or NVIDIA's assembler refuses."""
    plan = norm_kernels._Plan(th.empty(shape, device="meta"), 32)
    constants = {**plan.constants, "ROOM": plan.room, "MODULATED": modulated, "SILU": silu}
    options = {"num_warps": constants.pop("num_warps")}
    if not modulated:
        constants |= {"modulation": None, "grad_modulation": None}
    names = [param.name for param in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: f"*{dtype}" if name in IMAGES else "fp32" if name == "eps" else "*fp32" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32), options=options)


for kernel in (norm_kernels.part_moments, norm_kernels.normalise, norm_kernels.part_sums, norm_kernels.gradients):
    compile_for(80, kernel, (2, 192, 64, 64), "bf16", True, True)
compile_for(90, norm_kernels.gradients, (2, 128, 8, 8), "fp16", False, False)
