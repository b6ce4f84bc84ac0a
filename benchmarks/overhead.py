"""What TrainLoop costs beyond the arithmetic: its logging, health checks, trackers, signals and saving, off and on in
one run.

    python benchmarks/overhead.py                                (CIFAR-10 preset at 64 channels, batch 16)
    python benchmarks/overhead.py --num_channels 32 --batch_size 4 --blocks 2 --block 6

Blocks of a bare loop (forward, backward, AdamW, one moving average, nothing else) take turns with blocks of TrainLoop
with everything on: a row of the log every 10 steps in log.txt, progress.csv, progress.jsonl and TensorBoard, and in
every second block a checkpoint. Random images, so that reading them is left out. Writes
benchmarks/results/overhead_<device>.json.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch as th
from common import published_model

from improved_diffusion import distributed
from improved_diffusion.logs import logger
from improved_diffusion.logs.trackers import make_trackers
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.training.ema import ParameterEMA, flatten
from improved_diffusion.training.loop import TrainLoop

SAVE_INTERVAL = 1000  # over which the cost of a save is spread; the default of image_train.py is 10,000
RATE = 0.9999


def synchronized_time(device):
    if device.type == "cuda":
        th.cuda.synchronize(device)
    return time.perf_counter()


def make(args):
    settings = published_model(num_channels=args.num_channels)
    th.manual_seed(0)
    model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
    return model.to(distributed.dev()), diffusion


class BareLoop:
    """The arithmetic of a training step and nothing else."""

    def __init__(self, args):
        self.model, self.diffusion = make(args)
        self.params = list(self.model.parameters())
        self.opt = th.optim.AdamW(self.params, lr=1e-4, fused=True)
        self.ema = ParameterEMA(RATE, self.params)
        self.applied = th.ones((), device=distributed.dev())

    def step(self, batch, step):
        for p in self.params:
            p.grad = None
        t = th.randint(self.diffusion.num_timesteps, (len(batch),), device=batch.device)
        self.diffusion.training_losses(self.model, batch, t)["loss"].mean().backward()
        self.opt.step()
        self.ema.update(flatten(self.params), self.applied, step)


class Interleaved:
    """The data of a TrainLoop; between its blocks of steps, blocks of the bare loop run. Both are timed."""

    def __init__(self, batch, bare, block):
        self.batch, self.bare, self.block = batch, bare, block
        self.taken = 0
        self.seconds = {"bare": [], "loop": [], "loop with a save": []}
        self.since = None

    def __next__(self):
        if self.taken % self.block == 0:
            now = synchronized_time(self.batch.device)
            number = self.taken // self.block - 1  # of the block that has just ended; the first ones warm up
            if number > 0:
                self.seconds["loop with a save" if number % 2 == 0 else "loop"].append(now - self.since)
            start = synchronized_time(self.batch.device)
            for step in range(self.block):
                self.bare.step(self.batch, step)
            self.since = synchronized_time(self.batch.device)
            if number >= 0:
                self.seconds["bare"].append(self.since - start)
        self.taken += 1
        return self.batch, {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_channels", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block", type=int, default=20, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each kind")
    args = parser.parse_args()
    distributed.setup_dist()
    folder = tempfile.mkdtemp(prefix="overhead")
    logger.configure(dir=folder)
    for tracker in make_trackers(["tensorboard"], folder, vars(args)):
        logger.add_output(tracker)
    batch = th.rand(args.batch_size, 3, 32, 32, device=distributed.dev()) * 2 - 1
    data = Interleaved(batch, BareLoop(args), args.block)
    model, diffusion = make(args)
    loop = TrainLoop(
        model=model, diffusion=diffusion, data=data, batch_size=args.batch_size, microbatch=-1, lr=1e-4,
        ema_rate=str(RATE), log_interval=10, save_interval=2 * args.block, resume_checkpoint="", keep_last=1, seed=0,
        max_steps=args.block * (args.blocks + 1) + 1,
    )  # fmt: skip
    loop.run_loop()
    shutil.rmtree(folder)

    per_step = {name: statistics.median(values) / args.block for name, values in data.seconds.items()}
    save = (per_step["loop with a save"] - per_step["loop"]) * args.block
    result = {
        "seconds_per_step": per_step,
        "overhead_of_a_step": per_step["loop"] / per_step["bare"] - 1,
        "seconds_of_a_save": save,
        "overhead_with_a_save_every_1000_steps": (per_step["loop"] + save / SAVE_INTERVAL) / per_step["bare"] - 1,
    }
    print(json.dumps(result, indent=1))
    device = (
        th.cuda.get_device_name() if distributed.dev().type == "cuda" else platform.processor() or platform.machine()
    )
    path = Path(__file__).parent / "results" / f"overhead_{device.replace(' ', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"device": device, "torch": th.__version__, **vars(args), "blocks_in_seconds": data.seconds, **result}
    path.write_text(json.dumps(content, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    distributed.run_script(main)
