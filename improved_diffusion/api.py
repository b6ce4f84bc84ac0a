"""What a person holds in Python: a Model, and what it makes.

    import improved_diffusion as idf

    model = idf.train("photos/", image_size=64, max_steps=20_000, out_dir="runs/mine")
    model = idf.load("runs/mine")
    model.sample(16, classes=["cat"], sampler="dpmpp_2m_sde", steps=20, seed=0).save("out/")

Options are those of the commands, under the same names; a mistake raises UserError. The same seed gives the same bytes
as the command.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch as th

from . import distributed
from .bound import BoundSummary
from .checkpoints.loading import LoadedModel, find_file, load_model, read, read_kind, with_own_steps
from .checkpoints.safetensors_file import has_suffix
from .config import ReadingConfig, SpeedConfig, UserError, VariationsConfig, fixed_names, path_argument, shown
from .config.exchange import CardConfig, ExportConfig, PushConfig
from .config.presets import options_for, until_chosen
from .config.settings import (
    Decoding,
    Distilling,
    Encoding,
    ImageSampling,
    ImageTraining,
    Inpainting,
    Interpolation,
    Likelihood,
    LossFloor,
    Settings,
    SuperResSampling,
    SuperResTraining,
    Variations,
    merge_options,
)
from .data.given import GivenImages, as_pixels
from .editing.base import Edit
from .editing.decode import Decode
from .editing.encode import Encode
from .editing.inpaint import Inpaint
from .editing.interpolate import Interpolate
from .editing.latents import Latents, read_latents
from .editing.masks import as_masks
from .editing.model import EditingModel
from .editing.variations import Vary
from .evaluation import evaluator
from .evaluation.likelihood import BoundEvaluation, network_of
from .evaluation.loss_floor import FloorEvaluation, FloorReport
from .evaluation.report import Report
from .exchange import formats
from .exchange.card import Card, make_card
from .exchange.hub import push
from .logs.progress import Progress
from .models.build import build_diffusion
from .respace import SpacedDiffusion
from .sampling.images import Images, SamplingStep
from .sampling.labels import Labels
from .sampling.pipeline import SamplingPipeline, SuperResPipeline, base_size, joined_trajectory
from .sampling.writer import last_images
from .training import run

_OF_COMMANDS = {"model_path", "out_dir", "save_steps", "print_steps"}
_WHICH = {"n", "seeds", "seed", "classes"}  # the arguments of `sample` that say which images
OnStep = Callable[[SamplingStep], None]


class Model:
    """A trained model: `load` and `train` give one.

    Sampling options are those of `improved-diffusion sample`, by name: sampler, steps, timestep_respacing,
    guidance_scale, precision, ... . Without steps, ancestral sampling takes every step that the model was trained on;
    sampler="dpmpp_2m_sde" with steps=20 is much faster.
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
    def diffusion(self) -> SpacedDiffusion:
        """The diffusion process, a SpacedDiffusion."""
        return self._loaded.diffusion

    @property
    def is_super_resolution(self) -> bool:
        """Whether the model enlarges images (`upscale`) rather than making them (`sample`)."""
        return self._loaded.settings.model.kind == "super_res"

    # Sampling

    def sample(
        self, n: int | None = None, *, classes: Any = None, seed: int = 0, batch_size: int = 16, progress: bool = True,
        on_step: OnStep | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Draw images; image i of a seed is always the same, whatever n and the batch size.

        :param n: how many, 1 unless given; or give seeds="17,40-47", numbers of images, among the options.
        :param classes: names or labels, taken in turn, as a list or comma-separated; random ones unless given.
        :param batch_size: images at once: more is faster, and needs more memory; 0: as many as fit a GPU's memory.
        :param progress: show a progress bar.
        :param on_step: called with a SamplingStep after each step.
        Raises UserError for options that contradict each other or the model.
        """
        pipeline = self._pipeline(n, classes, seed, batch_size, options)
        return self._collect(pipeline, progress, on_step)

    def sample_together(
        self, requests: Sequence[Mapping[str, Any]], *, on_step: OnStep | None = None,
        **options: Any,
    ) -> list[Images]:  # fmt: skip
        """Draw the images of several requests as one batch, which is faster than one after the other.

        :param requests: of each, the arguments of `sample` that say which images: n or seeds, seed, and classes.
        :param on_step: called with a SamplingStep of all images, in the order of the requests, after each step.
        :param options: the other options of `sample`, which the requests share.
        Returns the Images of each request, as `sample` gives them. Raises UserError as `sample` does.
        """
        if not requests:
            return []
        for name in {name for request in requests for name in request} - _WHICH:
            raise UserError(f"{shown(name)} is for all requests together: each has {', '.join(sorted(_WHICH))} only")
        own = [{"n": None, "classes": None, "seed": 0, "seeds": "", **request} for request in requests]
        first = self._pipeline(**{**own[0], "batch_size": 1, "options": options})
        pipelines = [first, *(first.asking(_asked(**each)) for each in own[1:])]
        parts = [(pipeline, list(pipeline.numbers)) for pipeline in pipelines]
        numbers, steps = [number for _, numbers in parts for number in numbers], first.sampler.steps
        predictions = (out for out in joined_trajectory(parts) if out["pred_xstart"] is not None)
        for index, out in enumerate(predictions):
            if on_step is not None:
                on_step(SamplingStep(index, steps, numbers, out["pred_xstart"], out["sample"], self.class_names))
        drawn, done = last_images([out]), []
        for pipeline, numbers in parts:
            done.append(Images(drawn[: len(numbers)], *_labels(pipeline.labels, numbers), numbers))
            drawn = drawn[len(numbers) :]
        return done

    def sample_steps(
        self, n: int | None = None, *, classes: Any = None, seed: int = 0, batch_size: int = 16, **options: Any
    ) -> Iterator[SamplingStep]:
        """Like `sample`, yielding a SamplingStep after each step of each batch."""
        pipeline = self._pipeline(n, classes, seed, batch_size, options)
        for _, step in self._steps(pipeline):
            yield step

    def upscale(
        self, base: Any, *, classes: Any = None, seed: int = 0, batch_size: int = 16, progress: bool = True,
        on_step: OnStep | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Enlarge images with a super-resolution model.

        :param base: a path, PIL images, Images, or uint8 [N, h, w, C]; resized to the model's small_size unless
            any_size=True is among the options.
        Other arguments as in `sample`.
        """
        if not self.is_super_resolution:
            raise UserError(f"{self.path} is an image model: upscale needs a super-resolution model")
        loaded = self._with(SuperResSampling, {"seed": seed, "batch_size": batch_size, **_classes(classes), **options})
        given = self._given(base, "base", base_size(loaded.settings), loaded.settings.reading)
        return self._collect(SuperResPipeline(loaded, given), progress, on_step)

    def _pipeline(
        self, n: int | None, classes: Any, seed: int, batch_size: int, options: Mapping[str, Any], seeds: Any = ""
    ) -> SamplingPipeline:
        if self.is_super_resolution:
            raise UserError(f"{self.path} is a super-resolution model: use upscale(images)")
        if "num_samples" in options:
            raise UserError("num_samples: sample takes the number of images as n")
        which = _asked(n, classes, seed, options.get("seeds", seeds))
        return SamplingPipeline(self._with(ImageSampling, {"batch_size": batch_size, **options, **which}))

    def _with(self, kind: type[Settings], options: Mapping[str, Any]) -> LoadedModel:
        """The model with the settings of a command, by name."""
        for name in options.keys() & fixed_names() & self.settings.options().keys():
            raise UserError(f"{name}: training decided it, {self.path} has {self.settings.values()[name]}")
        for name in options.keys() & _OF_COMMANDS:
            raise UserError(f"{name} is for the command only: in Python, the result is returned")
        own = {name: value for name, value in self.settings.values().items() if name in kind.options()}
        settings: Any = with_own_steps(kind.of({**own, **options}), self._loaded.metadata)
        return replace(
            self._loaded,
            settings=settings,
            given=frozenset(options),
            model=self._network(settings.values()),
            diffusion=build_diffusion(settings.diffusion),
        )

    def _network(self, options: Mapping[str, Any]) -> th.nn.Module:
        """The network to prepare for these options: other precisions and layouts get a copy of their own."""
        precision = "fp16" if options.get("use_fp16") else options.get("precision", "fp32")
        speed = SpeedConfig(**{f.name: options[f.name] for f in fields(SpeedConfig) if f.name in options})
        key = (precision, speed)
        if key == ("fp32", SpeedConfig()):
            return self.network
        if key not in self._prepared:
            self._prepared = {key: copy.deepcopy(self.network)}  # one, so that memory does not grow
        return self._prepared[key]

    def _steps(self, pipeline: SamplingPipeline) -> Iterator[tuple[bool, SamplingStep]]:
        """(whether it is the batch's last, step) for each step of each batch."""
        numbers, steps = list(pipeline.numbers), pipeline.sampler.steps
        batch_size = pipeline.batch_size
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            predictions = (out for out in pipeline.trajectory(batch) if out["pred_xstart"] is not None)
            for index, out in enumerate(predictions):
                yield (
                    index == steps - 1,
                    SamplingStep(index, steps, batch, out["pred_xstart"], out["sample"], self.class_names),
                )

    def _collect(self, pipeline: SamplingPipeline, progress: bool, on_step: OnStep | None) -> Images:
        numbers, done = list(pipeline.numbers), []
        bar = Progress("sampling", len(numbers) * pipeline.sampler.steps, "step") if progress else None
        with contextlib.closing(bar) if bar else contextlib.nullcontext():
            for last, step in self._steps(pipeline):
                if on_step is not None:
                    on_step(step)
                if last:
                    done.append(last_images([{"sample": step.sample}]))
                if bar:
                    bar.update(len(step.numbers))
        return Images(np.concatenate(done), *_labels(pipeline.labels, numbers), numbers)

    # Editing. `on_step` is called with a SamplingStep after each step of each batch; `numbers` are those of the images
    # to make, counted from 0, of all that the call would make.

    def encode(
        self, images: Any, *, classes: Any = None, batch_size: int = 16, on_step: OnStep | None = None, **options: Any
    ) -> Latents:
        """The noise that a deterministic sampler turns into the images (DDIM sec. 5.4), for `decode`.

        :param images: a path, PIL images, Images, or uint8 [N, H, W, C]; resized to the model's size.
        :param classes: those of the images, for a model with classes whose images come without.
        :param options: of `improved-diffusion edit encode`; 200 steps of DDIM unless given.
        """
        asked = {"batch_size": batch_size, **_classes(classes), **options}
        return self._edit_images(Encode, Encoding, images, asked, on_step).latents()

    def decode(
        self, latents: Latents | str | os.PathLike, n: int = 0, *, classes: Any = None, batch_size: int = 16,
        progress: bool = True, on_step: OnStep | None = None, numbers: Sequence[int] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """The images that latents lead to, by the steps that encoded them; other classes make other images of them.

        :param latents: from `encode`, or the path of a latents.npz that the command wrote.
        :param n: images to make, from the latents in turn; 0: one from each.
        """
        if not isinstance(latents, Latents):
            latents = read_latents(path_argument("latents", latents))
        asked = {"num_samples": n, "batch_size": batch_size, **_classes(classes), **options}
        model = Decode.prepare(self._with(Decoding, asked), latents.step_options)
        return self._draw(Decode(replace(model, on_step=on_step), latents), progress, numbers)

    def interpolate(
        self, first: Any, last: Any, frames: int = 9, *, classes: Any = None, seed: int = 0, batch_size: int = 16,
        progress: bool = True, on_step: OnStep | None = None, numbers: Sequence[int] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Images on the way from one to another, both ends included.

        :param first, last: two images, or two numbers: of the images that `sample(seed=seed)` draws.
        :param frames: how many images, at least 2.
        """
        asked = {"frames": frames, "seed": seed, "batch_size": batch_size, **_classes(classes), **options}
        if isinstance(first, (int, np.integer)) and isinstance(last, (int, np.integer)):
            prepared = Interpolate.prepare(self._with(Interpolation, {"seeds": [first, last], **asked}))
            return self._draw(Interpolate(replace(prepared, on_step=on_step)), progress, numbers)
        prepared = replace(Interpolate.prepare(self._with(Interpolation, asked)), on_step=on_step)
        ends = [self._pixels(given, prepared) for given in (first, last)]
        arrays = np.concatenate([end.arrays for end in ends])
        labels = [label for end in ends if end.labels is not None for label in end.labels]
        return self._draw(Interpolate(prepared, arrays, labels or None), progress, numbers)

    def inpaint(
        self, images: Any, mask: Any, n: int = 0, *, classes: Any = None, seed: int = 0, batch_size: int = 16,
        progress: bool = True,
        on_step: OnStep | None = None, numbers: Sequence[int] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Paint the masked part of images to fit the rest, which stays exactly as it is (RePaint).

        :param mask: the path of an image or PIL images, white where to paint; or an array [H, W] or [N, H, W] of bool
            or uint8, true or white where to paint. Masks are resized like the images.
        :param n: images to make, from those given in turn; 0: one from each.
        """
        asked = {"num_samples": n, "seed": seed, "batch_size": batch_size, **_classes(classes), **options}
        prepared = replace(Inpaint.prepare(self._with(Inpainting, asked)), on_step=on_step)
        found = self._pixels(images, prepared)
        _, height, width = prepared.shape
        masks = as_masks(mask, (height, width), found.names, prepared.settings.reading)
        edit = Inpaint(prepared, found.arrays, masks, found.labels)
        edit.sources = found.file_names
        return self._draw(edit, progress, numbers)

    def variations(
        self, images: Any, n: int = 0, strength: float = VariationsConfig.strength, *, classes: Any = None,
        seed: int = 0, batch_size: int = 16, progress: bool = True,
        on_step: OnStep | None = None, numbers: Sequence[int] | None = None, **options: Any,
    ) -> Images:  # fmt: skip
        """Images like those given: noise is added to them and removed again (SDEdit).

        :param n: images to make, from those given in turn; 0: one from each.
        :param strength: in (0, 1]: near 0 the same image, 1 another one.
        """
        asked = {"num_samples": n, "strength": strength, "seed": seed, "batch_size": batch_size}
        edit = self._edit_images(Vary, Variations, images, {**asked, **_classes(classes), **options}, on_step)
        return self._draw(edit, progress, numbers)

    def _edit_images(
        self, edit: Any, kind: type[Settings], images: Any, asked: Mapping[str, Any], on_step: OnStep | None
    ) -> Any:
        prepared = replace(edit.prepare(self._with(kind, asked)), on_step=on_step)
        found = self._pixels(images, prepared)
        made = edit(prepared, found.arrays, found.labels)
        made.sources = found.file_names
        return made

    def _pixels(self, given: Any, prepared: EditingModel) -> GivenImages:
        """The images, of the model's size."""
        _, height, width = prepared.shape
        return self._given(given, "images", f"{height}x{width}", prepared.settings.reading)

    def _given(self, given: Any, what: str, size: Any, reading: ReadingConfig) -> GivenImages:
        """Images that were given, resized, with the classes that come with them: of Images, an npz or file names."""
        channels = self._loaded.settings.model.channels
        found = as_pixels(_plain(what, given), what, size, channels, self.class_names, reading)
        if isinstance(given, Images) and given.labels is not None:
            found = found._replace(labels=given.labels.tolist())
        if isinstance(given, Images) and given.names is not None:
            found = found._replace(names=list(given.names), from_files=True)
        return found

    def _draw(self, edit: Edit, progress: bool, wanted: Sequence[int] | None) -> Images:
        numbers, done, batch_size = _numbers(wanted, edit.count), [], edit.model.settings.edit.batch_size
        bar = Progress(edit.command, len(numbers), "image") if progress else None
        with contextlib.closing(bar) if bar else contextlib.nullcontext():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                done.append(edit.draw(batch))
                if bar:
                    bar.update(len(batch))
        file_names = edit.file_names
        names = [file_names(i).removesuffix(".png") for i in numbers] if edit.sources else None
        return Images(np.concatenate(done), *_labels(edit.labels, numbers), numbers, names)

    # Evaluation

    def bits_per_dim(self, data_dir: str | os.PathLike, **options: Any) -> BoundSummary:
        """The variational bound on images, in bits/dim: `mean`, `standard_error`, and `total_bpd` [N] of each image.

        :param data_dir: a folder, a .zip or an .npz.
        :param options: of `improved-diffusion nll`, such as num_samples=1000, timestep_respacing="100", or
            nll_timesteps=20 for an estimate.
        """
        if self.is_super_resolution:
            raise UserError(f"{self.path} is a super-resolution model: bits_per_dim is for image models")
        loaded = self._with(Likelihood, {"data_dir": data_dir, **options})
        return BoundEvaluation.of(loaded).run(network_of(loaded))

    def loss_floor(self, data_dir: str | os.PathLike, **options: Any) -> FloorReport:
        """The model's loss on images by noise level, beside the least that any model can have on them.

        The images are those that the model was trained on: the loss on others says nothing of memorising.
        :param data_dir: a folder, a .zip or an .npz.
        :param options: of `improved-diffusion loss-floor`, such as floor_draws=4096.
        """
        if self.is_super_resolution:
            raise UserError(f"{self.path} is a super-resolution model: loss_floor is for image models")
        loaded = self._with(LossFloor, {"data_dir": data_dir, **options})
        return FloorEvaluation(loaded.settings, loaded).run()

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights, with their description, to a file that `load` and the commands read.

        :param path: ends in .safetensors for a file of that format; any other is a .pt, which published code reads too.
        Raises UserError where that fails.
        """
        self.export(path, "safetensors" if has_suffix(str(path)) else "pt")

    def export(self, path: str | os.PathLike, to: str = "pt", **options: Any) -> None:
        """Write the model in a format, which the log says the losses of.

        :param path: the file or the folder to write; one that is there is replaced.
        :param to: one of the formats of `improved-diffusion export`.
        :param options: others of that command.
        Raises UserError for a model that the format cannot express.
        """
        formats.export(self._loaded, ExportConfig(out=path_argument("path", path), to=to, **options))

    def to_diffusers(self, folder: str | os.PathLike, *, drop_variance: bool = False) -> None:
        """Write a folder that `DDPMPipeline.from_pretrained` of diffusers loads.

        :param drop_variance: leave a learned variance out, for `DDIMPipeline`.
        Raises UserError for a model that diffusers cannot express.
        """
        self.export(folder, "diffusers", drop_variance=drop_variance)

    # The Hugging Face Hub

    def card(self, **options: Any) -> Card:
        """The model card that `push_to_hub` uploads: `text`, and the `grid` of samples as a PNG; `save(folder)`.

        :param options: those of `push_to_hub`.
        """
        return self._card(CardConfig(**options))

    def push_to_hub(self, repo: str, *, token: str | None = None, **options: Any) -> str:
        """Upload the model, with a model card and a grid of samples, in one commit; returns the commit's URL.

        The repository is made where there is none. Files of the same names are replaced, and the log says which; the
        others stay. Collective.
        :param repo: user/name.
        :param token: with the right to write; HF_TOKEN, or the token of the Hub's own login, unless given.
        :param options: those of `improved-diffusion push`: license="mit", private=True, message, report, samples, ...
        Raises UserError where that fails.
        """
        asked = PushConfig(repo=repo, **options)
        return distributed.from_rank0(push, self._loaded, asked, token, self._card)

    def _card(self, options: CardConfig) -> Card:
        return make_card(self._loaded, options, self._grid)

    def _grid(self, options: Mapping[str, Any]) -> bytes:
        """The PNG of a grid of samples."""
        return self.sample(**options)._repr_png_()


def _asked(n: int | None, classes: Any, seed: int, seeds: Any) -> dict[str, Any]:
    """The options that say which images to draw."""
    listed = {"seeds": seeds} if str(seeds).strip() else {}
    if n is None and not listed:
        n = 1
    return {**({} if n is None else {"num_samples": n}), **listed, "seed": seed, **_classes(classes)}


def _numbers(wanted: Sequence[int] | None, count: int) -> Sequence[int]:
    """The numbers of the edited images to make. Raises UserError where they are none of them."""
    if wanted is None:
        return range(count)
    if not len(wanted) or not all(isinstance(i, (int, np.integer)) and 0 <= i < count for i in wanted):
        raise UserError(f"numbers={shown(wanted)}: expected some of 0 to {count - 1}")
    return [int(i) for i in wanted]


def _classes(classes: Any) -> dict[str, Any]:
    """The option `classes`, from a name, a label, or several."""
    if classes is None:
        return {}
    several = isinstance(classes, Iterable) and not isinstance(classes, str)
    return {"classes": list(classes) if several else classes}


def _labels(labels: Labels | None, numbers: Sequence[int]) -> tuple[np.ndarray | None, Sequence[str] | None]:
    """(the class of each image, the classes' names)."""
    if labels is None:
        return None, None
    return np.array([labels.index(i) for i in numbers], np.int64), labels.class_names


def _plain(name: str, given: Any) -> Any:
    """Images as an array, paths with ~ expanded; anything else as it is."""
    if isinstance(given, (list, tuple)):
        return [path_argument(name, each) if isinstance(each, (str, os.PathLike)) else each for each in given]
    if isinstance(given, (str, os.PathLike)):
        return path_argument(name, given)
    return given.array if isinstance(given, Images) else given


def load(
    path: str | os.PathLike, *, average: str | float | None = None, preset: str = "", revision: str = "",
    token: str | None = None, **options: Any,
) -> Model:  # fmt: skip
    """The model in a checkpoint file, the newest of a run's folder, or "user/name" on the Hugging Face Hub.

    :param average: of a run's folder, which moving average, such as 0.9999; "raw" for the weights themselves; the first
        average unless given.
    :param preset: the published model that a file without a description holds, such as "adm-imagenet64".
    :param revision: of a model on the Hub: a branch, a tag or a commit; the newest unless given.
    :param token: for the Hub; HF_TOKEN, or the token of its own login, unless given.
    :param options: what a file without a description does not say, such as num_heads=4.
    Raises UserError for a missing, damaged or hostile file. Nothing in it is executed.
    """
    if average is not None and (isinstance(average, bool) or not isinstance(average, (str, int, float))):
        raise UserError(f'average={shown(average)}: expected a rate such as 0.9999, or "raw"')
    path = path_argument("path", path)
    if revision and os.path.exists(path):
        raise UserError(f"revision={shown(revision)}: {path} is a local path, which has no revision")
    if revision and "@" in path:
        raise UserError(f"{path} with revision={shown(revision)}: two revisions, give one")
    return _load(f"{path}@{revision}" if revision else path, average, preset, options, token=token)


def _load(
    path: str, average: str | float | None, preset: str, options: Mapping[str, Any], *, warn: bool = True,
    token: str | None = None,
) -> Model:  # fmt: skip
    file = distributed.from_rank0(find_file, path, average, "", token)
    found = read(file)
    kind = read_kind(file, found)
    given = merge_options([options_for(preset, kind) if preset else {}, options])
    return Model(load_model(kind.of(given), frozenset(given), file, warn=warn, found=found))


def train(data_dir: str | os.PathLike, *, preset: str = "", **options: Any) -> Model:
    """Train a model on images and return it; every option of `improved-diffusion train` is a keyword.

    With large_size and small_size it is a super-resolution model. Ctrl-C saves a checkpoint, ends the training and
    returns the model as it is; resume="auto" continues from there.
    :param preset: a published model's options, or a recipe's, which apply where none are given; "auto" chooses a recipe
        by the images and the hardware.
    Raises UserError for what cannot work, before training starts. Collective where there are several ranks.
    """
    superres = bool({"large_size", "small_size"} & options.keys())
    kind: type[Settings] = SuperResTraining if superres else ImageTraining
    asked = _with_preset(preset, kind, {"data_dir": data_dir, **options})
    settings: Any = kind.of(merge_options([until_chosen(preset), asked]))
    return _trained(settings, frozenset(asked), "super_res_train" if superres else "image_train", preset)


def _with_preset(preset: str, kind: type[Settings], options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of a preset where none are given."""
    if not isinstance(preset, str):
        raise UserError(f"preset {shown(preset)}: expected a name")
    return merge_options([options_for(preset, kind), options]) if preset else options


def _trained(settings: Any, given: frozenset[str], default_name: str, preset: str = "") -> Model:
    """The model that a run ends with; see run.train."""
    if settings.train.dry_run:
        raise UserError("dry_run trains no model to return: use the command, such as improved-diffusion train")
    trained = run.train(settings, given, default_name, preset)
    return _load(trained.checkpoints, None, "", {}, warn=False)  # training has warned at its start


def distill(
    teacher: str | os.PathLike | Model, data_dir: str | os.PathLike, *, preset: str = "", **options: Any
) -> Model:  # fmt: skip
    """A model that samples in a few steps, made of a trained one; options are those of `improved-diffusion distill`.

    :param teacher: the trained model, its checkpoint, or its run's folder; "" with resume: the run's own.
    :param data_dir: the images that it was trained on, or others like them.
    :param preset: the published model that the teacher is, where its file does not describe it.
    Ctrl-C, resume="auto" and errors are as in `train`. Collective where there are several ranks.
    """
    path = teacher.path if isinstance(teacher, Model) else teacher
    options |= {"data_dir": data_dir, **({"teacher": path} if path else {})}
    asked = _with_preset(preset, Distilling, options)
    return _trained(Distilling.of(asked), frozenset(asked), "distill")


def evaluate(samples: Any, reference: Any, *, features: str, **options: Any) -> Report:
    """Compare samples with real images: FID, KID and other scores, each an attribute of the report.

    :param samples, reference: a folder, a zip, an npz, Images, or uint8 [N, H, W, C]; the reference may be statistics.
    :param features: an exported program (.pt2), TorchScript (.pt), a URL, or "inception".
    :param options: held_out, train_dir and out_dir, and those of `improved-diffusion evaluate`, such as
        trust_features=True and resize=64.
    """
    given = {name: _plain(name, value) for name, value in options.items()}
    return evaluator.evaluate(_plain("samples", samples), _plain("reference", reference), features=features, **given)


def loss_floor(data_dir: str | os.PathLike, **options: Any) -> FloorReport:
    """The least loss that any model can have on a set of images, by noise level.

    :param data_dir: a folder, a .zip or an .npz.
    :param options: of `improved-diffusion loss-floor`, such as image_size=64, noise_schedule="cosine", class_cond=True.
    A model's own loss beside it: `model.loss_floor(...)`.
    """
    for name in options.keys() & _OF_COMMANDS:
        raise UserError(f"{name} is for the command only: in Python, load the model, and the result is returned")
    return FloorEvaluation(LossFloor.of({"data_dir": data_dir, **options})).run()
