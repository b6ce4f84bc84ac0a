"""What the scripts share: a run's folder, what it starts from, its data, its training loop."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch as th

from . import __version__, checkpoint, checkpoint_sets, dist_util, files, logger
from .config import (
    NUM_CLASSES,
    TrainConfig,
    UserError,
    comma_list,
    fixed_names,
    height_width,
)
from .curves import write_curves
from .dry_run import dry_run, warn_of_small_disk
from .image_datasets import BatchStream, ImageDataset
from .image_sources import ArrayImages, open_images, open_pictures, read_classes, stem
from .resample import create_named_schedule_sampler
from .script_util import adopt, build, resolve_channel_mult
from .stop_signals import catch_early_warning
from .trackers import make_trackers
from .train_util import TrainLoop, get_blob_logdir

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
    dist_util.setup_dist()
    if hasattr(options, "max_steps"):
        catch_early_warning()
    out_dir = run_folder(options, default_name)
    only_said = ["stdout"] if dist_util.get_rank() == 0 else []
    logger.configure(dir=out_dir, format_strs=only_said if getattr(options, "dry_run", False) else None)
    logger.log(dist_util.describe_ranks())
    return logger.get_dir()


def prepare_training(options: argparse.Namespace) -> dict[str, Any]:
    """Settle what a training run starts from, before anything is built; returns that checkpoint's metadata, or {}.

    Claims the run's folder. Resolves --resume to a file in `resume_checkpoint`, takes options that were not given from
    it (or, those of the model, from --init_checkpoint), and each rank's batch size from --total_batch_size. Collective.
    """
    if not options.dry_run:
        dist_util.from_rank0(_claim, logger.get_dir(), get_blob_logdir())
    options.resume_checkpoint = dist_util.from_rank0(_find_resume, options)
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


def _find_resume(options: argparse.Namespace) -> str:
    """The modelNNNNNN.pt to go on from, "" to start afresh."""
    wanted = options.resume or options.resume_checkpoint
    folder = get_blob_logdir()
    if not wanted:
        if _holds_a_run(folder) and not options.dry_run:
            raise UserError(
                f"{folder} holds checkpoints of an earlier run: give --resume auto to go on, or another --out_dir"
            )
        return ""
    if wanted == "auto":
        return _newest(options, folder) or _none_to_resume(options, folder)
    if files.is_dir(wanted):
        newest = _newest(options, wanted)
        if not newest:
            raise UserError(
                f"--resume {wanted}: no complete checkpoint (model, ema and opt files of one step) in that folder"
            )
        return newest
    step = checkpoint_sets.step_of(wanted)
    if step is None:
        raise UserError(
            f"--resume {wanted}: name a modelNNNNNN.pt or another file of its set (ema_*, opt), or a folder; to start "
            "at step 0 from the weights of any other file, use --init_checkpoint"
        )
    folder = wanted.replace("\\", "/").rpartition("/")[0] or "."
    problem = checkpoint_sets.problem_of(folder, step)
    if problem:
        raise UserError(f"--resume {wanted}: {problem}; --resume {folder} takes the newest checkpoint that is whole")
    return files.join(folder, checkpoint.model_name(step))


def _newest(options: argparse.Namespace, folder: str) -> str:
    """The model's file of the newest whole set in a folder, "" where there is none."""
    step = checkpoint_sets.newest_whole_set(folder, _wanted_labels(options, folder), logger.warn)
    return "" if step is None else files.join(folder, checkpoint.model_name(step))


def _none_to_resume(options: argparse.Namespace, folder: str) -> str:
    """Start afresh, unless that would overwrite the rest of a run."""
    if _holds_a_run(folder):
        newest = checkpoint.model_name(checkpoint.model_steps(folder)[-1])
        parts = ", ".join(["model", *(f"ema_{label}" for label in _wanted_labels(options, folder)), "opt", "manifest"])
        raise UserError(
            f"--resume auto: {folder} holds {newest}, but of no step all of {parts}, whole: bring the missing files "
            "back or choose another --out_dir; to start at step 0 from weights alone, use --init_checkpoint"
        )
    logger.log(f"--resume auto: no complete checkpoint in {folder}, so training starts at step 0")
    return ""


def _holds_a_run(folder: str) -> bool:
    """Whether a new run would overwrite another's checkpoints; what a first save left that was cut off does not."""
    return any(checkpoint.model_steps(folder)) or bool(checkpoint_sets.complete_sets(folder, []))


def _ema_labels(rates: str, widths: str) -> list[str]:
    return [*map(str, comma_list(rates, float)), *(f"sigma_rel{width}" for width in comma_list(widths, float))]


def _wanted_labels(options: argparse.Namespace, folder: str) -> list[str]:
    """The labels of the averages to resume: as given, else those that the run which wrote into the folder keeps."""
    path = files.join(folder, checkpoint_sets.CONFIG_FILE)
    if {"ema_rate", "ema_sigma_rel"} & options.given:
        return _ema_labels(options.ema_rate, options.ema_sigma_rel)
    if not files.exists(path):
        return []
    try:
        config = json.loads(files.read_bytes(path))["config"]
        return _ema_labels(config["ema_rate"], config.get("ema_sigma_rel", ""))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it, or name the checkpoint with --resume PATH") from None


def _training_size(options: argparse.Namespace) -> Any:
    return options.large_size if hasattr(options, "large_size") else options.image_size


