"""What it gains to evaluate several timesteps of the bound in one forward pass: a whole bound each way, in turns.

    make demo                                     (the model, and the digits)
    python benchmarks/nll_speed.py --model_path runs/digits/ema_0.99_001500.pt --data_dir data/digits/test

The median over the rounds of the time relative to that of one timestep at a time in the same round, for each batch
size; `automatic` is what image_nll.py does unless told. Writes benchmarks/results/nll_speed.json.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch as th
from common import RESULTS

from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import Likelihood
from improved_diffusion.evaluation.likelihood import open_dataset, timesteps_per_pass
from improved_diffusion.sampling.noise import SeededNoise

BATCH_SIZES = (1, 8, 99)
PER_PASS = (1, 2, 4, 8, 16, 32)
MOST_IMAGES = 512  # of a pass


def seconds(diffusion, model, batch, classes, per_pass):
    """The time that the whole bound of a batch takes, and the bound."""
    if batch.is_cuda:
        th.cuda.synchronize()
    start = time.perf_counter()
    noise, kwargs = SeededNoise(0, range(len(batch))), {} if classes is None else {"y": classes}
    bound = diffusion.calc_bpd_loop(model, batch, model_kwargs=kwargs, noise_fn=noise, timesteps_per_pass=per_pass)
    total = bound["total_bpd"].cpu()  # waits for the device
    return time.perf_counter() - start, total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="runs/digits/ema_0.99_001500.pt")
    parser.add_argument("--data_dir", default="data/digits/test")
    parser.add_argument("--steps", type=int, default=32, help="timesteps of the respaced process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    asked = {"model_path": args.model_path, "data_dir": args.data_dir, "timestep_respacing": str(args.steps)}
    loaded = load_model(Likelihood.of(asked), asked, args.model_path)
    diffusion, device = loaded.diffusion, distributed.dev()
    model, dataset = loaded.model.to(device), open_dataset(loaded)
    rows = []
    for n in BATCH_SIZES:
        images, kwargs = th.utils.data.default_collate([dataset[i] for i in range(n)])
        batch, y = images.to(device), kwargs["y"].to(device) if "y" in kwargs else None
        automatic = timesteps_per_pass(batch.shape, args.steps, device.type)
        ways = sorted({k for k in (*PER_PASS, automatic) if k <= args.steps and n * k <= MOST_IMAGES})
        seconds(diffusion, model, batch[:1], None if y is None else y[:1], 1)
        rounds = []
        for _ in range(args.rounds):
            results = {k: seconds(diffusion, model, batch, y, k) for k in ways}
            for _, total in results.values():
                th.testing.assert_close(total, results[1][1], rtol=1e-5, atol=1e-5)
            rounds.append({k: result[0] for k, result in results.items()})
        for k in ways:
            row = dict(batch_size=n, timesteps_per_pass=k, automatic=k == automatic,
                       seconds=statistics.median(r[k] for r in rounds),
                       relative=statistics.median(r[k] / r[1] for r in rounds))  # fmt: skip
            rows.append(row)
            mark = " (automatic)" if row["automatic"] else ""
            print(f"batch {n}, {k} at once{mark}: {row['seconds']:.2f} s, {row['relative']:.2f} of one at a time")
    where = th.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    content = dict(
        device=where, threads=th.get_num_threads(), torch=th.__version__, model=os.path.basename(args.model_path),
        image_size=loaded.settings.model.size, steps=args.steps, rows=rows,
    )  # fmt: skip
    (RESULTS / "nll_speed.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
