"""A training run from its settings: where it starts, its data, its network, its loop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch as th

from .. import __version__, distributed
from ..checkpoints import checkpoint, sets
from ..checkpoints.loading import read, take_options
from ..checkpoints.transfer import load_fitting, take_network
from ..config import AUTO_PRECISION, TrainConfig, UserError, comma_list, one_line
from ..config.recipes import AUTO
from ..config.settings import (
    ClassifierTraining,
    Distilling,
    ImageDistillation,
    SuperResDistillation,
    Training,
)
from ..data.cache import use_cache
from ..data.classes import check_several, read_classes
from ..data.dataset import ImageDataset
from ..data.sources import open_images, stem
from ..data.stream import BatchStream
from ..logs import logger
from ..logs.curves import DISTILLATION_PANELS, PANELS, Panel, write_curves
from ..logs.run_folder import Claims, RunFolder
from ..logs.trackers import make_trackers
from ..models.build import with_levels
from ..models.determinism import refusals_explained
from ..utils import files
from ..utils.text import counted, listed
from .auto import take_recipe
from .distillation.consistency import keep_stages
from .distillation.teacher import resume_student, take_teacher
from .dry_run import check_memory, dry_run, warn_of_small_disk
from .kinds import task_of
from .loop import TrainLoop, get_blob_logdir
from .resume import find_resume, folder_of_run
from .signals import EXIT_RESUME, Stopped, StopSignals
from .tasks import Task, take_guided_process
from .train_images import write_train_images

# Options of one start of a run rather than of the run itself.
_NOT_KEPT = {"out_dir", "resume", "resume_checkpoint", "init_checkpoint", "dry_run"}
MANY_EPOCHS = 1000  # beyond, a model may memorise its images


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended: its folder, the one of its checkpoints, and whether a signal stopped it."""

    folder: str
    checkpoints: str
    stopped: bool = False


def train(settings: Training | Distilling, given: frozenset[str], default_name: str, preset: str = "") -> TrainedRun:
    """Train as the settings say. Collective.

    :param given: the options that the user gave; the others may come from the checkpoint that is resumed.
    :param default_name: of the folder below ./runs, where neither --out_dir nor a preset says.
    :param preset: names the folder; `auto`, after which the images name it, also chooses the options that were not
        given, unless the run is resumed.
    Raises UserError for what cannot work, before training starts and before the folder is made. However it ends, the
    log is then closed and the folder free for another run. Raises Stopped for a SIGTERM or SIGHUP before the first
    step.
    """
    with StopSignals(starting=True) as signals:
        try:
            return _train(settings, given, default_name, preset, signals)
        except Stopped as stopped:
            logger.log(str(stopped))
            if distributed.get_world_size() > 1:  # the other ranks may wait for this one
                distributed.end_process(EXIT_RESUME)
            raise


def _train(
    settings: Training | Distilling, given: frozenset[str], default_name: str, preset: str, signals: StopSignals
) -> TrainedRun:
    with contextlib.ExitStack() as until_end:
        claims = until_end.enter_context(Claims())
        own_folder = "" if settings.run.out_dir else folder_of_run(settings.train)
        settings = settings.replace(out_dir=own_folder or settings.run.out_dir)
        folder = RunFolder(settings.run, _run_name(settings, default_name, preset))
        until_end.callback(logger.reset)  # the trackers' last rows leave before the ranks part, or are ended
        until_end.push(lambda kind, error, traceback: logger.log_error(error))
        until_end.enter_context(refusals_explained())
        if own_folder:
            logger.log(f"the run continues in its own folder, {own_folder}: --out_dir chooses another")
        checkpoints = get_blob_logdir()
        if not settings.train.dry_run:
            distributed.from_rank0(claims.claim, [folder.path, checkpoints], False)
        settings, metadata, source = resolve(settings, given, preset)
        data, settings = open_data(settings, metadata, source)
        task = task_of(settings, metadata)
        stream = until_end.enter_context(contextlib.closing(task.stream(data)))
        loop, description = build_loop(task, data, stream)
        loop.signals = signals
        if settings.train.dry_run:
            dry_run(loop)
            return TrainedRun(folder.path, checkpoints)
        distributed.from_rank0(claims.claim, [folder.path, checkpoints])
        folder.open()
        if distributed.get_rank() == 0:
            write_train_images(data, folder.path)
        return TrainedRun(folder.path, checkpoints, run_loop(loop, settings, description, claims))


def _run_name(settings: Training | Distilling, default_name: str, preset: str) -> str:
    if preset == AUTO:
        return stem(os.path.abspath(settings.data.data_dir)) or default_name
    return preset or default_name


