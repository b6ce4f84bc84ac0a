"""What a training run will need, measured in a few steps before it starts: time, memory, disk."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from dataclasses import dataclass
from typing import Any

import torch as th

from .. import distributed
from ..config import UserError
from ..data.pixels import to_model_range
from ..logs import logger
from ..utils import files
from ..utils.outline import outline
from .ema import warn_of_slow_averages
from .loop import TrainLoop, get_blob_logdir
from .patience import ADVICE, ticking

STEPS = 3  # the first one is slower and does not count
LONGEST = 60.0  # seconds of a step, measured or estimated, after which no other one is tried
LARGEST_TRIED = 4096


def dry_run(loop: TrainLoop) -> None:
    """Train STEPS steps, saving nothing, and log what the run will need. Collective.

    One image comes first. A step that takes too long by its measure, or that needs more memory than there is, is not
    tried, so that the answer comes soon.
    """
    warn_of_slow_averages(loop.emas, loop.max_steps)
    start = time.perf_counter()
    batch, cond = next(loop.data)
    logger.log(f"dry run: the first batch of images took {time.perf_counter() - start:.2g} s to read")
    batch = to_model_range(batch, loop.device)
    with ticking("dry run: a pass over one image"):
        one = _time_one_image(loop, batch, cond)
    logger.log(f"dry run: a pass over one image took {one.seconds:.2g} s")
    largest = min(distributed.all_gather_object(_estimated_microbatch(loop, one)))
    part = min(loop.microbatch, largest)
    per_step, how = max(distributed.all_gather_object(_estimated_step(loop, batch, cond, one, part))), "estimated"
    if per_step <= LONGEST and largest >= loop.microbatch:
        per_step, how = _time_steps(loop), "measured"
        if _tells_out_of_memory(loop.device):
            largest = min(distributed.all_gather_object(_tried_microbatch(loop, batch, cond)))
    _report(loop, per_step, how, largest)
    if per_step > LONGEST:
        logger.warn(f"{per_step:.0f} s a step is too slow to train here: {ADVICE}")
    if largest < loop.microbatch:
        logger.warn(f"there is no memory for a microbatch of {loop.microbatch}: --microbatch {largest} needs less")


@dataclass(frozen=True)
class _OneImage:
    seconds: float  # of a forward and a backward pass
    saved_bytes: int  # that autograd keeps between them


def _time_one_image(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor]) -> _OneImage:
    start = time.perf_counter()
    saved = _saved_bytes(loop, batch, cond, 1)
    distributed.synchronize(loop.device)
    return _OneImage(time.perf_counter() - start, saved)


def _estimated_step(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor], one: _OneImage, part: int) -> float:
    """Seconds of a step, by passes over 1, 4, 16, ... and `part` images.

    As many as it takes to say that a step takes less than LONGEST, or that a pass itself takes long. The first pass is
    slower than the next, and a larger one takes less time for each image.
    """
    seconds, each = one.seconds, one.seconds
    for size in sorted({*(4**n for n in range(7) if 4**n < part), part}):
        if each * loop.batch_size <= LONGEST or seconds > LONGEST / 4:
            break
        start = time.perf_counter()
        _forward_backward(loop, batch, cond, size)
        distributed.synchronize(loop.device)
        seconds = time.perf_counter() - start
        each = seconds / size
    return each * loop.batch_size


def _time_steps(loop: TrainLoop) -> float:
    """Seconds of a step; the first one counts only where it is the only one. Collective."""
    seconds: list[float] = []
    while len(seconds) < STEPS and sum(seconds) < LONGEST:
        start = time.perf_counter()
        with ticking(f"dry run: step {len(seconds) + 1} of {STEPS}"):
            loop.run_step(*next(loop.data))
            loop.step += 1
            distributed.synchronize(loop.device)
        seconds.append(max(distributed.all_gather_object(time.perf_counter() - start)))
        logger.log(f"dry run: step {len(seconds)} of {STEPS} took {seconds[-1]:.3g} s")
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted)


def _report(loop: TrainLoop, per_step: float, how: str, largest: int) -> None:
    more = " or more" if largest >= LARGEST_TRIED else ""
    tried = "tried" if how == "measured" and _tells_out_of_memory(loop.device) else "estimated"
    rows = {
        "time per step": f"{per_step:.3g} s ({loop.global_batch / per_step:.4g} images/s; {how})",
        "time in all": _time_in_all(loop, per_step),
        "peak memory": _describe_memory(loop.device),
        "largest microbatch": f"{largest}{more} ({tried}; now {loop.microbatch})",
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


def check_memory(task: Any, precision: str, averages: int) -> None:
    """Raise UserError for a network that no memory of this machine holds, before it is made; warn of one that needs
    more than is free.

    :param averages: how many moving averages there will be.
    """
    with outline():
        count = sum(p.numel() for p in task.network().parameters())
    # Weights, gradient, Adam's two moments, averages; in 16 bits the network and its gradient are beside the master's.
    # A teacher has its weights alone.
    sixteen = precision != "fp32"
    need = count * (4 * (4 + averages) + (4 if sixteen else 0) + (2 if sixteen else 4) * task.frozen_copies())
    device = distributed.dev()
    free, total = _memory(device)
    parts = "weights, gradient, Adam, averages" + (", the teacher" if task.frozen_copies() else "")
    text = (
        f"the network has {count:,} parameters, for which training needs {_size(need)} of memory ({parts}) before the "
        "first image, and there are"
    )
    if need > total:
        raise UserError(f"{text} {_size(total)}: {ADVICE}")
    if need > free:
        logger.warn(f"{text} {_size(free)} free: {ADVICE}")


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


def _estimated_microbatch(loop: TrainLoop, one: _OneImage) -> int:
    """How many images fit in one forward and backward pass, beside the gradient and what Adam will keep; at least 1."""
    processes = distributed.get_world_size() if loop.device.type == "cpu" else 1
    free = _memory(loop.device)[0] // processes - 12 * sum(p.numel() for p in loop.model_params)
    return min(LARGEST_TRIED, max(1, free // max(one.saved_bytes, 1)))


def _tried_microbatch(loop: TrainLoop, batch: th.Tensor, cond: dict[str, th.Tensor]) -> int:
    """How many images fit in one forward and backward pass, found by trying."""
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
    """The bytes that autograd keeps between a forward pass over `size` images and its backward pass.

    The parameters, which it keeps too, do not count.
    """
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in loop.model_params}

    def note(tensor: th.Tensor) -> th.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with th.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _forward_backward(loop, batch, cond, size)
    return sum(storages.values())


def set_bytes(loop: TrainLoop) -> tuple[int, int]:
    """(bytes of a checkpoint set in float32, those of its files that are never removed)."""
    copy = 4 * sum(p.numel() for p in loop.model_params)
    snapshots = sum(hasattr(ema, "sigma_rel") for ema in loop.emas)
    others = getattr(loop.diffusion, "saved_copies", 0)
    return copy * (3 + len(loop.emas) + others), copy * snapshots  # the model, Adam's two moments, the averages


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
