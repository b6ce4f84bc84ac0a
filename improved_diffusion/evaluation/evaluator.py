"""The evaluator: reads the network and the real images once, then reports on any number of sets of samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th

from .. import __version__, distributed
from ..config import EvaluationConfig, FeaturesConfig, ReadingConfig, UserError, height_width, path_argument
from ..config.settings import FeatureExtraction, Scoring
from ..data.dataset import selection
from ..logs import logger
from ..utils import files
from ..utils.resizing import PREPARED
from . import report
from .feature_sets import (
    AS_THEY_ARE,
    IN_MEMORY,
    MIN_IMAGES,
    FeatureSet,
    ImageSet,
    by,
    check_resizing,
    extract,
    metrics_device,
)
from .features import FeatureNetwork
from .loss_floor import FloorReport
from .metrics.copies import nearest
from .metrics.frechet import moments
from .metrics.neighbours import nearest_neighbours
from .metrics.scores import find_copies, score
from .provenance import made_by, samples_dir
from .references import check_comparable, check_form, check_network, load_reference, needs_images, with_statistics
from .report import Metric, Pictures, Real, Report

MAX_OVERLAP = 0.01  # share of held-out images that may be training images too: some data sets have a few duplicates
_DEFAULT_READING = ReadingConfig()

Result = TypeVar("Result")
Images = str | os.PathLike | np.ndarray  # a folder, a zip or an npz; or uint8 [N, H, W, C]


class Inputs:
    """The feature network and the sets of real images, opened and checked; no features are computed yet. Collective.

    :param config: network options.
    :param reference: real images, or an npz of their statistics.
    :param train: training images, to find copies of them; None: those of the reference.
    :param held_out: real images that the model was not trained on; None: no copy score.
    :param reading: how image files become pixels.
    Raises UserError for what is missing, damaged or contradictory.
    """

    def __init__(
        self, config: FeaturesConfig, reference: Images, train: Images | None = None, held_out: Images | None = None,
        reading: ReadingConfig = _DEFAULT_READING,
    ):  # fmt: skip
        check_resizing(config.resize, reading)
        self.config, self.reading = config, reading
        self.network = FeatureNetwork.of(config)
        self.statistics = None if isinstance(reference, np.ndarray) else load_reference(_path(reference), "--reference")
        train_flag = "--reference" if train is None else "--train_dir"
        trained_on = reference if train is None else train
        if held_out is not None and _same(held_out, trained_on):
            raise UserError(
                f"--held_out {_name(held_out)} is the same as {train_flag}: give images that the model was not trained "
                "on"
            )
        self.sets: dict[str, ImageSet] = {}
        if self.statistics is None or needs_images(_path(reference)):
            self.sets["reference"] = self._open(reference, "--reference")
        if self.statistics is not None:
            check_network(self.network.describe(), self.statistics)
        for name, given in (("train_dir", train), ("held_out", held_out)):
            if given is not None and not ("reference" in self.sets and _same(given, reference)):
                self.sets[name] = self._open(given, f"--{name}")
        self.is_held_out_reference = held_out is not None and "held_out" not in self.sets
        for image_set in self.sets.values():
            self.check_form(f"{image_set.flag} {image_set.path}", image_set.describe())

    @classmethod
    def of(cls, inputs: EvaluationConfig, features: FeaturesConfig, reading: ReadingConfig) -> Inputs:
        """The inputs that options name. Collective."""
        if not inputs.reference:
            raise UserError("--reference is missing: name real images, or an npz of their statistics")
        return cls(features, inputs.reference, inputs.train_dir or None, inputs.held_out or None, reading)

    def _open(self, images: Images, flag: str) -> ImageSet:
        return ImageSet(_path(images), flag, self.config.resize, self.config.colour, reading=self.reading)

    def check_out_dir(self, out_dir: str, *paths: str) -> None:
        """Raise UserError where the report would be written into a folder whose images are read.

        :param paths: of samples.
        """
        for path in (*paths, *(image_set.path for image_set in self.sets.values())):
            if files.is_dir(path) and not files.is_url(path):
                folder, out = os.path.realpath(path), os.path.realpath(out_dir)
                if os.path.commonpath([folder, out]) == folder:
                    raise UserError(f"--out_dir {out_dir} is in {path}, whose images are all read: choose another")

    def open_samples(self, samples: Images, count: int = 0) -> ImageSet:
        """Samples to evaluate. :param count: how many to take; 0: all.

        Raises UserError for those that cannot be evaluated.
        """
        images = samples if isinstance(samples, np.ndarray) else samples_dir(os.fspath(samples))
        mode = "crop" if self.reading.resize_mode == "random_crop" else self.reading.resize_mode
        reading = replace(self.reading, resize_mode=mode)  # samples show random crops already
        found = ImageSet(images, "--samples", self.config.resize, self.config.colour, count, reading)
        _made_by(found)  # fails early
        self.check_samples("--samples", found.describe())
        return found

    def check_model(self, model_path: str, num_samples: int) -> None:
        """Raise UserError where the samples that a model will draw cannot be evaluated."""
        theirs = self.statistics.about.get("prepared", AS_THEY_ARE) if self.statistics else AS_THEY_ARE
        if theirs not in (AS_THEY_ARE, ours := PREPARED[self.reading.resize_mode]):
            logger.warn(f"the images of --reference were {theirs}, those that {model_path} was trained on {ours}")
        size, channels = by(height_width(self.config.resize)), 3 if self.config.colour else 1
        about = {"images": model_path, "count": num_samples, "image_size": size, "channels": channels}
        self.check_samples("--model_path", about)

    def check_samples(self, flag: str, about: Mapping[str, Any]) -> None:
        """Raise UserError where samples with this description cannot be evaluated. Runs the network on noise."""
        self.check_form(f"{flag} {about['images']}", about)
        outputs = self.network.check(height_width(about["image_size"]), about["channels"])
        if self.statistics is not None:
            spatial = None if outputs.spatial is None else moments(outputs.spatial)
            described = {**about, **self.network.describe()}
            trial = FeatureSet(flag, described, moments=moments(outputs.features), spatial_moments=spatial)
            check_comparable(trial, self.statistics)

    def check_form(self, name: str, about: Mapping[str, Any]) -> None:
        """Raise UserError where images with this description differ from the reference in size or channels."""
        if self.statistics is not None:
            theirs = (self.statistics.name, self.statistics.about)
            check_form((name, dict(about)), theirs, written=True)
        if "reference" in self.sets:
            ours = self.sets["reference"]
            check_form((name, dict(about)), (f"{ours.flag} {ours.path}", ours.describe()), written=False)

    def extract(self, image_set: ImageSet, probabilities: bool) -> FeatureSet:
        """The features of a set of images, and class probabilities for its inception score. Collective."""
        title = f"features of {image_set.flag}"
        return extract(image_set, self.network, self.config.feature_batch, title, probabilities)

    def prepare(self) -> Evaluator:
        """Compute the features of all sets of real images. Collective."""
        found = {name: self.extract(image_set, name == "held_out") for name, image_set in self.sets.items()}
        reference = found.get("reference", self.statistics)
        assert reference is not None
        if "reference" in found and self.statistics is not None:
            reference = with_statistics(reference, self.statistics)
        # Training images that are the reference itself are not read twice, and neither are such held-out images.
        train = found.get("train_dir") or (reference if "reference" in found else None)
        held_out = reference if self.is_held_out_reference else found.get("held_out")
        distributed.from_rank0(_check_sets, self.network, reference, train, held_out)
        return Evaluator(self, reference, train, held_out)


class Evaluator:
    """Reports on samples. Collective. Made by `Inputs.prepare`.

    :param train: the training images, in which copies are looked for; None: there are none.
    :param held_out: real images that the model was not trained on, which may be the reference; None: there are none.
    """

    def __init__(
        self, inputs: Inputs, reference: FeatureSet, train: FeatureSet | None = None, held_out: FeatureSet | None = None
    ):
        self.inputs, self.reference, self.train, self.held_out = inputs, reference, train, held_out
        self._held_out_scores: dict[int, Real] = {}  # by the number of images

    def describe(self) -> dict[str, Any]:
        """What a report depends on besides the samples."""
        sets = {"reference": self.reference, "train": self.train, "held_out": self.held_out}
        return {
            **{name: found.about for name, found in sets.items() if found is not None},
            **self.inputs.network.describe(),
        }

    def evaluate(
        self, samples: ImageSet, out_dir: str = "", asked: Mapping[str, Any] | None = None,
        loss: FloorReport | None = None,
    ) -> Report:  # fmt: skip
        """The report on samples from `Inputs.open_samples`. Ranks other than 0 get it without pictures. Collective.

        :param out_dir: write the report there; "": do not.
        :param asked: further entries for the report's `asked`.
        :param loss: of the model on its training images, for the report.
        """
        found = self.inputs.extract(samples, probabilities=True)
        complete: list[Report] = []  # stays on rank 0, which has the features

        def on_rank0() -> Report:
            complete.append(self._report(found, dict(asked or {}), loss))
            if out_dir:
                logger.log(f"wrote {complete[0].save(out_dir)}, and report.json and pictures beside it")
            return complete[0].without_pictures()

        bare = distributed.from_rank0(on_rank0)
        return complete[0] if complete else bare

    def _report(self, samples: FeatureSet, asked: dict[str, Any], loss: FloorReport | None) -> Report:
        assert samples.images is not None
        warnings = check_comparable(samples, self.reference)
        logger.log("computing the metrics")
        metrics, missing = _computed(score, samples, self.reference)
        copies = self._copies(samples)
        if copies.metric is None:
            missing["copies"] = _why_no_copies(self.train)
        else:
            metrics["copies"] = copies.metric
        shown = samples.images.take(selection(len(samples.images), report.SHOWN_SAMPLES).tolist())
        made = Report(
            **_metrics(metrics),
            samples={**samples.about, "made_by": _made_by(samples.images)},
            reference=self.reference.about,
            train=self.train.about if self.train else None,
            held_out=self.held_out.about if self.held_out else None,
            real=self._score_held_out(len(samples.images)),
            missing=missing,
            loss=None if loss is None else loss.to_dict(),
            warnings=(*warnings, *self._overlaps(samples), *(loss.warnings if loss else ())),
            asked=asked,
            versions={"improved_diffusion": __version__, "torch": th.__version__, "numpy": np.__version__},
            pictures=Pictures(shown, copies.neighbours, copies.distances, loss),
            shown={
                "neighbours": copies.neighbours is not None,
                "distances": copies.distances is not None,
                **({} if loss is None else {"loss": True}),
            },
        )
        _log(made)
        return made

    def _score_held_out(self, count: int) -> Real | None:
        """The scores of real images that are not the reference: of as many as the samples, where there are as many."""
        if self.held_out is None or self.held_out is self.reference:
            return None
        held_out = self.held_out.subset(count)
        assert held_out.features is not None
        n = len(held_out.features)
        if n not in self._held_out_scores:
            metrics = _computed(score, held_out, self.reference).metrics
            self._held_out_scores[n] = Real(n, _metrics(metrics))
        return self._held_out_scores[n]

    def _overlaps(self, samples: FeatureSet) -> list[str]:
        """Warnings about samples that are real images."""
        found = []
        if samples.about["pixels_sha256"] == self.reference.about.get("pixels_sha256"):
            found.append("the samples are the images of the reference")
        if self.train is not None and (same := len(samples.digests & self.train.digests)):
            found.append(f"{same:,} of the samples are training images, pixel by pixel")
        return found

    @cached_property
    def _held_out_distances(self) -> np.ndarray | None:
        """The distances [K] of the held-out images to the training images."""
        if self.train is None or self.train.features is None or self.held_out is None or self.held_out.features is None:
            return None
        return _computed(nearest, self.held_out.features, self.train.features)[0]

    def _copies(self, samples: FeatureSet) -> _Copies:
        """How near the samples are to the training images, and the nearest pairs."""
        if self.train is None:
            return _Copies(None, None, None)
        assert samples.features is not None and self.train.features is not None
        copies = _computed(find_copies, samples.features, self.train.features, self._held_out_distances)
        suspects = np.argsort(copies.distances, kind="stable")[: report.SHOWN_COPIES]
        _, near = _computed(
            nearest_neighbours, samples.features[suspects], self.train.features, report.SHOWN_NEIGHBOURS
        )
        neighbours = report.Neighbours(
            samples.take(suspects.tolist()), np.stack([self.train.take(row) for row in near])
        )
        distances = None if copies.held_out is None else (copies.distances, copies.held_out)
        return _Copies(copies.metric, neighbours, distances)


def _computed(metric: Callable[..., Result], *args: Any) -> Result:
    """The result of a metric on an accelerator, or on the CPU where there is none or its memory is too small."""
    device = metrics_device()
    try:
        return metric(*args, device=device)
    except RuntimeError as error:
        if not distributed.is_out_of_memory(error):
            raise
    logger.log(f"the metrics need more memory than {device.type} has free: computing them on the CPU, which is slower")
    distributed.empty_cache(device)
    return metric(*args, device="cpu")


class _Copies(NamedTuple):
    metric: dict[str, float] | None
    neighbours: report.Neighbours | None
    distances: tuple[np.ndarray, np.ndarray] | None  # of samples and held-out images to the training images


def evaluate(
    samples: Images,
    reference: Images,
    *,
    features: str,
    train_dir: Images | None = None,
    held_out: Images | None = None,
    out_dir: str | os.PathLike | None = None,
    **options: Any,
) -> Report:
    """Compare samples with real images: FID, KID, inception score, precision, recall, density, coverage, copy score.

    Images are a folder, a zip, an npz, or an array uint8 [N, H, W, C] with 1 or 3 channels; at least 40. Collective.
    :param reference: real images, or an npz of their statistics.
    :param features: an exported program (.pt2), TorchScript (.pt), a URL, or "inception".
    :param train_dir: training images, to find copies of them; None: those of the reference.
    :param held_out: real images that the model was not trained on, for the copy score.
    :param out_dir: write the report there.
    :param options: the other options of FeaturesConfig (logits, trust_features, feature_size, feature_batch, resize,
        colour) and those of ReadingConfig.
    Raises UserError for images that cannot be compared, and for a feature program that is not trusted.
    """
    settings = FeatureExtraction.of({"features": features, **options})
    given, real = _argument("samples", samples), _argument("reference", reference)
    train = None if train_dir is None else _argument("train_dir", train_dir)
    held = None if held_out is None else _argument("held_out", held_out)
    inputs = Inputs(settings.features, real, train, held, settings.reading)
    opened = inputs.open_samples(given)
    folder = "" if out_dir is None else path_argument("out_dir", out_dir)
    if folder:
        inputs.check_out_dir(folder, opened.path)
    return inputs.prepare().evaluate(opened, folder)


def prepare_like_training(settings: Scoring, model_path: str, num_samples: int) -> FeaturesConfig:
    """The network options with which real images are prepared as in the model's training, unless the user gave others.

    :param settings: with the model's options. Raises UserError for samples that could not be evaluated.
    """
    features, model = settings.features, settings.model
    if settings.sampler.print_steps:
        raise UserError("--print_steps draws no samples to evaluate: give it to the sample command")
    if num_samples < MIN_IMAGES:
        raise UserError(f"--num_samples {num_samples}: at least {MIN_IMAGES} are needed")
    return replace(features, resize=features.resize or str(model.size), colour=features.colour or model.channels >= 3)


def _check_sets(
    network: FeatureNetwork, reference: FeatureSet, train: FeatureSet | None, held_out: FeatureSet | None
) -> None:
    """Raise UserError where the network cannot tell the reference's images apart, or held-out images are trained on."""
    assert reference.moments is not None
    if not reference.moments.sigma.any():
        raise UserError(f"{network.program.name} gives the same features for all images of {reference.name}")
    if held_out is None or train is None:
        return
    both = len(held_out.digests & train.digests)
    if both > MAX_OVERLAP * len(held_out.digests):
        raise UserError(
            f"{both:,} of the images of {held_out.name} are also in {train.name}: give images that the model was not "
            "trained on"
        )