# Where it starts


def resolve(
    settings: Training | Distilling, given: frozenset[str], preset: str = ""
) -> tuple[Training, dict[str, Any], Any]:
    """(settings with all that follows from a checkpoint, the images and the number of ranks; that checkpoint's metadata
    or {}; the training images).

    `resume_checkpoint` becomes the file to continue from. Options that were not given come from it, or, those of the
    model, from --teacher or --init_checkpoint, or, with the preset `auto`, from a recipe. Collective.
    """
    if isinstance(settings, ClassifierTraining):
        settings, given = take_guided_process(settings, given)
    if settings.train.precision == AUTO_PRECISION:
        given -= {"precision"}  # a resumed run keeps what it was chosen to be
    resumed = distributed.from_rank0(find_resume, settings.train, given)
    metadata: dict[str, Any] = {}
    if resumed:
        state_dict, metadata = checkpoint.load(resumed)
        if isinstance(settings, Distilling):
            settings = resume_student(settings, given, resumed, metadata)
        elif "distilled" in metadata:
            raise UserError(f"{resumed} is from a distillation: improved-diffusion distill continues it")
        left_out = _NOT_KEPT | ({"total_batch_size"} if "batch_size" in given else set())
        settings = take_options(settings, given, resumed, state_dict, metadata, settings.options().keys() - left_out)
        if isinstance(settings, (ImageDistillation, SuperResDistillation)):
            settings = keep_stages(settings, given, metadata)
    elif isinstance(settings, Distilling):
        settings, metadata = take_teacher(settings, given)
    with distributed.working(f"the list of the images in {settings.data.data_dir}"):
        source = open_images(settings.data.data_dir)
    if preset == AUTO and not resumed:
        settings = take_recipe(settings, given, source)
    if not resumed and settings.train.init_checkpoint and not metadata:
        of_classifier = isinstance(settings, ClassifierTraining)
        path, state_dict, metadata = read(settings.train.init_checkpoint, "--init_checkpoint", of_classifier)
        settings = take_network(settings.replace(init_checkpoint=path), given, path, state_dict, metadata)
    settings = settings.replace(**_continued(settings, resumed))
    model = with_levels(settings.model, given, new=not (resumed or settings.train.init_checkpoint))
    settings = settings.replace(**{name: getattr(model, name) for name in ("channel_mult", model.attention_option)})
    settings = _share_batch(settings, given)
    if resumed:
        _log_changes(settings, given, metadata.get("config", {}))
    return settings, metadata, source


def _continued(settings: Training, resumed: str) -> dict[str, Any]:
    """The options of where a run starts: from `resumed`, or "" at step 0."""
    if not resumed:
        return {"resume": "", "resume_checkpoint": ""}
    return {"resume": resumed if settings.train.resume else "", "resume_checkpoint": resumed, "init_checkpoint": ""}


def _log_changes(settings: Training, given: frozenset[str], before: Mapping[str, Any]) -> None:
    now = settings.values()
    changes = [
        f"--{name} {one_line(before[name])} -> {now[name]}"
        for name in sorted(before.keys() & given - _NOT_KEPT)
        if before[name] != now[name]
    ]
    if changes:
        logger.log(f"changed since the checkpoint was written: {', '.join(changes)}")


def _share_batch(settings: Training, given: frozenset[str]) -> Training:
    """The settings with each rank's batch size and the total."""
    train, world_size = settings.train, distributed.get_world_size()
    batch_size = train.batch_size
    if train.total_batch_size:
        if train.total_batch_size % world_size:
            raise UserError(
                f"--total_batch_size {train.total_batch_size} cannot be shared evenly by {world_size} ranks"
            )
        batch_size = train.total_batch_size // world_size
        if {"batch_size", "total_batch_size"} <= given and train.batch_size != batch_size:
            raise UserError(
                f"--batch_size {train.batch_size} on {world_size} ranks contradicts --total_batch_size "
                f"{train.total_batch_size}: give one of them"
            )
    total = batch_size * world_size
    logger.log(f"total batch: {total} images a step ({batch_size} per rank x {world_size} ranks)")
    return settings.replace(batch_size=batch_size, total_batch_size=total)


# Its data


