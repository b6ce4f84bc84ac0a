"""What a training run will need, tried in three steps before it starts: time, memory, disk."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from typing import Any

import torch as th

from .. import distributed
from ..logs import logger
from ..utils import files
from .loop import TrainLoop, get_blob_logdir
from .metrics import peak_memory

STEPS = 3  # the first is slower, and not counted
LARGEST_TRIED = 4096


def dry_run(loop: TrainLoop) -> None:
    """Train STEPS steps, saving nothing, and log what the run will need. Collective."""
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        batch, cond = next(loop.data)
        loop.run_step(batch, cond)
        loop.step += 1
        if loop.device.type == "cuda":
            th.cuda.synchronize(loop.device)
        seconds.append(time.perf_counter() - start)
    per_step = sum(seconds[1:]) / (STEPS - 1)
    memory = peak_memory()
    largest = min(distributed.all_gather_object(_largest_microbatch(loop, batch, cond)))
    more = " or more" if largest >= LARGEST_TRIED else ""
    how = "tried" if loop.device.type == "cuda" else "estimated"
    rows = {
        "time per step": f"{per_step:.3g} s ({loop.global_batch / per_step:.4g} images/s)",
        "time in all": _time_in_all(loop, per_step),
        "peak memory": f"{_size(memory)} of {_size(_memory(loop.device)[1])} on each rank",
        "largest microbatch": f"{largest}{more} ({how}; now {loop.microbatch})",
        "checkpoints": _describe_disk(loop),
    }
    width = max(map(len, rows))
    logger.log("\n".join(["dry run:", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]))


def _time_in_all(loop: TrainLoop, per_step: float) -> str:
    if not loop.max_steps:
        return "without --max_steps the run does not end by itself"
    left = datetime.timedelta(seconds=round((loop.max_steps - loop.resume_step) * per_step))
    return f"{left.total_seconds() / 3600:.2f} hours to --max_steps {loop.max_steps:,}"


def _size(count: float) -> str:
    if count >= 1000 * 2**20:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.3g} MiB"


def _memory(device: th.device) -> tuple[int, int]:
    """(free, total) bytes of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return th.cuda.mem_get_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            table = dict(line.split(":") for line in f)
        return int(table["MemAvailable"].split()[0]) * 1024, total
    return total // 2, total  # what is free is not known: half of it, say


def _largest_microbatch(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor]) -> int:
    """How many images fit in one forward and backward pass."""
    if loop.device.type != "cuda":
        per_image = _saved_bytes(loop, batch, cond, 2) - _saved_bytes(loop, batch, cond, 1)
        return min(LARGEST_TRIED, max(1, _memory(loop.device)[0] // distributed.get_world_size() // max(per_image, 1)))
    fits, too_many, size = 0, LARGEST_TRIED + 1, loop.microbatch
    while too_many - fits > max(1, fits // 8):
        try:
            _forward_backward(loop, batch, cond, size)
            fits = size
        except th.cuda.OutOfMemoryError:
            too_many = size
        th.cuda.empty_cache()
        size = 2 * fits if 0 < 2 * fits < too_many else (fits + too_many) // 2
    return fits


def _forward_backward(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor], size: int) -> None:
    """One pass over copies of the first image, without the other ranks: they may have no room for it."""

    def repeat(values: th.Tensor) -> th.Tensor:
        return values[:1].to(loop.device).expand(size, *values.shape[1:]).contiguous()

    t, _ = loop.schedule_sampler.sample(size, loop.device)
    kwargs = {key: repeat(value) for key, value in cond.items()}
    losses: Any = loop.diffusion.training_losses(loop.model, repeat(batch), t, model_kwargs=kwargs)
    losses["loss"].mean().backward()
    for p in loop.model_params:
        p.grad = None


def _saved_bytes(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor], size: int) -> int:
    """The bytes that autograd keeps between a forward pass over `size` images and its backward pass."""
    storages: dict[int, int] = {}

    def note(tensor: th.Tensor) -> th.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with th.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _forward_backward(loop, batch, cond, size)
    return sum(storages.values())


def set_bytes(loop: TrainLoop) -> tuple[int, int]:
    """(bytes of a checkpoint set, bytes of it that are never removed), float32."""
    copy = 4 * sum(p.numel() for p in loop.model_params)
    snapshots = sum(hasattr(ema, "sigma_rel") for ema in loop.emas)
    return copy * (3 + len(loop.emas)), copy * snapshots  # the model, Adam's two moments, the averages


def checkpoint_bytes(loop: TrainLoop) -> tuple[int, int]:
    """(number of checkpoints, their bytes) that the run will add and leave on the disk at its end."""
    last = loop.max_steps or loop.resume_step + loop.save_interval
    numbers = [n for n in sorted({*range(0, last, loop.save_interval), last}) if n >= loop.resume_step]
    writer = loop.writer
    kept = numbers
    if writer.keep_last:
        old = numbers[: -writer.keep_last]
        kept = [n for n in old if writer.keep_every and n % writer.keep_every == 0] + numbers[-writer.keep_last :]
    whole, snapshots = set_bytes(loop)
    return len(kept), len(kept) * whole + (len(numbers) - len(kept)) * snapshots


def _free_disk(folder: str) -> int | None:
    return None if files.is_url(folder) or not os.path.isdir(folder) else shutil.disk_usage(folder).free


def _describe_disk(loop: TrainLoop) -> str:
    count, total = checkpoint_bytes(loop)
    folder = get_blob_logdir()
    free = _free_disk(folder)
    there = f"; {_size(free)} are free in {folder}" if free is not None else ""
    when = f"at --max_steps {loop.max_steps:,}" if loop.max_steps else "after the next --save_interval"
    return f"{_size(set_bytes(loop)[0])} each, {count} of them {when}: {_size(total)}{there}"


def warn_of_small_disk(loop: TrainLoop) -> None:
    """Say so before the run starts where the disk cannot take all its checkpoints."""
    free = _free_disk(get_blob_logdir())
    count, total = checkpoint_bytes(loop)
    if free is not None and total > free:
        logger.warn(
            f"the run's {count} checkpoints need {_size(total)}, and {get_blob_logdir()} has {_size(free)} free: give "
            "--keep_last, a larger --save_interval, or another --out_dir"
        )
