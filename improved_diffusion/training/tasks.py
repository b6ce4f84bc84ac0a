"""What is trained: an image model, a super-resolution model or a classifier. One class for each kind of run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch as th

from .. import distributed
from ..checkpoints.loading import kind_of, read, refuse_contradictions
from ..config import KINDS, ProcessConfig, ReadingConfig, UserError, height_width, one_line
from ..config.settings import ClassifierTraining, ImageTraining, SuperResTraining, Training
from ..data.classes import classes_not_in, read_labels
from ..data.dataset import ImageDataset, selection
from ..data.low_res import WithLowRes, downsample
from ..data.sources import open_images
from ..data.stream import BatchStream
from ..logs import logger
from ..models.build import build_classifier, build_diffusion, build_model
from ..resample import create_named_schedule_sampler
from ..sampling.labels import caption_of
from ..utils.text import class_index, listed
from .classifier import ClassifierObjective, ClassifierValidation
from .hooks import Hook
from .loss_by_noise import FiniteSet
from .loss_floor import LossFloor, training_set
from .preview import PREVIEWS, PreviewGrid, preview_diffusion
from .validation import HeldOutImages, Validation

S = TypeVar("S", bound=Training)
Hooks = list[tuple[int, Hook]]  # (interval in steps, hook)


class Task(Generic[S]):
    """What one kind of run trains, on what, and what it shows on the way.

    :param metadata: the description of the checkpoint that the run continues or starts from; {} where there is none.
    """

    def __init__(self, settings: S, metadata: Mapping[str, Any] | None = None):
        self.settings, self.metadata = settings, metadata or {}

    @property
    def needs_classes(self) -> bool:
        """Whether the classes of the images are read."""
        raise NotImplementedError

    def network(self) -> th.nn.Module:
        """The network to train, on the CPU."""
        raise NotImplementedError

    def objective(self) -> Any:
        """What it is trained on: an object with num_timesteps and training_losses."""
        raise NotImplementedError

    def build(self) -> tuple[th.nn.Module, Any]:
        """(network, objective)."""
        return self.network(), self.objective()

    def schedule_sampler(self, objective: Any) -> Any:
        """What draws the timesteps that the network is trained on."""
        return create_named_schedule_sampler(self.settings.train.schedule_sampler, objective)

    def description(self, objective: Any) -> dict[str, Any]:
        """What the checkpoints' description says besides what all runs say."""
        return {}

    def frozen_copies(self) -> int:
        """How many networks of the same form, without gradients, are in memory beside the one that is trained."""
        return 0

    def stream(self, data: BatchStream) -> Any:
        """The batches that the loop trains on."""
        return data

    def hooks(self, objective: Any, data: BatchStream) -> Hooks:
        """What the loop calls every so many steps. Collective."""
        raise NotImplementedError

    def held_out(self, objective: Any, dataset: ImageDataset, **options: Any) -> HeldOutImages:
        """What measures the model on held-out images; see HeldOutImages."""
        return Validation(objective, dataset, **options)

    def preview(self, objective: Any, *arguments: Any) -> PreviewGrid:
        """What draws grids of samples; see PreviewGrid."""
        return PreviewGrid(preview_diffusion(objective), *arguments)

    def _validation(self, objective: Any, data: BatchStream, **more: Any) -> Hooks:
        """Evaluation on --val_dir every --val_interval steps; none without --val_dir. Collective."""
        settings: Any = self.settings
        watch, train = settings.watch, settings.train
        if not watch.val_dir:
            return []
        source = open_images(watch.val_dir, "--val_dir")
        classes = _validation_classes(settings, source, data.class_names or []) if self.needs_classes else None
        validation = self.held_out(
            objective,
            ImageDataset(
                settings.model.size, source, classes, channels=settings.model.channels, reading=settings.reading
            ),
            num_images=watch.val_images,
            batch_size=train.microbatch if train.microbatch > 0 else train.batch_size,
            **more,
        )
        return [(watch.val_interval, validation)]

    def _previews(self, objective: Any, count: int, model_kwargs: dict[str, th.Tensor], data: BatchStream) -> Hooks:
        """Grids of samples every --sample_interval steps."""
        settings: Any = self.settings
        captions = [caption_of(data.class_names, int(y)) for y in model_kwargs.get("y", ())]
        model_kwargs = {key: value.to(distributed.dev()) for key, value in model_kwargs.items()}
        shape = (settings.model.channels, *height_width(settings.model.size))
        grid = self.preview(objective, shape, count, model_kwargs, logger.get_dir(), settings.run.seed, captions)
        return [(settings.watch.sample_interval, grid)]