def open_data(settings: Training, metadata: Mapping[str, Any], source: Any) -> tuple[BatchStream, Training]:
    """(the batches of the training images, which are described in the log and checked; the settings with the number of
    classes). Collective."""
    data_options, model, needs_classes = settings.data, settings.model, task_of(settings).needs_classes
    label_drop = 0.0 if isinstance(settings, ClassifierTraining) else settings.model.label_drop
    if label_drop and not needs_classes:
        raise UserError(
            f"--label_drop {label_drop} hides classes, but the model has none: leave it out or, for a new model, give "
            "--class_cond True"
        )
    classes, names = None, None
    if needs_classes:
        classes, names = read_classes(
            source, data_options.labels, data_options.data_dir, model.num_classes, _earlier_model(settings)
        )
        if not model.num_classes:
            otherwise = "drop --class_cond, or give --num_classes 1 to train with one class"
            if isinstance(settings, ClassifierTraining):
                otherwise = "a classifier needs two classes or more"
            check_several(source, data_options.labels, data_options.data_dir, names, otherwise)
    dataset = ImageDataset(model.size, source, classes, channels=model.channels, reading=settings.reading)
    use_cache(dataset, data_options.cache, data_options.data_dir, _epochs(settings, len(dataset)),
              build=not settings.train.dry_run)  # fmt: skip
    data = BatchStream(
        dataset,
        settings.train.batch_size,
        class_names=names,
        seed=settings.run.seed,
        random_flip=data_options.random_flip,
        label_drop=label_drop,
        num_workers=data_options.num_workers,
        as_bytes=True,
    )
    for name in data.skipped_names():
        logger.warn(f"{name} is unreadable and left out")
    if data.checked.done:
        part = f" (of {data.checked.num_read:,} read)" if data.checked.num_read < data.num_images else ""
        logger.log(f"{data_options.data_dir}: {data.checked.describe()}{part}")
    if names is not None:
        settings = _count_classes(settings, names, metadata)
    before = metadata.get("num_images", data.num_images)
    if settings.train.resume_checkpoint and before != data.num_images:
        logger.warn(f"{data_options.data_dir} had {before} images before: the order changes from here on")
    seen = [names[i] for i in data.seen_classes] if names is not None else None
    _log_epochs(settings, data.num_images, seen)
    return data, settings


def _earlier_model(settings: Training) -> str:
    """The checkpoint that a run continues or distils; "" for a new model."""
    return settings.train.resume_checkpoint or settings.values().get("teacher", "")


def _count_classes(settings: Training, names: list[str], metadata: Mapping[str, Any]) -> Training:
    data_dir, before = settings.data.data_dir, metadata.get("class_names")
    origin = _earlier_model(settings)
    if before and names != before and origin:
        raise UserError(
            f"{data_dir} has the classes {names[:10]} but {origin} has {before[:10]}: give images of all of these "
            "classes and no others, and --labels if their names are not read as they were"
        )
    wanted = settings.model.num_classes
    if wanted and len(names) > wanted:
        raise UserError(
            f"{data_dir} has {len(names)} classes, more than --num_classes {wanted} of the model: give images of fewer "
            "classes or, for a new model, leave --num_classes out"
        )
    return settings.replace(num_classes=wanted or len(names))


def _epochs(settings: Training, num_images: int) -> float:
    """How often the run sees each image; infinity for a run without a last step."""
    end = settings.train.max_steps or settings.train.lr_anneal_steps
    return end * settings.train.total_batch_size / num_images if end else math.inf


def _log_epochs(settings: Training, num_images: int, names: list[str] | None) -> None:
    text = f"{settings.data.data_dir}: {counted(num_images, 'image')}"
    if names is not None:
        text += f" of {counted(len(names), 'class', 'classes')} ({listed(names, 10)})"
    steps = settings.train.max_steps or settings.train.lr_anneal_steps or 10_000
    logger.log(f"{text}; {counted(steps, 'step')}: {steps * settings.train.total_batch_size / num_images:,.1f} epochs")
    epochs = _epochs(settings, num_images)
    if MANY_EPOCHS < epochs < math.inf:
        logger.warn(
            f"the run sees each image {epochs:,.0f} times and may overfit (memorise the images): --val_dir shows "
            "whether it does, --dropout and --random_flip help, and more images help most"
        )


# Its network and its loop


