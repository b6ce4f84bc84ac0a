"""What a training run will need, measured in three steps before it starts: time, memory, disk."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from typing import Any

import torch as th

from .. import distributed
from ..config import UserError
from ..logs import logger
from ..utils import files
from .loop import TrainLoop, get_blob_logdir

STEPS = 3  # the first one is slower and does not count
LARGEST_TRIED = 4096


def dry_run(loop: TrainLoop) -> None:
    """Train STEPS steps, saving nothing, and log what the run will need. Collective."""
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        batch, cond = next(loop.data)
        loop.run_step(batch, cond)
        loop.step += 1
        distributed.synchronize(loop.device)
        seconds.append(time.perf_counter() - start)
    per_step = sum(seconds[1:]) / (STEPS - 1)
    largest = min(distributed.all_gather_object(_largest_microbatch(loop, batch, cond)))
    more = " or more" if largest >= LARGEST_TRIED else ""
    how = "tried" if _tells_out_of_memory(loop.device) else "estimated"
    rows = {
        "time per step": f"{per_step:.3g} s ({loop.global_batch / per_step:.4g} images/s)",
        "time in all": _time_in_all(loop, per_step),
        "peak memory": _describe_memory(loop.device),
        "largest microbatch": f"{largest}{more} ({how}; now {loop.microbatch})",
        "checkpoints": _describe_disk(loop),
    }
    width = max(map(len, rows))
    logger.log("\n".join(["dry run:", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]))


def _time_in_all(loop: TrainLoop, per_step: float) -> str:
    if not loop.max_steps:
        return "unlimited: there is no --max_steps"
    left = datetime.timedelta(seconds=round((loop.max_steps - loop.resume_step) * per_step))
    return f"{left.total_seconds() / 3600:.2f} hours to --max_steps {loop.max_steps:,}"


def _describe_memory(device: th.device) -> str:
    peak = distributed.peak_memory(device)
    return f"{'unknown' if peak is None else _size(peak)} of {_size(_memory(device)[1])} on each rank"


def _memory(device: th.device) -> tuple[int, int]:
    """(free, total) bytes of the accelerator that tells, else of the machine (half of it where free is not known)."""
    found = distributed.memory_info(device)
    if found is not None:
        return found
    if not hasattr(os, "sysconf"):
        raise UserError("the size of this machine's memory is not known: --dry_run needs Linux or macOS")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            table = dict(line.split(":") for line in f)
        return int(table["MemAvailable"].split()[0]) * 1024, total
    return total // 2, total


def _size(count: float) -> str:
    if count >= 1000 * 2**20:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.3g} MiB"


def _tells_out_of_memory(device: th.device) -> bool:
    """Whether a batch that is too large raises OutOfMemoryError, rather than ending the process."""
    return device.type in ("cuda", "xpu")


def _largest_microbatch(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor]) -> int:
    """How many images fit in one forward and backward pass."""
    if not _tells_out_of_memory(loop.device):
        per_image = _saved_bytes(loop, batch, cond, 2) - _saved_bytes(loop, batch, cond, 1)
        free = _memory(loop.device)[0] // distributed.get_world_size()
        return min(LARGEST_TRIED, max(1, free // max(per_image, 1)))
    fits, too_many, size = 0, LARGEST_TRIED + 1, loop.microbatch
    while too_many - fits > max(1, fits // 8):
        try:
            _forward_backward(loop, batch, cond, size)
            fits = size
        except RuntimeError as error:
            if not distributed.is_out_of_memory(error):
                raise
            too_many = size
        distributed.empty_cache(loop.device)
        size = 2 * fits if 0 < 2 * fits < too_many else (fits + too_many) // 2
    return fits


def _forward_backward(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor], size: int) -> None:
    """One pass over copies of the first image, on this rank alone: the others may not have the memory."""

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
    """(bytes of a checkpoint set in float32, those of its files that are never removed)."""
    copy = 4 * sum(p.numel() for p in loop.model_params)
    snapshots = sum(hasattr(ema, "sigma_rel") for ema in loop.emas)
    return copy * (3 + len(loop.emas)), copy * snapshots  # the model, Adam's two moments, the averages


def checkpoint_bytes(loop: TrainLoop) -> tuple[int, int]:
    """(number, total bytes) of the checkpoints that the run will add, and that remain at its end."""
    last = loop.max_steps or loop.resume_step + loop.save_interval
    numbers = [n for n in sorted({*range(0, last, loop.save_interval), last}) if n >= loop.resume_step]
    keep_last, keep_every = loop.checkpointer.keep_last, loop.checkpointer.keep_every
    kept = numbers
    if keep_last:
        kept = [n for n in numbers[:-keep_last] if keep_every and n % keep_every == 0] + numbers[-keep_last:]
    whole, snapshots = set_bytes(loop)
    return len(kept), len(kept) * whole + (len(numbers) - len(kept)) * snapshots


def _free_disk(folder: str) -> int | None:
    """The free bytes where the folder is, or will be made; None where that is not known."""
    if files.is_url(folder):
        return None
    place = os.path.abspath(folder)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free


def _describe_disk(loop: TrainLoop) -> str:
    count, total = checkpoint_bytes(loop)
    folder = get_blob_logdir()
    free = _free_disk(folder)
    there = f"; {_size(free)} are free in {folder}" if free is not None else ""
    when = f"at --max_steps {loop.max_steps:,}" if loop.max_steps else "after the next --save_interval"
    return f"{_size(set_bytes(loop)[0])} each, {count} of them {when}: {_size(total)}{there}"


def warn_of_small_disk(loop: TrainLoop) -> None:
    """Warn before the run starts if the disk has too little space for its checkpoints."""
    free = _free_disk(get_blob_logdir())
    count, total = checkpoint_bytes(loop)
    if free is not None and total > free:
        logger.warn(
            f"the run's {count} checkpoints need {_size(total)}, and {get_blob_logdir()} has {_size(free)} free: use "
            "--keep_last, a larger --save_interval, or another --out_dir"
        )
