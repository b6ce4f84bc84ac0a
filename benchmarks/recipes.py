"""The recipes for one's own images: parameters, memory, and the time of a step and of a preview on this machine.

    python benchmarks/recipes.py                              (the recipes that `--preset auto` chooses for a CPU)
    python benchmarks/recipes.py --recipes medium-64,medium-128 --rounds 50
    python benchmarks/recipes.py --recipes medium-64,medium-128,large-256 --rounds 0    (no times, on any machine)

Random images, so that reading them is left out. The fastest of the rounds counts, as other work on the machine only
adds to it. Memory is that of weights, gradient, Adam and the average, and of what autograd keeps for a batch in fp32.
Prints the table of docs/training.md and writes benchmarks/results/recipes_<machine>.json.
"""

import argparse
import json
import platform
import tempfile
import time

import torch as th
from common import RESULTS

from improved_diffusion import distributed
from improved_diffusion.config.presets import options_for
from improved_diffusion.config.recipes import RECIPES
from improved_diffusion.config.settings import ImageTraining
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.training.dry_run import _saved_bytes
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.training.preview import PREVIEWS, STEPS


def make_loop(settings, device):
    """A TrainLoop of the recipe on random images."""
    model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
    train, side = settings.train, settings.model.image_size
    batch = th.rand(train.total_batch_size, 3, side, side, device=device) * 2 - 1
    return TrainLoop(
        model=model.to(device), diffusion=diffusion, data=iter(lambda: (batch, {}), None),
        batch_size=train.total_batch_size, microbatch=-1, lr=train.lr, ema_rate=train.ema_rate, log_interval=10**9,
        save_interval=10**9, resume_checkpoint="", precision=train.precision, seed=0,
    )  # fmt: skip


def fastest(call, rounds, device):
    """The least time in seconds that a call takes."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        distributed.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name, rounds):
    """The row of a recipe; without rounds, without times."""
    device = distributed.dev()
    settings = ImageTraining.of(options_for(name, ImageTraining))
    loop = make_loop(settings, device)
    batch, cond = next(loop.data)
    times = {}
    if rounds:
        times["seconds_per_step"] = fastest(lambda: loop.run_step(batch, cond), rounds + 1, device)
        with th.no_grad():
            t = th.zeros(len(batch), device=device)
            forward = fastest(lambda: loop.model(batch, t), rounds, device) / len(batch)
        times["seconds_per_preview"] = 2 * PREVIEWS * STEPS * forward
    parameters = sum(p.numel() for p in loop.model_params)
    memory = 20 * parameters + _saved_bytes(loop, batch, cond, 1) * len(batch)
    return {
        "parameters": parameters, "memory_gib": memory / 2**30, **times, "max_steps": settings.train.max_steps,
        "image_size": settings.model.image_size, "batch": len(batch),
    }  # fmt: skip


def main():
    for_cpus = [name for name, recipe in RECIPES.items() if recipe.cores]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(for_cpus))
    parser.add_argument("--rounds", type=int, default=10, help="0: no times")
    args = parser.parse_args()
    distributed.setup_dist()
    logger.configure(dir=tempfile.mkdtemp(), format_strs=[])
    device = distributed.dev()
    name = (
        th.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}_{th.get_num_threads()}_threads"
    )
    path = RESULTS / f"recipes_{name.replace(' ', '_')}.json"
    rows = json.loads(path.read_text())["recipes"] if path.exists() else {}
    print("| recipe | images | chosen for | parameters | batch | memory | a step | a preview | steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in args.recipes.split(","):
        row = measure(recipe, args.rounds)
        rows[recipe] = rows.get(recipe, {}) | row  # without rounds, the times that were measured stay
        times = [f"{row[key]:.2g} s" if key in row else "" for key in ("seconds_per_step", "seconds_per_preview")]
        print(
            f"| `{recipe}` | {row['image_size']}x{row['image_size']} | {RECIPES[recipe].hardware} | "
            f"{row['parameters'] / 1e6:.1f}M | {row['batch']} | {row['memory_gib']:.1f} GiB | "
            f"{' | '.join(times)} | {row['max_steps']:,} |",
            flush=True,
        )
    path.write_text(json.dumps({"device": name, "torch": th.__version__, "recipes": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    distributed.run_script(main)
