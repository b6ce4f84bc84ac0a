"""Peak memory of a training step, by preset and activation checkpointing.

    python benchmarks/memory.py                    tensors without content, on any machine
    python benchmarks/memory.py --device cuda --batches 8,16    real steps, for comparison

Each is a step of the network: forward, backward, AdamW, one moving average; without what cuDNN and CUDA take. Memory is
linear in the images of a microbatch, once these are more than the weights, so two sizes are measured. Tensors
without content live until Python frees them, so that these are estimates; real steps are exact.
"""

import argparse
import collections
import contextlib
import gc
import json
import weakref
from pathlib import Path

import torch as th
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from improved_diffusion.config.presets import preset_options
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.fp16_util import make_master_params
from improved_diffusion.models.acceleration import checkpoint_levels
from improved_diffusion.models.build import build_model, with_levels
from improved_diffusion.training import precision as precision_util

PRESETS = ("cifar10-hybrid", "imagenet64-hybrid", "lsun-bedroom", "adm-imagenet256")
LEVELS = ("", "0", "0,1", "0,1,2", "all")
CARD = 24e9  # bytes


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of the tensors that operations return, for as long as one of their tensors lives."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.calls = 0
        self.tensors = WeakIdKeyDictionary()
        self.users = collections.Counter()

    def note(self, tensor):
        if tensor in self.tensors:
            return
        self.tensors[tensor] = True
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.users[key] += 1
        if self.users[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.free, key, size)

    def free(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls % 200 == 0:
            gc.collect()  # tensors in cycles, which real steps do not have
        for tensor in tree_leaves(out):
            if isinstance(tensor, th.Tensor):
                self.note(tensor)
        return out


def step(model, opt, master, average, batch, side):
    """One training step on images without meaning."""
    x = th.zeros(batch, model.in_channels, side, side, device=master[0].device)
    y = {} if model.num_classes is None else {"y": th.zeros(batch, dtype=th.long, device=x.device)}
    model(x, th.zeros(batch, device=x.device), **y).square().mean().backward()
    if master[0] is not next(model.parameters()):
        precision_util.collect_gradients(list(model.parameters()), master)
    opt.step()
    average.lerp_(th.cat([p.detach().flatten() for p in master]), 1e-4)
    opt.zero_grad()


def peak(preset, precision, levels, batch, device):
    """Bytes at most in a step."""
    options = {name: value for name, value in preset_options(preset).items() if name in ImageModel.options()}
    settings = ImageModel.of({**options, "use_checkpoint": levels == "all"})
    if settings.model.class_cond:
        settings = settings.replace(num_classes=1000)
    if device == "cuda":
        th.cuda.reset_peak_memory_stats()
    tracker = LiveMemory() if device == "cpu" else None
    with FakeTensorMode() if tracker else contextlib.nullcontext(), tracker or contextlib.nullcontext():
        with th.device(device):
            model = build_model(with_levels(settings.model), settings.diffusion.learn_sigma)
        checkpoint_levels(model, [int(level) for level in levels.split(",") if level and level != "all"])
        master = list(model.parameters())
        if precision != "fp32":
            master = make_master_params(master)
            getattr(model, f"convert_to_{precision}")()
        average = th.zeros(sum(p.numel() for p in master), device=device)
        opt = th.optim.AdamW(master, fused=True)
        for p in master:
            p.grad = th.zeros_like(p)
        opt.step()  # makes the optimizer's state
        opt.zero_grad()
        step(model, opt, master, average, batch, settings.model.image_size)
        return tracker.peak if tracker else th.cuda.max_memory_allocated()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument(
        "--batches", default="64,128", help="two microbatches; with --device cuda, the GPU must hold them"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gc.freeze()
    rows, batches = [], [int(batch) for batch in args.batches.split(",")]
    print("| preset | checkpointing of levels | without images, GB | per image, GB | images on a card of 24 GB |")
    print("|---|---|---|---|---|")
    for preset in args.presets.split(","):
        for levels in LEVELS:
            few, many = (peak(preset, args.precision, levels, batch, args.device) for batch in batches)
            each = (many - few) / (batches[1] - batches[0])
            fixed = few - batches[0] * each
            fits = max(0, int((CARD * 0.95 - fixed) / each))
            rows.append({"preset": preset, "levels": levels, "fixed": fixed, "per_image": each, "fits": fits})
            sizes = f"{fixed / 1e9:.2f} | {each / 1e9:.3f} | {fits}"
            print(f"| {preset} | {levels or 'none'} | {sizes} |", flush=True)
    if args.out:
        machine = th.cuda.get_device_name() if args.device == "cuda" else "tensors without content"
        result = {"machine": machine, "torch": th.__version__, "precision": args.precision, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
