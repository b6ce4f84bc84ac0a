"""Kill a training run again and again, resume it each time, and compare it with a run that was never stopped.

    python benchmarks/kill_and_resume.py --kills 100

All processes of a run on two ranks get SIGKILL at random moments, every second time in the midst of a save. The run has
dropout, float16, loss-second-moment timesteps and three moving averages. In the end the parameters, the averages, the
optimizer's state, the loss scale, the timestep sampler's history and the rows of the log must be the same bit for bit.
Writes benchmarks/results/kill_and_resume.json; exits with code 1 where anything differs.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--num_heads", "1", "--channel_mult", "1,1",
    "--attention_resolutions", "4", "--diffusion_steps", "4", "--noise_schedule", "cosine", "--learn_sigma", "True",
    "--num_workers", "0", "--dropout", "0.3", "--class_cond", "True", "--random_flip", "True", "--precision", "fp16",
    "--schedule_sampler", "loss-second-moment", "--ema_rate", "0.9,0.99", "--ema_sigma_rel", "0.1",
    "--ema_warmup", "True", "--batch_size", "2", "--lr", "1e-3", "--fp16_scale_growth", "0.01", "--keep_last", "3",
    "--log_interval", "7", "--save_interval", "5",
]  # fmt: skip
TIMES = {"images_per_second", "data_wait", "peak_gib"}  # of the log's columns, those that are no function of the step


class Run:
    """A training run in a folder, started as often as needed."""

    def __init__(self, folder, data, steps, ranks):
        mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if not mpiexec:
            raise SystemExit("mpiexec is missing: pip install mpi4py mpich")
        self.folder = folder
        self.command = [
            mpiexec, "-n", str(ranks), sys.executable, str(ROOT / "scripts" / "image_train.py"), *FLAGS, "--data_dir",
            str(data), "--max_steps", str(steps), "--out_dir", str(folder), "--resume", "auto",
        ]  # fmt: skip
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "KILL_AND_RESUME": str(folder),
        }

    def start(self):
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def finish(self):
        if self.process.wait(600):
            raise SystemExit(f"training failed:\n{self.text()}")

    def text(self):
        self.output.seek(0)
        return self.output.read()

    def kill(self):
        """SIGKILL to every process of the run, and wait until none is left."""
        mark = f"KILL_AND_RESUME={self.folder}".encode()
        while True:
            found = []
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:
                    continue
            if not found:
                break
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()

    def saving(self):
        """Whether a save is half done."""
        return any(self.folder.glob(".*.tmp"))

    def manifests(self):
        """The sets that are there: (name, when it was written)."""
        found = set()
        for path in self.folder.glob("manifest*.json"):
            with contextlib.suppress(FileNotFoundError):  # an older set has just been removed
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def newest_step(self):
        names = sorted(name for name, _ in self.manifests())
        return json.loads((self.folder / names[-1]).read_text())["step"] if names else 0


def kill_once(run, rng, in_save):
    """One life of the run; returns (whether it was killed, whether that was in the midst of a save)."""
    before = run.manifests()
    run.start()
    while not run.manifests() - before and run.process.poll() is None:  # it has got so far as to save
        time.sleep(0.005)
    deadline = time.monotonic() + rng.uniform(0, 0.7)
    while run.process.poll() is None and (time.monotonic() < deadline or (in_save and not run.saving())):
        if in_save:
            continue  # a save takes milliseconds
        time.sleep(0.002)
    alive, saving = run.process.poll() is None, run.saving()
    run.kill()
    return alive, saving or run.saving()


def differences(one, other, where=""):
    """Where two checkpoints' contents differ."""
    if type(one) is not type(other):
        return [f"{where}: {type(one)} and {type(other)}"]
    if isinstance(one, th.Tensor):
        return [] if one.dtype == other.dtype and th.equal(one, other) else [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: other keys"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: other lengths"]
        return [d for i, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [where]


def rows(folder):
    with open(folder / "progress.csv", newline="") as f:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(f)]


def compare(folder, other):
    """What differs between two finished runs, and the names of the files compared."""
    names = sorted(path.name for path in folder.glob("*.pt"))
    found = [] if names == sorted(path.name for path in other.glob("*.pt")) else ["other files"]
    for name in names:
        parts = [th.load(run / name, weights_only=True) for run in (folder, other)]
        found += differences(*parts, name)
    if rows(folder) != rows(other):
        found.append("progress.csv")
    return found, names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="0: enough for so many lives")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "kill_and_resume.json"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    steps = args.steps or 60 * args.kills
    place = Path(tempfile.mkdtemp(prefix="kill_and_resume"))
    data = place / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(data / f"{'cat' if i % 2 else 'dog'}_{i:02d}.png")

    killed = Run(place / "killed", data, steps, args.ranks)
    kills, in_saves = 0, 0
    while kills < args.kills:
        alive, saving = kill_once(killed, rng, in_save=kills % 2 == 1)
        if not alive:
            raise SystemExit(f"the run ended after {kills} kills: give more --steps\n{killed.text()[-3000:]}")
        kills, in_saves = kills + 1, in_saves + saving
        print(
            f"kill {kills}: {'in a save' if saving else 'between saves'}, after {killed.newest_step()} saved steps",
            flush=True,
        )
    last = killed.newest_step()
    steps = last + 20  # no more than shows that the run goes on
    for run in (killed, whole := Run(place / "whole", data, steps, args.ranks)):
        run.command[run.command.index("--max_steps") + 1] = str(steps)
        run.start()
        run.finish()

    found, names = compare(whole.folder, killed.folder)
    result = {"kills": kills, "in_the_midst_of_a_save": in_saves, "steps": steps, "files": names, "differences": found}
    Path(args.out).parent.mkdir(exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    shutil.rmtree(place)
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
