"""A training run: its folder, data, model and loop."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import fields
from typing import Any

import torch as th

from .. import __version__, distributed
from ..checkpoints import checkpoint, sets
from ..checkpoints.loading import adopt, build
from ..config import TrainConfig, UserError, comma_list
from ..data.dataset import ImageDataset
from ..data.sources import open_images, read_classes
from ..data.stream import BatchStream
from ..logs import logger
from ..logs.curves import write_curves
from ..logs.trackers import make_trackers
from ..models.factories import resolve_channel_mult
from ..resample import create_named_schedule_sampler
from ..utils import files
from .dry_run import dry_run, warn_of_small_disk
from .loop import TrainLoop, get_blob_logdir
from .resume import _find_resume
from .signals import EXIT_RESUME, Stopped, catch_early_warning

# What belongs to one start of a run and not to the run itself.
_NOT_KEPT = {"given", "flags", "preset", "out_dir", "resume", "resume_checkpoint", "init_checkpoint", "dry_run"}
MANY_EPOCHS = 1000  # a run that sees each image more often than this may learn them by heart


def run_folder(options: argparse.Namespace, default_name: str) -> str:
    """The folder that everything is written to: --out_dir, else OPENAI_LOGDIR, else ./runs/<default_name>."""
    return options.out_dir or os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", default_name)


def start_run(options: argparse.Namespace, default_name: str) -> str:
    """Join the other ranks and open the run's `run_folder`.

    Returns the folder's absolute path, which is printed, as are the ranks. Collective.
    """
    distributed.setup_dist()
    if hasattr(options, "max_steps"):
        catch_early_warning()
    out_dir = run_folder(options, default_name)
    only_said = ["stdout"] if distributed.get_rank() == 0 else []
    logger.configure(dir=out_dir, format_strs=only_said if getattr(options, "dry_run", False) else None)
    logger.log(distributed.describe_ranks())
    return logger.get_dir()


def prepare_training(options: argparse.Namespace) -> dict[str, Any]:
    """Settle what a training run starts from, before anything is built; returns that checkpoint's metadata, or {}.

    Claims the run's folder. Resolves --resume to a file in `resume_checkpoint`, takes options that were not given from
    it (or, those of the model, from --init_checkpoint), and each rank's batch size from --total_batch_size. Collective.
    """
    if not options.dry_run:
        distributed.from_rank0(_claim, logger.get_dir(), get_blob_logdir())
    options.resume_checkpoint = distributed.from_rank0(_find_resume, options)
    metadata: dict[str, Any] = {}
    source = options.resume_checkpoint or options.init_checkpoint
    if source:
        state_dict, metadata = checkpoint.load(source)
        left_out = _NOT_KEPT | ({"total_batch_size"} if "batch_size" in options.given else set())
        resumed = [name for name in vars(options) if name not in left_out]
        adopt(options, source, state_dict, metadata, resumed if options.resume_checkpoint else None)
    if options.resume_checkpoint:
        options.init_checkpoint = ""
    size = _training_size(options)
    options.channel_mult = ",".join(map(str, resolve_channel_mult(size, options.channel_mult)))
    _share_batch(options)
    if options.resume_checkpoint:
        _log_changes(options, metadata.get("config", {}))
    return metadata


def _claim(*folders: str) -> None:
    for folder in dict.fromkeys(folders):
        files.make_dirs(folder)
        files.lock(folder)
        files.remove_leftovers(folder)


def _log_changes(options: argparse.Namespace, before: dict[str, Any]) -> None:
    changes = [
        f"--{name} {before[name]} -> {getattr(options, name)}"
        for name in sorted(before.keys() & options.given - _NOT_KEPT)
        if before[name] != getattr(options, name)
    ]
    if changes:
        logger.log(f"changed since the checkpoint was written: {', '.join(changes)}")


def _training_size(options: argparse.Namespace) -> Any:
    return options.large_size if hasattr(options, "large_size") else options.image_size


def _share_batch(options: argparse.Namespace) -> None:
    world_size = distributed.get_world_size()
    if options.total_batch_size:
        if options.total_batch_size % world_size:
            raise UserError(
                f"--total_batch_size {options.total_batch_size} cannot be shared evenly by {world_size} ranks"
            )
        share = options.total_batch_size // world_size
        if "batch_size" in options.flags and options.batch_size != share:
            raise UserError(
                f"--batch_size {options.batch_size} on {world_size} ranks contradicts --total_batch_size "
                f"{options.total_batch_size}: give one of them"
            )
        options.batch_size = share
    options.total_batch_size = options.batch_size * world_size
    logger.log(
        f"total batch: {options.total_batch_size} images a step ({options.batch_size} per rank x {world_size} ranks)"
    )


def open_training_data(options: argparse.Namespace, metadata: dict[str, Any]) -> BatchStream:
    """The training images, described in the log and checked; settles the number of classes. Collective."""
    label_drop = getattr(options, "label_drop", 0.0)
    if label_drop and not options.class_cond:
        raise UserError(f"--label_drop {label_drop} hides classes, of which there are none: give --class_cond True")
    source = open_images(options.data_dir)
    classes, names = read_classes(source, options.labels, options.data_dir) if options.class_cond else (None, None)
    dataset = ImageDataset(_training_size(options), source, classes, channels=options.channels)
    data = BatchStream(
        dataset, options.batch_size, class_names=names, seed=options.seed, random_flip=options.random_flip,
        label_drop=label_drop, num_workers=options.num_workers,
    )  # fmt: skip
    for name in data.skipped_names():
        logger.warn(f"{name} is unreadable and left out")
    text = f"{options.data_dir}: {data.num_images} images"
    if names is not None:
        before = metadata.get("class_names")
        if before and names != before and options.resume_checkpoint:
            raise UserError(
                f"{options.data_dir} has the classes {names[:10]} but {options.resume_checkpoint} has {before[:10]}"
            )
        if options.num_classes and len(names) > options.num_classes:
            raise UserError(
                f"{options.data_dir} has {len(names)} classes, more than --num_classes {options.num_classes}"
            )
        options.num_classes = options.num_classes or len(names)
        text += f" of {len(names)} classes ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
    before = metadata.get("num_images", data.num_images)
    if options.resume_checkpoint and before != data.num_images:
        logger.warn(f"{options.data_dir} had {before} images before: from here on they come in another order")
    steps = options.max_steps or options.lr_anneal_steps or 10_000
    epochs = steps * options.total_batch_size / data.num_images
    logger.log(f"{text}; {steps:,} steps are {epochs:,.1f} epochs")
    if epochs > MANY_EPOCHS and (options.max_steps or options.lr_anneal_steps):
        logger.warn(
            f"the run sees each image {epochs:,.0f} times and may learn them by heart: --val_dir shows whether it "
            "does, --dropout and --random_flip help, and more images help most"
        )
    return data


def train(options: argparse.Namespace, data: Any, class_names: Any, hooks: Any, build: Any = build) -> None:
    """Build the model and train it. Collective.

    :param hooks: diffusion -> the loop's hooks.
    :param build: options -> (model, diffusion, or whatever else has num_timesteps and training_losses).
    """
    th.manual_seed(options.seed)
    model, diffusion = build(options)
    if options.init_checkpoint:
        state_dict, _ = checkpoint.load(options.init_checkpoint)
        checkpoint.load_into(model, state_dict, options.init_checkpoint)
        logger.log(f"weights of {options.init_checkpoint}, from step 0")
    model.to(distributed.dev())
    if options.use_fp16:
        options.precision, options.use_fp16 = "fp16", False
    if options.precision == "fp16" and distributed.dev().type == "cpu":
        logger.warn("float16 is slow on CPUs: --precision bf16 or fp32 is faster there")
    logger.log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {options.precision}")
    if not (options.max_steps or options.lr_anneal_steps or options.max_hours):
        logger.log("no --max_steps, --max_hours or --lr_anneal_steps: training goes on until it is stopped (Ctrl-C)")
    if options.val_dir and 0 < options.max_steps < options.val_interval:
        logger.warn(
            f"--val_interval {options.val_interval} is more than --max_steps {options.max_steps}: no validation"
        )
    config = {name: value for name, value in sorted(vars(options).items()) if name not in _NOT_KEPT}
    metadata = {"version": __version__, "config": config, "class_names": class_names, "num_images": data.num_images}
    own = {"batch_size", "schedule_sampler", "resume", "init_checkpoint", "total_batch_size", "dry_run"}
    arguments = {f.name: getattr(options, f.name) for f in fields(TrainConfig) if f.name not in own}
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        batch_size=options.batch_size,
        schedule_sampler=create_named_schedule_sampler(options.schedule_sampler, diffusion),
        seed=options.seed,
        metadata=metadata,
        hooks=[] if options.dry_run else hooks(diffusion),
        strict_resume=True,
        **arguments,
    )
    with contextlib.closing(data):
        if options.dry_run:
            dry_run(loop)
            if distributed.get_rank() == 0:
                with contextlib.suppress(OSError):
                    os.rmdir(logger.get_dir())  # where there was none before
            return
        if distributed.get_rank() == 0:
            # Not before the loop has what it resumes from: a run that is refused leaves the older description.
            path = files.join(get_blob_logdir(), sets.CONFIG_FILE)
            files.write_bytes(path, json.dumps(metadata, indent=1).encode())
        distributed.from_rank0(_open_trackers, options.trackers, config, loop.run_log.first_row)
        warn_of_small_disk(loop)
        try:
            loop.run_loop()
        except Stopped:
            raise SystemExit(EXIT_RESUME) from None
        finally:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                if distributed.get_rank() == 0 and loop.step:
                    _draw_curves(logger.get_dir())
                logger.reset()  # the trackers' last rows leave before the ranks part, or are ended


def _open_trackers(names: str, config: dict[str, Any], resume_step: int) -> None:
    for tracker in make_trackers(comma_list(names, str.strip), logger.get_dir(), config, resume_step):
        logger.add_output(tracker)


def _draw_curves(folder: str) -> None:
    """curves.png of progress.csv; what goes wrong with it must not hide how the run ended."""
    try:
        write_curves(os.path.join(folder, "progress.csv"), os.path.join(folder, "curves.png"))
        logger.log(f"wrote {os.path.join(folder, 'curves.png')}")
    except (UserError, OSError) as error:
        logger.warn(f"no curves.png: {error}")