def _why_no_copies(train: FeatureSet | None) -> str:
    if train is None:
        return "there are no training images: give --train_dir and --held_out"
    return "there are no held-out images to compare the distances with: give --held_out"


def _made_by(samples: ImageSet) -> dict[str, Any] | None:
    return None if samples.path == IN_MEMORY else made_by(samples.path)


def _metrics(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {name: Metric(each["value"], each.get("error")) for name, each in found.items()}


def _log(made: Report) -> None:
    for warning in made.warnings:
        logger.warn(warning)
    for name, metric in made.metrics.items():
        text = f"{report.title(name)}: {report.number(name, metric)}"
        if made.real and name in made.real.metrics:
            real = report.number(name, made.real.metrics[name])
            text += f" ({made.real.count:,} held-out real images: {real})"
        logger.log(text.replace("±", "+-"))  # which not every terminal can show
    for name, why in made.missing.items():
        logger.log(f"no {report.title(name)}: {why}")


def _argument(name: str, images: Any) -> Images:
    """Images given in Python: an array or a path. Raises UserError for anything else."""
    return images if isinstance(images, np.ndarray) else path_argument(name, images)


def _path(images: Any) -> Any:
    """Paths as text; arrays and None as they are."""
    return os.fspath(images) if isinstance(images, os.PathLike) else images


def _name(images: Images) -> str:
    return IN_MEMORY if isinstance(images, np.ndarray) else str(images)


def _same(a: Images, b: Images) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is b
    return files.same(a, b)
