"""Speed and memory of training: images/s and peak memory of the CIFAR-10 model in fp32, bf16 and fp16, and with
recomputed activations, as ratios to fp32 in one run.

    python benchmarks/train_speed.py --steps 500 --batch_size 128     (the preset, on a GPU)
    python benchmarks/train_speed.py --steps 5 --batch_size 4 --num_channels 32

Random images, so that reading them is left out. Writes benchmarks/results/train_speed_<device>.json.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch as th
from common import published_model

from improved_diffusion import distributed
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.training.loop import TrainLoop

VARIANTS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp32, --use_checkpoint": {"use_checkpoint": True},
}


def random_batches(batch_size, device):
    batch = th.rand(batch_size, 3, 32, 32, device=device) * 2 - 1
    while True:
        yield batch, {}


def measure(variant, args):
    """(images/s, peak memory in GiB or None, last mean loss) of training for args.steps after a warm-up."""
    device = distributed.dev()
    settings = published_model(num_channels=args.num_channels, use_checkpoint=variant.get("use_checkpoint", False))
    th.manual_seed(0)
    model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
    loop = TrainLoop(
        model=model.to(device), diffusion=diffusion, data=random_batches(args.batch_size, device),
        batch_size=args.batch_size, microbatch=-1, lr=1e-4, ema_rate="0.9999", log_interval=10**9, save_interval=10**9,
        resume_checkpoint="", precision=variant.get("precision", "fp32"), seed=0,
    )  # fmt: skip
    warm_up = max(2, args.steps // 10)
    for _ in range(warm_up):
        loop.run_step(*next(loop.data))
    if device.type == "cuda":
        th.cuda.synchronize()
        th.cuda.reset_peak_memory_stats()
    loop.run_log.meter.read()
    start = time.perf_counter()
    for _ in range(args.steps):
        loop.run_step(*next(loop.data))
        loop.step += 1
    means = loop.run_log.meter.read()  # waits for the device
    seconds = time.perf_counter() - start
    memory = th.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return args.steps * args.batch_size / seconds, memory, means["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_channels", type=int, default=128)
    args = parser.parse_args()
    distributed.setup_dist()
    logger.configure(dir=tempfile.mkdtemp(), format_strs=["stdout"])
    device = (
        th.cuda.get_device_name() if distributed.dev().type == "cuda" else platform.processor() or platform.machine()
    )
    rows = {}
    for name, variant in VARIANTS.items():
        speed, memory, loss = measure(variant, args)
        rows[name] = {"images_per_second": speed, "peak_gib": memory, "mean_loss": loss}
        ratio = speed / rows["fp32"]["images_per_second"]
        shown = "" if memory is None else f", {memory:.2f} GiB"
        print(f"{name}: {speed:.1f} images/s ({ratio:.2f}x fp32){shown}, mean loss {loss:.4f}", flush=True)
    path = Path(__file__).parent / "results" / f"train_speed_{device.replace(' ', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": device, "torch": th.__version__, **vars(args), "variants": rows}, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    distributed.run_script(main)
