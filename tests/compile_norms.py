"""Compile the kernels of group norm for NVIDIA GPUs, without one. Run by test_fused_norm.py."""

import torch as th
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from improved_diffusion import norm_kernels

IMAGES = {"x", "out", "grad", "grad_x"}
NUMBERS = {"eps": "fp32", "stride": "i32"}
SCRATCH = {norm_kernels.normalise: ("means", "spreads"), norm_kernels.gradients: ("plains", "normals")}


def compile_for(capability, kernel, shape, dtype, modulated, silu):
    """Raises where triton or NVIDIA's assembler refuses."""
    plan = norm_kernels._Plan(th.empty(shape, device="meta"), 32)
    constants = {**plan.constants, "ROOM": plan.room, "MODULATED": modulated, "SILU": silu}
    options = {"num_warps": constants.pop("num_warps")}
    if plan.parts == 1:
        constants |= dict.fromkeys(SCRATCH[kernel])
    if not modulated:
        constants |= dict.fromkeys(("modulation", "grad_modulation"))
    names = [param.name for param in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: f"*{dtype}" if name in IMAGES else NUMBERS.get(name, "*fp32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32), options=options)


# Of images that are whole the second kernels compute what the first ones compute of parts.
compile_for(80, norm_kernels.normalise, (2, 192, 16, 16), "bf16", True, True)
compile_for(80, norm_kernels.gradients, (2, 192, 16, 16), "bf16", True, True)
compile_for(90, norm_kernels.gradients, (2, 128, 64, 64), "fp16", False, False)
