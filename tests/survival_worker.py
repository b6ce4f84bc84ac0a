"""What each rank does in test_survival.py: `survival_worker.py FOLDER FIRST LAST` trains ten steps, and rank 1's images
are not numbers from step FIRST to LAST."""

import math
import sys
from pathlib import Path

import torch as th
from train_helpers import Data, make_loop, parameters_of

from improved_diffusion import dist_util, logger


class SpoiltOnRank1(Data):
    """Batches that are not numbers on rank 1, at some steps."""

    def __next__(self):
        step = self.step
        batch, kwargs = super().__next__()
        bad = dist_util.get_rank() == dist_util.get_world_size() - 1 and int(sys.argv[2]) <= step <= int(sys.argv[3])
        return (batch * math.nan if bad else batch), kwargs


def main():
    folder = Path(sys.argv[1])
    dist_util.setup_dist()
    logger.configure(dir=str(folder), format_strs=["csv", "stdout"])
    loop = make_loop(data=SpoiltOnRank1(), max_steps=10, log_interval=2, save_interval=3, max_bad_steps=4)
    loop.run_loop()
    th.save(parameters_of(loop), folder / f"rank{dist_util.get_rank()}.pt")


if __name__ == "__main__":
    dist_util.run_script(main)
