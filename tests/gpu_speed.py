"""Checks of how a network runs on a GPU: `gpu_speed.py CHECK FOLDER`. Run by test_gpu.py."""

import sys
from pathlib import Path

import torch as th
import torch.nn.functional as F
from helpers import set_golden_weights
from norm_helpers import EPS, assert_exact, draws, with_gradients
from train_helpers import Data, assert_same, make_loop, parameters_of, small_diffusion

from improved_diffusion import distributed, fused_norm
from improved_diffusion.config import SpeedConfig, TrainSpeedConfig
from improved_diffusion.logs import logger
from improved_diffusion.models.acceleration import accelerate
from improved_diffusion.nn import normalization
from improved_diffusion.unet import UNetModel

PRECISIONS = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}


def unet(dropout=0.1):
    model = UNetModel(
        3, 32, 6, 1, (2,), channel_mult=(1, 2), num_heads=2, dropout=dropout, num_classes=3,
        use_scale_shift_norm=True,
    )  # fmt: skip
    return set_golden_weights(model).to(distributed.dev())


def trained(steps=4, precision="fp32", dropout=0.1, **kwargs):
    """The loop after some steps."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in TrainSpeedConfig.__dataclass_fields__}
    loop = make_loop(
        model=unet(dropout), diffusion=small_diffusion(), precision=precision, max_steps=steps,
        speed=TrainSpeedConfig(**options), **{"data": Data(classes=3), **kwargs},
    )  # fmt: skip
    loop.run_loop()
    return loop


def close(one, other, tolerance):
    """The largest difference is at most this share of the largest value."""
    share = float((one.float() - other.float()).abs().max() / other.float().abs().max())
    print(f"  {share:.2e} of at most {tolerance:.0e}")
    assert share <= tolerance


def norms(folder):
    """Each way of a group norm against float64: outputs and gradients."""
    for dtype, tolerance in ((th.float32, 1e-5), (th.bfloat16, 2e-2), (th.float16, 3e-3)):
        for layout in (th.contiguous_format, th.channels_last):
            for mixed in (False, True):
                norm = set_golden_weights(normalization(64)).to(distributed.dev())
                norm.in_16_bits = mixed
                x = (th.randn(3, 64, 7, 9, device=distributed.dev()) + 1).to(dtype).to(memory_format=layout)
                grad = th.randn_like(x)
                x.requires_grad_()
                out = norm(x)
                assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
                found = [out, *th.autograd.grad(out, [x, norm.weight, norm.bias], grad)]
                x64, weight, bias = (t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias))
                true = F.group_norm(x64, 32, weight, bias, norm.eps)
                true = [true, *th.autograd.grad(true, [x64, weight, bias], grad.double())]
                print(dtype, layout, "mixed" if mixed else "float32 sums")
                for one, other in zip(found, true, strict=True):
                    close(one, other, tolerance)


def fused_norms(folder):
    """The kernels of group norms in channels-last layout against float64, and twice the same bits."""
    from improved_diffusion import norm_kernels  # needs triton

    device = distributed.dev()
    assert not fused_norm.obstacle(device), fused_norm.obstacle(device)
    tolerances = {th.float32: 1e-5, th.bfloat16: 1e-2, th.float16: 2e-3}
    for shape in ((3, 64, 7, 9), (2, 96, 33, 31), (2, 384, 16, 16), (4, 1024, 4, 4), (1, 256, 128, 128), (1, 32, 1, 2)):
        for dtype in tolerances:
            for silu in (False, True):
                for modulated in (False, True):
                    given, grad = draws(shape, dtype, modulated, device=device)
                    assert_exact(norm_kernels.norm, given, grad, 32, silu, tolerances)
                    one, other = (with_gradients(norm_kernels.norm, given, grad, 32, EPS, silu) for _ in range(2))
                    assert all(map(th.equal, one, other))


def graphs(folder):
    """CUDA graphs change no bit, with dropout and several microbatches, and none of a resumed run."""
    th.backends.cudnn.deterministic = True
    ways = [(precision, microbatch, "contiguous") for precision in PRECISIONS for microbatch in (-1, 2, 3)]
    for precision, microbatch, layout in [*ways, ("bf16", 3, "channels_last")]:  # the last one of 3 has another shape
        print(precision, microbatch, layout)
        kwargs = dict(precision=precision, microbatch=microbatch, memory_format=layout)
        plain, graphed = (parameters_of(trained(**kwargs, cuda_graphs=on)) for on in (False, True))
        assert th.isfinite(plain).all() and th.equal(plain, graphed)
    runs = {}
    for name, steps, start in (("whole", 4, ""), ("half", 2, ""), ("resumed", 4, "half/model000002.pt")):
        logger.configure(dir=str(folder / name), format_strs=["csv"])
        runs[name] = trained(steps, cuda_graphs=True, resume_checkpoint=start and str(folder / start))
    assert th.equal(parameters_of(runs["resumed"]), parameters_of(runs["whole"]))


def layouts(folder):
    """Channels last trains to the same parameters, to rounding."""
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 1e-2)):
        one, other = (
            parameters_of(trained(precision=precision, memory_format=layout, tf32="none", dropout=0, adam_eps=1e-4))
            for layout in ("contiguous", "channels_last")
        )
        print(precision)
        close(other, one, tolerance)


def compiled(folder):
    """A compiled network trains to the same parameters, to rounding, and two runs of it to the same bits."""
    th.backends.cudnn.deterministic = True
    for mode in ("blocks", "model"):
        for precision, tolerance in (("fp32", 1e-3), ("bf16", 5e-2)):
            for graphs in (False, True):
                print(mode, precision, "graphs" if graphs else "")
                kwargs = dict(precision=precision, tf32="none", adam_eps=1e-4)
                plain = parameters_of(trained(dropout=0, **kwargs))
                kwargs |= dict(compile=mode, cuda_graphs=graphs)
                close(parameters_of(trained(dropout=0, **kwargs)), plain, tolerance)
                one, other = (parameters_of(trained(**kwargs)) for _ in range(2))  # its dropout has masks of its own
                assert_same(one, other)


def sampling(folder):
    """A network that draws, by each option, against the plain one; a call of another shape runs too."""
    x, t = th.randn(4, 3, 8, 8, device=distributed.dev()), th.arange(4, device=distributed.dev())
    y = th.tensor([0, 1, 2, 0], device=distributed.dev())
    for options in (
        dict(cuda_graphs=True), dict(memory_format="channels_last"), dict(compile="blocks"), dict(compile="model"),
        dict(compile="blocks", cuda_graphs=True, memory_format="channels_last"), dict(cudnn_benchmark=True),
    ):  # fmt: skip
        model = accelerate(unet().eval(), SpeedConfig(tf32="none"))
        with th.inference_mode():
            plain = [model(x, t, y=y), model(x + 1, t, y=y)]
            fast = accelerate(model, SpeedConfig(tf32="none", **options))
            print(options)
            first = fast(x, t, y=y)
            second = fast(x + 1, t, y=y)
            close(first, plain[0], 1e-4)  # the second call does not write over it
            close(second, plain[1], 1e-4)
            close(fast(x[:3], t[:3], y=y[:3]), plain[0][:3], 1e-4)


def deterministic(folder):
    """With --deterministic a resumed run has the bits of one that never stopped; attention is over 1024 positions."""
    for precision in PRECISIONS:
        for layout in ("contiguous", "channels_last"):
            print(precision, layout)
            kwargs = dict(precision=precision, memory_format=layout, deterministic=True, microbatch=3)
            runs = {}
            for name, steps, start in (("whole", 6, ""), ("half", 3, ""), ("resumed", 6, "half/model000003.pt")):
                logger.configure(dir=str(folder / precision / layout / name), format_strs=["csv"])
                start = start and str(folder / precision / layout / start)
                data = Data(classes=3, side=64)
                runs[name] = parameters_of(trained(steps, data=data, resume_checkpoint=start, **kwargs))
            assert th.isfinite(runs["whole"]).all()
            assert_same(runs["resumed"], runs["whole"])


CHECKS = {f.__name__: f for f in (norms, fused_norms, graphs, layouts, compiled, sampling, deterministic)}


def main():
    distributed.setup_dist()
    folder = Path(sys.argv[2])
    logger.configure(dir=str(folder), format_strs=["csv"])
    CHECKS[sys.argv[1]](folder)


if __name__ == "__main__":
    distributed.run_script(main)
