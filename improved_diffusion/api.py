"""What a person holds in Python: a Model and the Images that it makes.

    import improved_diffusion as idf

    model = idf.train("photos/", image_size=64, max_steps=20_000, out_dir="runs/mine")
    model = idf.load("runs/mine")
    model.sample(16, classes=["cat"], sampler="dpmpp_2m", steps=15, seed=0).save("out/")

Options are those of the commands, under the same names; a mistake raises UserError. The same seed gives the same bytes
as the command.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as th

from .checkpoints import checkpoint, sets
from .checkpoints.loading import LoadedModel, load_model, read_kind
from .config import UserError, fixed_names
from .config.presets import preset_options
from .config.settings import (
    ImageSampling,
    ImageTraining,
    Settings,
    SuperResSampling,
    SuperResTraining,
    merge_options,
)
from .data.given import as_pixels
from .logs import logger
from .logs.progress import Progress
from .models.build import build_diffusion
from .sampling.pipeline import SamplingPipeline, SuperResPipeline
from .sampling.writer import PNG_DIR, SHOWN, last_images
from .training import run
from .utils import files, images


@dataclass(frozen=True)
class Images:
    """A batch of images.

    :param array: uint8 [N, H, W, C], C of 1 (grey) to 4 (RGB and alpha).
    :param labels: int64 [N], the classes; None without classes.
    :param class_names: the names of all classes, by label; None where they are not known.
    :param numbers: the number of each image below its seed; its file is named by it.
    """

    array: np.ndarray
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int | slice) -> Images:
        """The image, or images, at an index: always Images."""
        chosen = slice(index, index + 1 or None) if isinstance(index, int) else index
        labels = None if self.labels is None else self.labels[chosen]
        numbers = None if self.numbers is None else self.numbers[chosen]
        return Images(self.array[chosen], labels, self.class_names, numbers)

    def pil(self) -> list[Any]:
        """The images as PIL.Image objects."""
        return [images.to_image(array) for array in self.array]

    def grid(self, columns: int | None = None) -> Any:
        """All images in one PIL.Image, as near to a square as can be unless `columns` are given."""
        return images.to_image(images.grid(self.array, columns, min_side=images.SHOWN_SIDE))

    def save(self, folder: str | os.PathLike) -> str:
        """Write PNGs, a grid and an npz of all (arr_0, and the labels as arr_1), as the command does.

        Returns the npz's path. Raises UserError where the folder cannot be written.
        """
        folder = os.fspath(folder)
        png_dir = files.join(folder, PNG_DIR)
        files.make_dirs(png_dir)
        for k, array in enumerate(self.array):
            number = k if self.numbers is None else self.numbers[k]
            name = images.sample_name(number, self._class_name(k))
            files.write_bytes(files.join(png_dir, name), images.encode_png(array), durable=False)
        path = files.join(folder, f"samples_{'x'.join(map(str, self.array.shape))}.npz")
        images.save_npz(path, self.array, *([] if self.labels is None else [self.labels]))
        images.save_grid(files.join(folder, "samples.png"), self.array[:SHOWN], 10 if len(self) >= SHOWN // 2 else None)
        return path

    def _class_name(self, index: int) -> str | None:
        if self.labels is None:
            return None
        label = int(self.labels[index])
        return self.class_names[label] if self.class_names and label < len(self.class_names) else str(label)

    def _repr_png_(self) -> bytes:
        """The grid, which a notebook shows."""
        png = io.BytesIO()
        self.grid().save(png, format="PNG")
        return png.getvalue()


@dataclass(frozen=True)
class SamplingStep:
    """A batch of images on its way from noise, after one step of the sampler.

    :param index: of the step, from 0; `steps` is how many there are.
    :param numbers: of the images in the batch.
    :param pred_xstart: the image that the model predicts at this step, x_0: float32 [N, C, H, W] in [-1, 1].
    :param sample: the noisy image x_t after the step, float32 [N, C, H, W].
    """

    index: int
    steps: int
    numbers: Sequence[int]
    pred_xstart: th.Tensor
    sample: th.Tensor
    class_names: Sequence[str] | None = None

    @property
    def images(self) -> Images:
        """The predicted images, as they look at this step."""
        return Images(images.to_uint8(self.pred_xstart), None, self.class_names, self.numbers)


class Model:
    """A trained model: `load` and `train` give one.

    Sampling options are those of `improved-diffusion sample`, by name: sampler, steps, timestep_respacing,
    guidance_scale, precision, ... . Without steps, ancestral sampling takes every step that the model was trained on;
    sampler="dpmpp_2m" with steps=15 is much faster.
    """

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._prepared: dict[tuple[Any, ...], th.nn.Module] = {}

    def __repr__(self) -> str:
        model = self._loaded.settings.model
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        step = f", step {self.step}" if self.step is not None else ""
        return f"Model({self.path!r}, {model.kind}, size {model.size}, {model.channels} channels{classes}{step})"

    @property
    def path(self) -> str:
        """The checkpoint's file."""
        return self._loaded.path

    @property
    def settings(self) -> Settings:
        """The options of the network and of its diffusion."""
        return self._loaded.settings

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes, by label; None where there are none."""
        return self._loaded.metadata.get("class_names")

    @property
    def step(self) -> int | None:
        """How many steps the checkpoint was trained for; None where it does not say."""
        return self._loaded.metadata.get("step")

    @property
    def network(self) -> th.nn.Module:
        """The network itself, in eval mode: (x [N, C, H, W], timesteps [N], **kwargs)."""
        return self._loaded.model

    @property
    def diffusion(self) -> Any:
        """The diffusion process, a SpacedDiffusion."""
        return self._loaded.diffusion

    @property
    def is_super_resolution(self) -> bool:
        """Whether the model enlarges images (`upscale`) rather than making them (`sample`)."""
        return self._loaded.settings.model.kind == "super_res"

    # Sampling

    def sample(
        self, n: int = 1, *, classes: Any = None, seed: int = 0, batch_size: int = 16, progress: bool = True,
        on_step: Callable[[SamplingStep], None] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Draw images; image i of a seed is always the same, whatever n and the batch size.

        :param n: how many; or give seeds="17,40-47", numbers of images, among the options.
        :param classes: names or labels, taken in turn, as a list or comma-separated; random ones unless given.
        :param batch_size: images at once: more is faster, and needs more memory.
        :param progress: show a progress bar.
        :param on_step: called with a SamplingStep after each step.
        Raises UserError for options that contradict each other or the model.
        """
        pipeline = self._pipeline(n, classes, seed, batch_size, options)
        return self._collect(pipeline, batch_size, progress, on_step)

    def sample_steps(
        self, n: int = 1, *, classes: Any = None, seed: int = 0, batch_size: int = 16, **options: Any
    ) -> Iterator[SamplingStep]:
        """Like `sample`, yielding a SamplingStep after each step of each batch."""
        pipeline = self._pipeline(n, classes, seed, batch_size, options)
        for _, step in self._steps(pipeline, batch_size):
            yield step

    def upscale(
        self, base: Any, *, classes: Any = None, seed: int = 0, batch_size: int = 16, progress: bool = True,
        on_step: Callable[[SamplingStep], None] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Enlarge images with a super-resolution model.

        :param base: a path, PIL images, Images, or uint8 [N, h, w, C]; resized to the model's small_size.
        Other arguments as in `sample`.
        """
        if not self.is_super_resolution:
            raise UserError(f"{self.path} is an image model: upscale needs a super-resolution model")
        loaded = self._with(SuperResSampling, {"seed": seed, "batch_size": batch_size, **_classes(classes), **options})
        given = as_pixels(_plain(base), "base", loaded.settings.model.small_size, loaded.settings.model.channels)
        return self._collect(SuperResPipeline(loaded, given), batch_size, progress, on_step)

    def _pipeline(
        self, n: int, classes: Any, seed: int, batch_size: int, options: Mapping[str, Any]
    ) -> SamplingPipeline:
        if self.is_super_resolution:
            raise UserError(f"{self.path} is a super-resolution model: use upscale(images)")
        asked = {"num_samples": n, "seed": seed, "batch_size": batch_size, **_classes(classes), **options}
        return SamplingPipeline(self._with(ImageSampling, asked))

    def _with(self, kind: type[Settings], options: Mapping[str, Any]) -> LoadedModel:
        """The model with the settings of a command, by name."""
        for name in options.keys() & fixed_names():
            raise UserError(f"{name}: training decided it, {self.path} has {self.settings.values()[name]}")
        settings: Any = kind.of({**self.settings.values(), **options})
        return replace(
            self._loaded,
            settings=settings,
            given=frozenset(options),
            model=self._network(settings.sampler) if "sampler" in settings.groups() else self.network,
            diffusion=build_diffusion(settings.diffusion),
        )

    def _network(self, sampler: Any) -> th.nn.Module:
        """The network to prepare for these options: other precisions and layouts get a copy of their own."""
        key = (sampler.precision, sampler.channels_last, sampler.compile)
        if key == ("fp32", False, False):
            return self.network
        if key not in self._prepared:
            self._prepared = {key: copy.deepcopy(self.network)}  # one, so that memory does not grow
        return self._prepared[key]

    def _steps(self, pipeline: SamplingPipeline, batch_size: int) -> Iterator[tuple[bool, SamplingStep]]:
        """(whether it is the batch's last, step) for each step of each batch."""
        numbers, steps = list(pipeline.numbers), pipeline.sampler.steps
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            predictions = (out for out in pipeline.trajectory(batch) if out["pred_xstart"] is not None)
            for index, out in enumerate(predictions):
                yield (
                    index == steps - 1,
                    SamplingStep(index, steps, batch, out["pred_xstart"], out["sample"], self.class_names),
                )

    def _collect(
        self, pipeline: SamplingPipeline, batch_size: int, progress: bool,
        on_step: Callable[[SamplingStep], None] | None,
    ) -> Images:  # fmt: skip
        numbers, done = list(pipeline.numbers), []
        bar = Progress("sampling", len(numbers) * pipeline.sampler.steps, "step") if progress else None
        with contextlib.closing(bar) if bar else contextlib.nullcontext():
            for last, step in self._steps(pipeline, batch_size):
                if on_step is not None:
                    on_step(step)
                if last:
                    done.append(last_images([{"sample": step.sample}]))
                if bar:
                    bar.update(len(step.numbers))
        labels = None if pipeline.labels is None else np.array([pipeline.labels.index(i) for i in numbers], np.int64)
        names = None if pipeline.labels is None else pipeline.labels.class_names
        return Images(np.concatenate(done), labels, names, numbers)

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights, with their description, to a .pt file that `load`, the commands and published code read.

        Raises UserError where that fails.
        """
        config = {**self.settings.values(), **self._loaded.metadata.get("config", {})}
        metadata = {**self._loaded.metadata, "config": config}
        checkpoint.save_state_dict(self.network.state_dict(), os.fspath(path), metadata)


def _classes(classes: Any) -> dict[str, str]:
    """The option `classes`, from a name, a label, or several."""
    if classes is None:
        return {}
    if isinstance(classes, (str, int)):
        classes = [classes]
    return {"classes": ",".join(map(str, classes))}


def _plain(given: Any) -> Any:
    return given.array if isinstance(given, Images) else given


def load(path: str | os.PathLike, *, average: str | float | None = None, **options: Any) -> Model:
    """The model in a checkpoint file, or the newest of a run's folder.

    :param average: of a run's folder, which moving average, such as 0.9999; "raw" for the weights themselves; the first
        average unless given.
    :param options: what a published checkpoint without a description does not say, such as num_heads=4.
    Raises UserError for a missing, damaged or hostile file. Nothing in it is executed.
    """
    path = os.path.expanduser(os.fspath(path))
    if not files.exists(path):
        raise UserError(f"{path} does not exist: name a run's folder or a checkpoint such as ema_0.9999_010000.pt")
    if files.is_dir(path):
        path = _newest(path, average)
    elif average is not None:
        raise UserError(f"average={average!r} chooses among the files of a run's folder, but {path} is a file")
    kind = read_kind(path)
    return Model(load_model(kind.of(options), frozenset(options), path))


def _newest(folder: str, average: str | float | None) -> str:
    """The file of the newest complete checkpoint in a run's folder."""
    step = sets.newest_whole_set(folder, [], logger.warn)
    if step is None:
        raise UserError(f"{folder} holds no complete checkpoint (modelNNNNNN.pt and the files beside it)")
    labels = sets.average_labels(folder, step)
    if average == "raw" or (average is None and not labels):
        return files.join(folder, checkpoint.model_name(step))
    label = labels[0] if average is None else str(average)
    if label not in labels:
        raise UserError(f"{folder} has no average {label} at step {step}, choose from: {', '.join([*labels, 'raw'])}")
    return files.join(folder, checkpoint.ema_name(label, step))


def train(data_dir: str | os.PathLike, *, preset: str = "", **options: Any) -> Model:
    """Train a model on images and return it; every option of `improved-diffusion train` is a keyword.

    With large_size and small_size it is a super-resolution model. Ctrl-C saves a checkpoint, ends the training and
    returns the model as it is; resume="auto" goes on from there.
    :param preset: a published recipe, whose options apply where none are given.
    Raises UserError for what cannot work, before anything is written. Collective where there are several ranks.
    """
    superres = bool({"large_size", "small_size"} & options.keys())
    kind: type[Settings] = SuperResTraining if superres else ImageTraining
    asked = {"data_dir": os.fspath(data_dir), **options}
    if preset:
        asked = merge_options([{k: v for k, v in preset_options(preset).items() if k in kind.options()}, asked])
    settings: Any = kind.of(asked)
    default = preset or ("super_res_train" if superres else "image_train")
    return load(run.train(settings, frozenset(asked), default).checkpoints)