def build_loop(task: Task, data: BatchStream, stream: Any) -> tuple[TrainLoop, dict[str, Any]]:
    """(the loop, resumed where `resume_checkpoint` is set; the description in its checkpoints). Collective."""
    train = task.settings.train
    use_fp16 = train.use_fp16 or task.settings.values().get("classifier_use_fp16")
    precision = "fp16" if use_fp16 else distributed.from_rank0(_chosen, train.precision)
    task.settings = settings = task.settings.replace(precision=precision, use_fp16=False)
    th.manual_seed(settings.run.seed)
    check_memory(task, precision, len(comma_list(train.ema_rate, float)) + len(comma_list(train.ema_sigma_rel, float)))
    model, objective = task.build()
    if train.init_checkpoint:
        state_dict, other = checkpoint.load(train.init_checkpoint, classifier=isinstance(settings, ClassifierTraining))
        load_fitting(model, state_dict, train.init_checkpoint, (other.get("class_names"), data.class_names))
    model.to(distributed.dev())
    _log_model(settings, model)
    config = {name: value for name, value in sorted(settings.values().items()) if name not in _NOT_KEPT}
    description = {
        "version": __version__, "config": config, "class_names": data.class_names, "num_images": data.num_images,
        "seen_classes": data.seen_classes if len(data.seen_classes) < len(data.class_names or ()) else None,
        **task.description(objective),
    }  # fmt: skip
    own = {"batch_size", "schedule_sampler", "resume", "init_checkpoint", "total_batch_size", "dry_run"}
    loop = TrainLoop(
        model=model,
        diffusion=objective,
        data=stream,
        batch_size=train.batch_size,
        schedule_sampler=task.schedule_sampler(objective),
        seed=settings.run.seed,
        metadata=description,
        hooks=[] if train.dry_run else task.hooks(objective, data),
        speed=settings.speed,
        strict_resume=bool(train.resume),  # --resume_checkpoint takes weights alone, as published
        **{f.name: getattr(settings.train, f.name) for f in fields(TrainConfig) if f.name not in own},
    )
    return loop, description


def _chosen(precision: str) -> str:
    """The precision that an option means on this device."""
    if precision != AUTO_PRECISION:
        return precision
    return "bf16" if distributed.computes_bf16(distributed.dev()) else "fp32"


def _log_model(settings: Training, model: th.nn.Module) -> None:
    train, watch = settings.train, settings.watch
    if train.precision == "fp16" and distributed.dev().type == "cpu":
        logger.warn("float16 is slow on CPUs: --precision bf16 or fp32 is faster there")
    logger.log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {train.precision}")
    if not (train.max_steps or train.lr_anneal_steps or train.max_hours):
        logger.log("no --max_steps, --max_hours or --lr_anneal_steps: training goes on until it is stopped (Ctrl-C)")
    if watch.val_dir and 0 < train.max_steps < watch.val_interval:
        logger.warn(f"--val_interval {watch.val_interval} is more than --max_steps {train.max_steps}: no validation")


def run_loop(loop: TrainLoop, settings: Training, description: Mapping[str, Any], claims: Claims) -> bool:
    """Train, with trackers and curves; returns whether a signal stopped it, after a checkpoint. Collective."""
    if distributed.get_rank() == 0:
        # Not before the loop has what it resumes from: a run that is refused leaves the older description.
        _write_description(description)
        loop.checkpointer.writer.prepare = lambda: _renew(claims, description)
    distributed.from_rank0(_open_trackers, settings.watch.trackers, description["config"], loop.run_log.first_row)
    warn_of_small_disk(loop)
    try:
        loop.run_loop()
        return False
    except Stopped:
        return True
    finally:
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if distributed.get_rank() == 0 and loop.step and not interrupted:
            _draw_curves(logger.get_dir(), DISTILLATION_PANELS if "distilled" in description else PANELS)


def _write_description(description: Mapping[str, Any]) -> None:
    path = files.join(get_blob_logdir(), sets.CONFIG_FILE)
    files.write_bytes(path, json.dumps(description, indent=1).encode())


def _renew(claims: Claims, description: Mapping[str, Any]) -> str:
    """Make the run's folders again if somebody has removed them; returns a warning, or ""."""
    gone = claims.renew()
    if gone:
        _write_description(description)
    return f"{' and '.join(gone)} had been removed: made again for this checkpoint; older ones are lost" if gone else ""


def _open_trackers(names: str, config: dict[str, Any], resume_step: int) -> None:
    for tracker in make_trackers(comma_list(names, str.strip), logger.get_dir(), config, resume_step):
        logger.add_output(tracker)


def _draw_curves(folder: str, panels: Sequence[Panel]) -> None:
    """curves.png of progress.csv; what goes wrong with it must not hide how the run ended."""
    try:
        write_curves(os.path.join(folder, "progress.csv"), os.path.join(folder, "curves.png"), panels)
        logger.log(f"wrote {os.path.join(folder, 'curves.png')}")
    except Exception as error:
        logger.warn(f"no curves.png: {error}")
