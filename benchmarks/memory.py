"""Peak memory of a training step, by preset and activation checkpointing.

    python benchmarks/memory.py                    tensors without content, on any machine
    python benchmarks/memory.py --device cuda      real steps, for comparison

Each is a step of the network: forward, backward, AdamW, one moving average; without what cuDNN and CUDA take. Memory is
linear in the images of a microbatch, so two sizes are measured. The table is what docs/speed.md shows.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch as th
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from improved_diffusion.config.presets import preset_options
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.fp16_util import make_master_params
from improved_diffusion.models.acceleration import checkpoint_levels
from improved_diffusion.models.build import build_model, with_levels
from improved_diffusion.training import precision as precision_util

PRESETS = ("cifar10-hybrid", "imagenet64-hybrid", "lsun-bedroom", "adm-imagenet256")
LEVELS = ("", "0", "0,1", "0,1,2", "all")
CARD = 24e9  # bytes


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
    """Bytes at most, of two steps."""
    options = {name: value for name, value in preset_options(preset).items() if name in ImageModel.options()}
    settings = ImageModel.of({**options, "use_checkpoint": levels == "all"})
    if settings.model.class_cond:
        settings = settings.replace(num_classes=1000)
    tracker = MemTracker() if device == "cpu" else None
    with FakeTensorMode() if tracker else contextlib.nullcontext():
        with th.device(device):
            model = build_model(with_levels(settings.model), settings.diffusion.learn_sigma)
        checkpoint_levels(model, [int(level) for level in levels.split(",") if level and level != "all"])
        master = list(model.parameters())
        if precision != "fp32":
            master = make_master_params(master)
            getattr(model, f"convert_to_{precision}")()
        average = th.zeros(sum(p.numel() for p in master), device=device)
        opt = th.optim.AdamW(master, fused=True)
        if tracker:
            tracker.track_external(model, opt, average, *(master if precision != "fp32" else ()))
        else:
            th.cuda.reset_peak_memory_stats()
        with tracker or contextlib.nullcontext():
            for _ in range(2):  # the optimizer's state is made in the first
                if tracker:
                    tracker.reset_mod_stats()
                step(model, opt, master, average, batch, settings.model.image_size)
        if tracker is None:
            return th.cuda.max_memory_allocated()
        (found,) = tracker.get_tracker_snapshot("peak").values()
        return found["Total"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    print("| preset | checkpointing of levels | without images, GB | per image, GB | images on a card of 24 GB |")
    print("|---|---|---|---|---|")
    for preset in args.presets.split(","):
        for levels in LEVELS:
            one, three = (peak(preset, args.precision, levels, batch, args.device) for batch in (1, 3))
            each = (three - one) / 2
            fits = max(0, int((CARD * 0.95 - (one - each)) / each))
            rows.append({"preset": preset, "levels": levels, "fixed": one - each, "per_image": each, "fits": fits})
            sizes = f"{(one - each) / 1e9:.2f} | {each / 1e9:.3f} | {fits}"
            print(f"| {preset} | {levels or 'none'} | {sizes} |", flush=True)
    if args.out:
        machine = th.cuda.get_device_name() if args.device == "cuda" else "tensors without content"
        result = {"machine": machine, "torch": th.__version__, "precision": args.precision, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
