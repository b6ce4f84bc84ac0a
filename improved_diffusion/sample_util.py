"""Sampling many images to disk: shared among ranks, resumable, image i a function of seed + i."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from PIL import Image

from . import dist_util, files, images, logger
from .config import NUM_CLASSES, UserError
from .low_res import pairs
from .samplers import SeededNoise

REQUEST_FILE = "samples.json"
PNG_DIR = "samples"


def parse_classes(text: str, class_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """The class indices of --classes, given by name or index. Raises UserError for one that there is not."""
    indices = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        if class_names and word in class_names:
            indices.append(list(class_names).index(word))
        elif word.isdigit() and int(word) < num_classes:
            indices.append(int(word))
        else:
            names = f": {', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}" if class_names else ""
            raise UserError(f"--classes {word}: the model has the classes 0..{num_classes - 1}{names}")
    return indices


class Labels:
    """The class of each sample: those asked for in turn, or drawn at random from seed + i."""

    def __init__(self, num_classes: int, seed: int, classes: Sequence[int], class_names: Sequence[str] | None):
        self.num_classes, self.seed, self.classes, self.class_names = num_classes, seed, classes, class_names

    def index(self, i: int) -> int:
        """The class of sample i."""
        if self.classes:
            return self.classes[i % len(self.classes)]
        return int(th.randint(self.num_classes, (1,), generator=th.Generator().manual_seed(self.seed + i)))

    def name(self, i: int) -> str:
        """The class's name, or its index where it has none."""
        label = self.index(i)
        return self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)


def choose_labels(options: Any, metadata: Mapping[str, Any]) -> Labels | None:
    """The labels that --classes, or chance, gives a conditional model; None for an unconditional one."""
    if not options.class_cond:
        if options.classes:
            raise UserError(
                f"--classes {options.classes}: {options.model_path} was trained without classes (--class_cond)"
            )
        return None
    names = metadata.get("class_names")
    num_classes = len(names) if names else options.num_classes or NUM_CLASSES  # no more than were trained
    return Labels(num_classes, options.seed, parse_classes(options.classes, names, num_classes), names)


def draw_images(
    diffusion: Any,
    model: th.nn.Module,
    options: Any,
    shape: Sequence[int],
    indices: Sequence[int],
    model_kwargs: Mapping[str, Any],
) -> np.ndarray:
    """The samples with the given numbers: uint8 [N, H, W, C].

    :param shape: (C, H, W).
    """
    loop = diffusion.p_sample_loop
    extra = {}
    if options.use_ddim:
        loop, extra = diffusion.ddim_sample_loop, {"eta": options.ddim_eta}
    sample = loop(
        model,
        (len(indices), *shape),
        clip_denoised=options.clip_denoised,
        model_kwargs=model_kwargs,
        device=dist_util.dev(),
        noise_fn=SeededNoise([options.seed + i for i in indices]),
        **extra,
    )
    return images.to_uint8(sample)


def write_samples(
    draw: Callable[[list[int]], np.ndarray],
    *,
    out_dir: str,
    num_samples: int,
    batch_size: int,
    labels: Labels | None,
    request: Mapping[str, Any],
    beside: Callable[[int], np.ndarray] | None = None,
) -> str:
    """Make samples 0..num_samples-1: PNGs as they come, then the npz and a grid. Returns the npz's path. Collective.

    Samples that an interrupted run with the same request left behind are kept.
    :param draw: sample numbers -> uint8 [N, H, W, C]; each rank calls it with its share.
    :param request: what the samples depend on; a folder that holds samples of another request raises UserError.
    :param beside: an image [h, w, C] to show beside sample i in the grid.
    """
    missing = dist_util.from_rank0(_prepare, out_dir, num_samples, dict(request))
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    png_dir = files.join(out_dir, PNG_DIR)
    if len(missing) < num_samples:
        logger.log(f"{num_samples - len(missing)} of {num_samples} samples are in {png_dir} already")
    bar = logger.Progress("sampling", num_samples, "image", initial=num_samples - len(missing))
    try:
        for start in range(0, len(missing), batch_size * world_size):
            chunk = missing[start : start + batch_size * world_size]
            mine = chunk[rank * batch_size : (rank + 1) * batch_size]
            parts = dist_util.all_gather_object(draw(mine) if mine else None)  # in rank order, which is the chunk's
            if rank == 0:
                for i, array in zip(chunk, np.concatenate([part for part in parts if part is not None])):
                    name = images.sample_name(i, labels.name(i) if labels else None)
                    files.write_bytes(files.join(png_dir, name), images.encode_png(array), durable=False)
            bar.update(len(chunk))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{bar.done} of {num_samples} samples are in {png_dir}; the same command goes on"
        ) from None
    finally:
        bar.close()
    return dist_util.from_rank0(_finish, out_dir, num_samples, labels, beside)


def _existing(png_dir: str) -> dict[int, str]:
    found = ((re.search(r"(\d+)\.png$", name), name) for name in files.list_dir(png_dir))
    return {int(match.group(1)): name for match, name in found if match}


def _prepare(out_dir: str, num_samples: int, request: dict[str, Any]) -> list[int]:
    """The numbers of the samples still to be made."""
    png_dir, path = files.join(out_dir, PNG_DIR), files.join(out_dir, REQUEST_FILE)
    files.make_dirs(png_dir)
    request = json.loads(json.dumps(request))
    if files.exists(path):
        try:
            before = json.loads(files.read_bytes(path))
        except ValueError:
            raise UserError(f"{path} is damaged: remove it and {png_dir}, or choose another --out_dir") from None
        for name in sorted(before.keys() | request.keys()):
            if before.get(name) != request.get(name):
                raise UserError(
                    f"{out_dir} holds samples made with {name} {before.get(name)}, not {request.get(name)}: choose "
                    f"another --out_dir, or remove {path} and {png_dir}"
                )
    elif _existing(png_dir):
        raise UserError(f"{png_dir} holds images of unknown origin: choose another --out_dir")
    files.write_bytes(path, json.dumps(request, indent=1).encode())
    existing = _existing(png_dir)
    return [i for i in range(num_samples) if i not in existing]


def _finish(out_dir: str, num_samples: int, labels: Labels | None, beside: Callable[[int], np.ndarray] | None) -> str:
    png_dir = files.join(out_dir, PNG_DIR)
    names = _existing(png_dir)
    arrays = []
    for i in range(num_samples):
        path = files.join(png_dir, names[i])
        try:
            array = np.asarray(Image.open(io.BytesIO(files.read_bytes(path))))
        except (OSError, SyntaxError):
            raise UserError(f"{path} is damaged: remove it and run the same command again") from None
        arrays.append(array[..., None] if array.ndim == 2 else array)
    all_images = np.stack(arrays)
    label_array = [np.array([labels.index(i) for i in range(num_samples)])] if labels else []
    path = files.join(out_dir, f"samples_{'x'.join(map(str, all_images.shape))}.npz")
    images.save_npz(path, all_images, *label_array)
    shown = all_images[:100]
    if beside is not None:
        shown = pairs(np.stack([beside(i) for i in range(len(shown[:50]))]), shown[:50])
    images.save_grid(files.join(out_dir, "samples.png"), shown, columns=10 if len(shown) >= 50 else None)
    logger.log(f"wrote {path}, {files.join(out_dir, 'samples.png')} and {num_samples} PNGs in {png_dir}")
    return path
