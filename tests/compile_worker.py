"""Two ranks train a compiled and a plain U-Net under DDP, with the same gradients: `compile_worker.py MODE`."""

import sys

import torch as th
from helpers import set_golden_weights
from torch.nn.parallel import DistributedDataParallel

from improved_diffusion import distributed
from improved_diffusion.config import SpeedConfig
from improved_diffusion.models.acceleration import accelerate
from improved_diffusion.unet import UNetModel


def gradients(mode):
    model = set_golden_weights(UNetModel(3, 32, 6, 1, (1,), channel_mult=(1,), num_heads=2))
    call = DistributedDataParallel(accelerate(model, SpeedConfig(compile=mode)))
    th.manual_seed(distributed.get_rank())
    for _ in range(2):
        model.zero_grad()
        call(th.randn(2, 3, 8, 8), th.tensor([1.0, 700.0])).square().mean().backward()
    return th.cat([p.grad.flatten() for p in model.parameters()])


def main():
    distributed.setup_dist()
    plain, compiled = gradients("off"), gradients(sys.argv[1])
    th.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)
    shared = distributed.all_gather_object(compiled)
    assert th.equal(*shared)


if __name__ == "__main__":
    distributed.run_script(main)
