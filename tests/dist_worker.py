"""What each rank does in test_dist_util.py: `dist_worker.py TASK FOLDER`, started under a launcher.

`all` runs every collective check and writes what this rank got to FOLDER/rankN.pt; `absent`: rank 1 never joins; in
`stopped` and `uneven` all end well, or rank 0 seconds after the others; in the other tasks rank 1 ends badly, or hangs,
while the others wait for it. `dist_worker.py script PATH ARGUMENTS` runs a script of ours, as impatient as those.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch as th

from improved_diffusion import distributed
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageDistillation
from improved_diffusion.distributed import collectives, watchdog
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.models.factories import create_gaussian_diffusion, create_model
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.training.distillation.consistency import Consistency
from improved_diffusion.training.distillation.progressive import Progressive
from improved_diffusion.training.distillation.teacher import Teacher
from improved_diffusion.training.loop import TrainLoop

STEPS, BATCH = 6, 4


def step_images(step):
    """The four images of a step, float32 [4, 3, 8, 8] in [-1, 1], and their classes."""
    rng = np.random.default_rng(step)
    images = rng.uniform(-1, 1, (BATCH, 3, 8, 8)).astype(np.float32)
    return th.from_numpy(images), th.from_numpy(rng.integers(0, 3, BATCH))


class ImageDecides:
    """A diffusion whose timesteps and noise are functions of the image: every split of a batch draws the same."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        seeds = [int(image.double().abs().sum() * 1e6) for image in x_start]
        generators = [th.Generator().manual_seed(seed) for seed in seeds]
        t = th.cat([th.randint(self.num_timesteps, (1,), generator=g) for g in generators])
        noise = th.stack([th.randn(x_start.shape[1:], generator=g) for g in generators])
        return self.diffusion.training_losses(model, x_start, t, model_kwargs=model_kwargs, noise=noise)

    def __getattr__(self, name):
        return getattr(self.diffusion, name)


def make_model():
    """A small class-conditional model without the zeros that would keep most of its first gradients at 0."""
    model = create_model(8, 32, 1, True, True, False, "4", 1, -1, True, 0.0, num_classes=3, channel_mult="1,1")
    with th.no_grad():
        for p in model.parameters():
            p.add_(0.05 * th.randn(p.shape))
    return model


def tuning():
    """Consistency tuning, as a TrainLoop takes it."""
    settings = ImageDistillation.of({
        "image_size": 8, "learn_sigma": True, "noise_schedule": "cosine", "diffusion_steps": 20
    })  # fmt: skip
    return Consistency(settings, build_diffusion(settings.diffusion), Teacher(settings, {"teacher_prediction": "eps"}))


def halving():
    """Progressive distillation in three stages of two steps, as a TrainLoop takes it."""
    settings = ImageDistillation.of({
        "image_size": 8, "learn_sigma": True, "noise_schedule": "cosine", "diffusion_steps": 20, "predict_v": True,
        "method": "progressive", "steps": 8, "to": 1, "max_steps": STEPS,
    })  # fmt: skip
    th.manual_seed(1)
    network = make_model().eval().requires_grad_(False)
    diffusion = build_diffusion(settings.diffusion)
    teacher = SimpleNamespace(prediction="v", guided=network, module=network, diffusion=diffusion, facts={})
    return Progressive(settings, diffusion, teacher)


def six_steps(folder, microbatch=-1, split=(0, 1), precision="fp32", diffusion=None):
    """The parameters [n], as one vector, after six steps on four images each, and the last five gradients' mean norm.

    :param split: this rank and the number of ranks.
    :param diffusion: what the model is trained on, if not a plain diffusion.
    """
    rank, ranks = split
    th.manual_seed(0)
    model = make_model()
    diffusion = diffusion or create_gaussian_diffusion(steps=20, learn_sigma=True, noise_schedule="cosine")
    data = ((images[rank::ranks], {"y": y[rank::ranks]}) for images, y in map(step_images, range(STEPS)))
    logger.configure(str(folder), format_strs=[])
    rows = []
    logger.add_output(SimpleNamespace(writekvs=lambda row: rows.append(dict(row)), close=lambda: None))
    loop = TrainLoop(
        model=model, diffusion=ImageDecides(diffusion), data=data, batch_size=BATCH // ranks, microbatch=microbatch,
        lr=1e-3, ema_rate="0.9", log_interval=STEPS, save_interval=100, resume_checkpoint="", max_steps=STEPS,
        precision=precision, hooks=getattr(diffusion, "hooks", list)(),
        # A bias before a norm of one channel a group has no gradient but rounding, which Adam would blow up to lr.
        adam_eps=1e-6,
    )  # fmt: skip
    loop.run_loop()
    return th.cat([p.detach().flatten() for p in model.parameters()]), rows[-1]["grad_norm"]


def ragged(rank):
    """What all_gather_ragged gives of one tensor of `rank` rows from each rank, and of int64 ones of rank + 1."""
    rows = th.arange(rank * 2, dtype=th.float64).view(rank, 2) + 10 * rank
    numbers = th.arange(rank + 1) + 100 * rank
    return distributed.all_gather_ragged(rows), distributed.all_gather_ragged(numbers)


