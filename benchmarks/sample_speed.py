"""What 16 bits, channels last and compiling gain when drawing: an evaluation of the network each way, in turns.

    python benchmarks/sample_speed.py                                  (CIFAR-10 preset, batch 64)
    python benchmarks/sample_speed.py --num_channels 64 --batch_size 8 --rounds 5

Random weights. The median over the rounds of the time relative to that of fp32 in the same round; without --compile
nothing is compiled. Writes benchmarks/results/sample_speed_<device>.json.
"""

import argparse
import json
import platform
import statistics
import time

import torch as th
from common import RESULTS

from improved_diffusion import distributed
from improved_diffusion.cli.parsing import parse
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.sampling.guided import prepare_model

WAYS = {
    "fp32": [],
    "fp32, channels last": ["--memory_format", "channels_last"],
    "bf16": ["--precision", "bf16"],
    "bf16, channels last": ["--precision", "bf16", "--memory_format", "channels_last"],
}
COMPILED = {f"{name}, compiled": [*flags, "--compile"] for name, flags in WAYS.items()}


def make(flags, num_channels):
    argv = ["--preset", "cifar10-hybrid", "--num_channels", str(num_channels), *flags]
    settings = parse(ImageSampling, argv).settings
    th.manual_seed(0)
    return prepare_model(settings.sampler, build_model_and_diffusion(settings.model, settings.diffusion)[0].eval())


def seconds(model, x, t):
    if x.is_cuda:
        th.cuda.synchronize()
    start = time.perf_counter()
    with th.no_grad():
        model(x, t)
    if x.is_cuda:
        th.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_channels", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = distributed.dev()
    x = th.randn(args.batch_size, 3, 32, 32, device=device)
    t = th.full((args.batch_size,), 500.0, device=device)
    ways = {**WAYS, **(COMPILED if args.compile else {})}
    models = {name: make(flags, args.num_channels) for name, flags in ways.items()}
    for model in models.values():
        seconds(model, x, t)
    rounds = [{name: seconds(model, x, t) for name, model in models.items()} for _ in range(args.rounds)]
    relative = {name: statistics.median(r[name] / r["fp32"] for r in rounds) for name in models}
    for name, ratio in relative.items():
        print(f"{name}: {ratio:.2f} of fp32's time")
    where = th.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    content = dict(
        device=where, torch=th.__version__, num_channels=args.num_channels, batch_size=args.batch_size,
        seconds_fp32=statistics.median(r["fp32"] for r in rounds), time_relative_to_fp32=relative,
    )  # fmt: skip
    path = RESULTS / f"sample_speed_{where.replace(' ', '_')}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