def _share_batch(options: argparse.Namespace) -> None:
    world_size = dist_util.get_world_size()
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
    model.to(dist_util.dev())
    if options.use_fp16:
        options.precision, options.use_fp16 = "fp16", False
    if options.precision == "fp16" and dist_util.dev().type == "cpu":
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
        **arguments,
    )
    with contextlib.closing(data):
        if options.dry_run:
            dry_run(loop)
            if dist_util.get_rank() == 0:
                with contextlib.suppress(OSError):
                    os.rmdir(logger.get_dir())  # where there was none before
            return
        if dist_util.get_rank() == 0:
            # Not before the loop has what it resumes from: a run that is refused leaves the older description.
            path = files.join(get_blob_logdir(), checkpoint_sets.CONFIG_FILE)
            files.write_bytes(path, json.dumps(metadata, indent=1).encode())
        dist_util.from_rank0(_open_trackers, options.trackers, config, loop.first_row)
        warn_of_small_disk(loop)
        try:
            loop.run_loop()
        finally:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                if dist_util.get_rank() == 0 and loop.step:
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


def describe_request(options: argparse.Namespace, metadata: dict[str, Any], sampler: Any) -> dict[str, Any]:
    """What the samples that a Sampler draws from a checkpoint depend on."""
    names = {"seed", "classes", "sigma_small", "guidance_scale", "guidance_interval", "guidance_rescale"}
    names |= fixed_names() | ({"classifier_scale"} if options.classifier_path else set())
    request = {name: getattr(options, name) for name in sorted(names) if hasattr(options, name)}
    for name in ("model", "guide", "classifier"):
        if getattr(options, f"{name}_path", ""):
            request[f"{name}_sha256"] = dist_util.from_rank0(files.sha256, getattr(options, f"{name}_path"))
    if hasattr(options, "base_samples"):
        request["base_samples"] = files.full_path(options.base_samples)
    model = {"model_path": files.full_path(options.model_path), "model_step": metadata.get("step")}
    return {**model, **sampler.request(), **request}


def samples_name(options: argparse.Namespace, sampler: str, steps: int) -> str:
    """The default folder of a checkpoint's samples."""
    path = os.path.abspath(options.model_path)
    run, stem = os.path.basename(os.path.dirname(path)), os.path.splitext(os.path.basename(path))[0]
    rule = "" if sampler == "ancestral" else sampler
    scale = getattr(options, "guidance_scale", 1)
    return f"{run}_{stem}_{steps}{rule}steps{'' if scale == 1 else f'_scale{scale:g}'}_seed{options.seed}"


class GivenImages(NamedTuple):
    """Images to start from."""

    arrays: np.ndarray  # uint8 [N, H, W, C]
    labels: list[int] | None  # their classes, where the images tell
    names: list[str]  # of the files, without what stands after the dot


def read_images(
    options: argparse.Namespace,
    flag: str,
    size_flag: str,
    class_names: Sequence[str] | None,
    exact_npz: bool = False,
    enlarge: bool = True,
) -> GivenImages:
    """The images of the option `flag`: an npz, a folder, a zip, or one image or several separated by commas.

    Resized and centre-cropped as in training to the size of the option `size_flag`.
    :param exact_npz: an npz of another size raises UserError.
    :param enlarge: otherwise images that are smaller raise UserError.
    """
    path, wanted = getattr(options, flag), getattr(options, size_flag)
    source = open_pictures(path, f"--{flag}")
    size = height_width(wanted)
    dataset = ImageDataset(wanted, source, channels=options.channels)
    sizes = {dataset.read(i).size[::-1] for i in range(len(dataset))}
    if sizes != {size}:
        other = "x".join(map(str, min(s for s in sizes if s != size)))
        if exact_npz and isinstance(source, ArrayImages):
            raise UserError(
                f"--{flag} {path} has images of {other}, but the model's --{size_flag} is {wanted}: give an npz of "
                "that size, or a folder of images, which are resized"
            )
        smaller = ["x".join(map(str, s)) for s in sorted(sizes) if s[0] < size[0] or s[1] < size[1]]
        if smaller and not enlarge:
            raise UserError(
                f"--{flag} {path} has images of {smaller[0]}, smaller than --{size_flag} {wanted}: give larger ones"
            )
        logger.log(f"--{flag}: images of {other} are resized and centre-cropped to --{size_flag} {wanted}")
    array = np.stack([_uint8(dataset[i][0]) for i in range(len(dataset))])
    labels = None
    if isinstance(source, ArrayImages):
        labels = None if source.labels is None else [int(y) for y in source.labels]
    elif class_names:
        prefixes = [os.path.basename(source.name(i)).split("_")[0] for i in range(len(source))]
        if set(prefixes) <= set(class_names):
            labels = [list(class_names).index(prefix) for prefix in prefixes]
    return GivenImages(array, labels, [stem(source.name(i)) for i in range(len(source))])


def _uint8(image: Any) -> Any:
    return np.rint((image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)  # exact: the way back from x / 127.5 - 1


def class_indices(options: argparse.Namespace, source: Any, metadata: dict[str, Any]) -> list[int]:
    """Each image's class in the checkpoint's numbering. Raises UserError for a class that the checkpoint lacks."""
    found, names = read_classes(source, options.labels, options.data_dir)
    trained = metadata.get("class_names") or names
    unknown = sorted({names[i] for i in found} - set(trained))
    if unknown:
        raise UserError(f"{options.data_dir} has the class {unknown[0]}, which {options.model_path} was not trained on")
    indices = [trained.index(names[i]) for i in found]
    if max(indices) >= (options.num_classes or NUM_CLASSES):
        raise UserError(f"{options.data_dir} has class {max(indices)}; {options.model_path} has {options.num_classes}")
    return indices