def refused_by_rank0():
    """The message with which from_rank0 ends on this rank where rank 0 refuses."""

    def refuse():
        raise UserError(f"refused by rank {distributed.get_rank()}")

    try:
        distributed.from_rank0(refuse)
    except UserError as error:
        return str(error)


def files_of_rank0(folder):
    """What `read_bytes` and those that load checkpoints give on this rank: {case: hex digits, state dict or message}.

    `shared`: all ranks have the file. `absent`, `stale`: the others lack it, or have another of the same length.
    """
    rank, found = distributed.get_rank(), {}
    content = np.random.default_rng(0).bytes(1000)
    collectives.BROADCAST_BYTES, default = 300, collectives.BROADCAST_BYTES
    own = folder / f"own{rank}"
    own.mkdir()
    sent = []
    broadcast = collectives._broadcast_bytes
    collectives._broadcast_bytes = lambda *args: sent.append(1) or broadcast(*args)
    for case in ("shared", "absent", "stale", "empty"):
        path = (folder if case == "shared" else own) / f"{case}.bin"
        if rank == 0:
            path.write_bytes(b"" if case == "empty" else content)
        elif case == "stale":
            path.write_bytes(content[::-1])
        distributed.barrier()
        found[case] = (distributed.read_bytes(str(path)).hex(), len(sent))
        sent.clear()
    path = own / "model.pt"
    if rank == 0:
        th.save({"w": th.arange(5.0)}, path)
    found["model"] = distributed.load_state_dict(str(path))
    other = own / "model.safetensors"
    if rank == 0:
        checkpoint.save_state_dict({"w": th.arange(5.0)}, str(other), {"step": 3})
    found["safetensors"] = checkpoint.load(str(other))
    if rank == 0:
        path.write_bytes(path.read_bytes()[:100])
    for case, name in (("damaged", path), ("missing", folder / "nothing.pt")):
        try:
            distributed.load_state_dict(str(name))
        except UserError as error:
            found[case] = str(error).replace(str(own), str(folder / "own0"))
    collectives._broadcast_bytes, collectives.BROADCAST_BYTES = broadcast, default
    return found, content.hex()


def learned_history(rank):
    """What loss-second-moment remembers when rank 0 brings three losses and every other rank its number."""
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4), history_per_term=3)
    count = 3 if rank == 0 else rank
    ts = th.arange(count) % 4
    sampler.update_with_local_losses(ts, 10.0 * rank + th.arange(count, dtype=th.float32) + 1)
    return sampler.state_dict()


def everything(folder):
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    before = th.full((3,), float(rank))
    distributed.sync_params([before])
    th.save(
        dict(
            rank=rank,
            ranks=ranks,
            device=str(distributed.dev()),
            described=distributed.describe_ranks(),
            gathered=distributed.all_gather_object({"rank": rank}),
            ragged=ragged(rank),
            from_rank0=distributed.from_rank0(lambda: f"from {rank}"),
            refused=refused_by_rank0(),
            read=files_of_rank0(folder),
            history=learned_history(rank),
            synced=before,
            summed=distributed.sum_over_ranks(th.tensor([rank + 1.0])),
            six_steps=six_steps(folder / "run", split=(rank, ranks)),
            tuned=six_steps(folder / "tuned", split=(rank, ranks), diffusion=tuning()),
            halved=six_steps(folder / "halved", split=(rank, ranks), diffusion=halving()),
        ),
        folder / f"rank{rank}.pt",
    )


def end_badly(task):
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif task == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif task == "stuck":
        with distributed.working("the next batch of /data", 1):
            time.sleep(60)
    raise {"mistaken": UserError, "crashed": RuntimeError}[task]("rank 1 alone is wrong")


def be_impatient(silence=3):
    """The same waits in a tenth of the time."""
    watchdog.INTERVAL, watchdog.SILENCE = 0.5, silence


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task != "all":
        be_impatient()
    if task == "absent" and distributed.get_rank() == 1:
        time.sleep(15)
    limits = {} if task == "all" else dict(start_timeout=4)
    if task == "hanging":
        limits["hang_timeout"] = 2.0
    distributed.setup_dist(**limits)
    rank = distributed.get_rank()
    if task == "all":
        everything(folder)
        return
    distributed.barrier()
    if task == "uneven" and rank == 0:
        time.sleep(5)  # more than SILENCE
    if task in ("stopped", "uneven"):
        (folder / f"{task}{rank}").touch()
        raise SystemExit(75 if task == "stopped" else 0)
    if task == "hanging":  # without a word of what it waits for
        for step in range(1, 5):
            distributed.heartbeat(step)
            if rank == 1 and step == 4:
                time.sleep(60)
            distributed.barrier()
    if rank == 1:
        end_badly(task)
    distributed.barrier()


if __name__ == "__main__" and sys.argv[1] == "script":
    be_impatient(silence=8)  # a rank that trains on a busy machine may say nothing for seconds
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
elif __name__ == "__main__":
    distributed.run_script(main)