class ImageTask(Task[ImageTraining]):
    """An image model."""

    @property
    def needs_classes(self) -> bool:
        return self.settings.model.class_cond

    def network(self) -> th.nn.Module:
        return build_model(self.settings.model, self.settings.diffusion.learn_sigma)

    def objective(self) -> Any:
        return build_diffusion(self.settings.diffusion)

    def hooks(self, objective: Any, data: BatchStream) -> Hooks:
        model = self.settings.model
        found: Hooks = []
        if self.settings.watch.sample_interval:
            seen = th.tensor(data.seen_classes)
            labels = {"y": seen[th.arange(PREVIEWS) % len(seen)]} if model.class_cond else {}
            found = self._previews(objective, PREVIEWS, labels, data)
        validation = self._validation(objective, data)
        return found + validation + self._loss_floor(objective, data, validation)

    def _loss_floor(self, diffusion: Any, data: BatchStream, validation: Hooks) -> Hooks:
        """The loss beside its floor every --val_interval steps, also on the images of the validation. Collective."""
        watch, train = self.settings.watch, self.settings.train
        if not watch.loss_floor:
            return []
        if 0 < train.max_steps < watch.val_interval:
            logger.warn(
                f"--val_interval {watch.val_interval} is more than --max_steps {train.max_steps}: no loss_floor"
            )
        held_out = None
        for _, hook in validation:
            assert isinstance(hook, Validation)
            held_out = FiniteSet(hook.dataset, hook.selected, watch.val_images)
        batch_size = train.microbatch if train.microbatch > 0 else train.batch_size
        images = training_set(data.stream.dataset, data.stream.usable, data.stream.random_flip, watch.val_images)
        return [(watch.val_interval, LossFloor(diffusion, images, held_out, watch.val_images, batch_size))]


class SuperResTask(Task[SuperResTraining]):
    """A super-resolution model, trained on images and their own low-resolution versions."""

    @property
    def needs_classes(self) -> bool:
        return self.settings.model.class_cond

    def network(self) -> th.nn.Module:
        return build_model(self.settings.model, self.settings.diffusion.learn_sigma)

    def objective(self) -> Any:
        return build_diffusion(self.settings.diffusion)

    def stream(self, data: BatchStream) -> Any:
        return WithLowRes(data, self.settings.model.small_size)

    def hooks(self, objective: Any, data: BatchStream) -> Hooks:
        if self.settings.watch.loss_floor:
            raise UserError(
                "--loss_floor: a super-resolution model sees a small version of the image, which nearly always shows "
                "which one it is: the floor of its loss is about 0: leave the flag out"
            )
        small = self.settings.model.small_size
        found: Hooks = []
        if self.settings.watch.sample_interval:
            usable = data.stream.usable
            chosen = usable[selection(len(usable), PREVIEWS)]
            batch, kwargs = th.utils.data.default_collate([data.stream.dataset[int(i)] for i in chosen])
            low_res = downsample(batch, small)
            found = self._previews(objective, len(chosen), {**kwargs, "low_res": low_res}, data)
        return found + self._validation(objective, data, small_size=small)


class ClassifierTask(Task[ClassifierTraining]):
    """A classifier of noisy images."""

    @property
    def needs_classes(self) -> bool:
        return True

    def network(self) -> th.nn.Module:
        return build_classifier(self.settings.model)

    def objective(self) -> Any:
        return ClassifierObjective(build_diffusion(self.settings.diffusion))

    def held_out(self, objective: Any, dataset: ImageDataset, **options: Any) -> HeldOutImages:
        return ClassifierValidation(objective, dataset, **options)

    def hooks(self, objective: Any, data: BatchStream) -> Hooks:
        return self._validation(objective, data)


def _validation_classes(settings: Any, source: Any, trained: Sequence[str]) -> list[int]:
    """The class of each image of --val_dir, in the numbering of the training images."""
    val_dir, data = settings.watch.val_dir, settings.data
    found = read_labels(source, data.labels, val_dir, few=True)
    unknown = classes_not_in(found, trained)
    if unknown:
        raise UserError(
            f"--val_dir {val_dir} has the class {one_line(unknown[0])}, which {data.data_dir} does not have (it has "
            f"{listed(trained, 10)}): remove its images"
        )
    index = class_index(trained)
    return [index[str(label)] for label in found]


def take_guided_process(
    settings: ClassifierTraining, given: frozenset[str]
) -> tuple[ClassifierTraining, frozenset[str]]:
    """The settings with the images' size and channels and the noise of the diffusion model at --model_path, if any.

    Those count as given from there on. Raises UserError for an option that contradicts the checkpoint. Collective.
    """
    path = settings.guided.model_path
    if not path:
        return settings, given
    path, _, metadata = read(path)
    stored = metadata.get("config", {})
    process = [f.name for f in fields(ProcessConfig)]
    names = sorted({"image_size", "channels", *process})
    if not stored:
        flags = ", ".join(f"--{name}" for name in names)
        raise UserError(f"--model_path {path} has no description: leave it out, and give {flags}")
    if kind_of(stored) != "image":
        raise UserError(f"--model_path {path} is {KINDS[kind_of(stored)][0]}: a classifier guides an image model")
    stored = {**{f.name: f.default for f in fields(ProcessConfig)}, **stored}  # an older file lacks newer options
    refuse_contradictions(settings.values(), given, path, stored, names)
    reading = {f.name: stored[f.name] for f in fields(ReadingConfig) if f.name in stored and f.name not in given}
    try:
        settings = settings.replace(**{name: stored[name] for name in names}, **reading)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    logger.log(f"to guide {path}: {', '.join(f'{name}={stored[name]}' for name in names)}")
    return settings, given | set(names)
