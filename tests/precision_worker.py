"""What each rank does in test_precision.py: `precision_worker.py FOLDER`, started under a launcher, trains in bfloat16,
and writes this rank's parameters, and the types of what was added up over the ranks, to FOLDER/rankN.pt."""

import sys
from pathlib import Path

import torch as th
from dist_worker import six_steps

from improved_diffusion import distributed


def main():
    folder = Path(sys.argv[1])
    distributed.setup_dist()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    all_reduce, reduced = th.distributed.all_reduce, []

    def spy(tensor, *args, **kwargs):
        reduced.append((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    th.distributed.all_reduce = spy
    parameters, _ = six_steps(folder / "run", split=(rank, ranks), precision="bf16")
    th.save(dict(parameters=parameters.float(), reduced=reduced), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    distributed.run_script(main)
