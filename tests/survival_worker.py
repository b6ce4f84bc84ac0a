"""What each rank does in test_survival.py: `survival_worker.py FOLDER FIRST LAST` trains ten steps, and the last rank's
images are not numbers from step FIRST to LAST. With python or torch as FIRST its third batch never comes. With data or
hook an error comes after five steps, on the ranks of LAST, such as 01, and a save of three parts takes 1.5 seconds."""

import math
import sys
import time
from pathlib import Path

import torch as th
from train_helpers import Data, make_loop, parameters_of

from improved_diffusion import distributed
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError
from improved_diffusion.logs import logger


class Stuck(Data):
    """Two batches, and then a wait in Python or in C++."""

    def __next__(self):
        if self.step == 2:
            (Path(sys.argv[1]) / "stuck").touch()
            if sys.argv[2] == "python":
                time.sleep(60)
            th.linalg.svd(th.randn(5000, 5000))
        return super().__next__()


class SpoiltOnLastRank(Data):
    """Batches that are not numbers on the last rank, at some steps."""

    def __next__(self):
        step = self.step
        batch, kwargs = super().__next__()
        bad = distributed.get_rank() == distributed.get_world_size() - 1 and int(sys.argv[2]) <= step <= int(
            sys.argv[3]
        )
        return (batch * math.nan if bad else batch), kwargs


class Ending(Data):
    """Five batches, and then an error."""

    def __next__(self):
        if self.step == 5:
            fail()
        return super().__next__()


def fail(*args):
    if str(distributed.get_rank()) in sys.argv[3]:
        raise UserError("an odd image")


def slow(part, write=checkpoint.to_bytes):
    time.sleep(0.5)
    return write(part)


def main_with_error(folder):
    distributed.setup_dist()
    logger.configure(dir=str(folder), format_strs=["csv", "stdout"])
    checkpoint.to_bytes = slow
    hook = sys.argv[2] == "hook"
    make_loop(data=Data() if hook else Ending(), hooks=[(5, fail)] if hook else [], max_steps=10).run_loop()


def main():
    folder = Path(sys.argv[1])
    if sys.argv[2] in ("data", "hook"):
        return main_with_error(folder)
    distributed.setup_dist()
    logger.configure(dir=str(folder), format_strs=["csv", "stdout"])
    data = Stuck() if sys.argv[2] in ("python", "torch") else SpoiltOnLastRank()
    loop = make_loop(data=data, max_steps=10, log_interval=2, save_interval=3, max_bad_steps=4)
    loop.run_loop()
    th.save(parameters_of(loop), folder / f"rank{distributed.get_rank()}.pt")


if __name__ == "__main__":
    distributed.run_script(main)
