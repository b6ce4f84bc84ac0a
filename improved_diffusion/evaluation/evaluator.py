"""From options to a report: what samples are judged by and against, read once; then any number of sets of samples."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch as th

from .. import __version__, distributed
from ..config import FeaturesConfig, JudgedConfig, UserError, height_width
from ..data.dataset import selection
from ..logs import logger
from ..sampling.solvers import RULES
from ..sampling.writer import PNG_DIR, REQUEST_FILE
from ..utils import files, images
from . import report
from .feature_network import FeatureNetwork
from .feature_sets import MIN_IMAGES, FeatureSet, ImageSet, by, extract
from .metrics.copies import nearest
from .metrics.frechet import moments
from .metrics.neighbours import nearest_neighbours
from .metrics.scores import find_copies, score
from .references import (
    check_comparable,
    check_form,
    check_network,
    load_reference,
    needs_images,
    save_reference,
    with_statistics,
)

MAX_OVERLAP = 0.01  # of the held-out images that may be training images too: some data sets have a few


class Judge:
    """The network, the reference, and the sets in which copies are looked for, as options describe them. Collective.

    Raises UserError for what is missing, damaged or does not go together, before anything is computed.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.network = open_network(options)
        reference = load_reference(_given(options, "reference", "real images, or their statistics"), "--reference")
        sets = {}
        if reference is None or needs_images(options.reference):
            sets["reference"] = self._open(options.reference, "--reference")
        if reference is not None:
            check_network(self.network.describe(), reference)
        for name in ("train_dir", "held_out"):
            path = getattr(options, name)
            if path and not ("reference" in sets and files.same(path, options.reference)):
                sets[name] = self._open(path, f"--{name}")
        train_flag = "--train_dir" if options.train_dir else "--reference"
        if options.held_out and files.same(options.held_out, options.train_dir or options.reference):
            raise UserError(
                f"--held_out {options.held_out} are the training images, those of {train_flag}: give images that were "
                "not trained on"
            )
        self.sets = sets
        self.reference = reference
        for image_set in sets.values():
            self.check_form(f"{image_set.flag} {image_set.path}", image_set.describe())
        self.train: FeatureSet | None = None
        self.held_out: FeatureSet | None = None
        self.normal: np.ndarray | None = None  # the held-out images' distances to the training images
        self.real: tuple[int, dict[str, Any]] = (0, {})  # how many held-out images there are scores of, and the scores

    def _open(self, path: str, flag: str) -> ImageSet:
        return ImageSet(path, flag, self.options.resize, self.options.colour)

    def check_out_dir(self, out_dir: str, *paths: str) -> None:
        """Raise UserError where the report would be written among images that are read: its pictures would be too.

        :param paths: of samples.
        """
        for path in (*paths, *(image_set.path for image_set in self.sets.values())):
            if files.is_dir(path) and not files.is_url(path):
                folder, out = os.path.realpath(path), os.path.realpath(out_dir)
                if os.path.commonpath([folder, out]) == folder:
                    raise UserError(f"--out_dir {out_dir} lies in {path}, of which all images are read: choose another")

    def open_samples(self, path: str) -> ImageSet:
        """The samples in an npz, a folder or a zip. Raises UserError where they cannot be judged.

        Of samples that were given, as many as --num_samples asks for.
        """
        if files.is_dir(path) and files.exists(files.join(path, REQUEST_FILE)):
            path = files.join(path, PNG_DIR)  # beside which there are other pictures
        count = self.options.num_samples if "num_samples" in self.options.given and self.options.samples else 0
        samples = ImageSet(path, "--samples", self.options.resize, self.options.colour, count)
        made_by(path)  # what is wrong with their description comes out now
        self.expect("--samples", samples.describe())
        return samples

    def expect_drawn(self) -> None:
        """Raise UserError where what --model_path draws, prepared as `settle_for` settled it, cannot be judged."""
        size = by(height_width(self.options.resize))
        about = {"images": self.options.model_path, "count": self.options.num_samples, "image_size": size}
        self.expect("--model_path", {**about, "channels": 3 if self.options.colour else 1})

    def expect(self, flag: str, about: Mapping[str, Any]) -> None:
        """Raise UserError where samples so described cannot be judged. Tries the network, on noise."""
        self.check_form(f"{flag} {about['images']}", about)
        outputs = self.network.check(height_width(about["image_size"]), about["channels"])
        if self.reference is not None:
            spatial = None if outputs.spatial is None else moments(outputs.spatial)
            tried = {**about, **self.network.describe()}
            check_comparable(
                FeatureSet(flag, tried, moments=moments(outputs.features), spatial_moments=spatial), self.reference
            )

    def check_form(self, name: str, about: Mapping[str, Any]) -> None:
        """Raise UserError where images so described have another size or other channels than the reference's."""
        if self.reference is not None:
            check_form((name, dict(about)), (self.reference.name, self.reference.about), self.reference.images is None)
        if "reference" in self.sets:
            ours = self.sets["reference"]
            check_form((name, dict(about)), (f"{ours.flag} {ours.path}", ours.describe()), False)

    def extract(self, image_set: ImageSet, probabilities: bool) -> FeatureSet:
        """The features of a set of images, and the probabilities where its inception score is wanted. Collective."""
        title = f"features of {image_set.flag}"
        return extract(image_set, self.network, self.options.feature_batch, title, probabilities)

    def prepare(self) -> None:
        """Extract the features of the reference and of the training and held-out images. Collective."""
        found = {name: self.extract(image_set, name == "held_out") for name, image_set in self.sets.items()}
        if "reference" in found and self.reference is not None:
            found["reference"] = with_statistics(found["reference"], self.reference)
        self.reference = found.get("reference", self.reference)
        # Where the training images are the reference itself, they are not read twice.
        self.train = found.get("train_dir", found.get("reference"))
        self.held_out = found.get("held_out")
        if self.options.held_out and self.held_out is None:
            self.held_out = self.reference
        distributed.from_rank0(self._check_sets)

    def _check_sets(self) -> None:
        """Raise UserError where all images of the reference are one to the network, or held-out ones are trained on."""
        assert self.reference is not None and self.reference.moments is not None
        if not self.reference.moments.sigma.any():
            raise UserError(
                f"{self.network.program.flag} gives the same features for all images of {self.reference.name}"
            )
        if self.held_out is None or self.train is None:
            return
        both = len(self.held_out.digests & self.train.digests)
        if both > MAX_OVERLAP * len(self.held_out.digests):
            raise UserError(
                f"{both:,} of the images of {self.held_out.name} are among those of {self.train.name}: give images "
                "that were not trained on"
            )

    def _score_held_out(self, count: int) -> tuple[int, dict[str, Any]]:
        """What real images get that are not the reference: as many as the samples where there are as many."""
        if self.held_out is None or self.held_out is self.reference:
            return 0, {}
        held_out = self.held_out.subset(count)
        assert held_out.features is not None
        if self.real[0] != len(held_out.features):
            self.real = len(held_out.features), score(held_out, self.reference).metrics
        return self.real

    def judge(self, image_set: ImageSet, out_dir: str, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Judge samples as `open_samples` opens them, and write the report; returns it. Collective, after `prepare`.

        :param asked: what to note in the report, besides.
        """
        samples = self.extract(image_set, probabilities=True)
        # On rank 0, which has the features; the others wait.
        return distributed.from_rank0(self._write, samples, image_set.path, out_dir, dict(asked or {}))

    def _write(self, samples: FeatureSet, path: str, out_dir: str, asked: dict[str, Any]) -> dict[str, Any]:
        reference = self.reference
        assert reference is not None and samples.images is not None
        warnings = check_comparable(samples, reference)
        logger.log("computing the metrics")
        metrics, missing = score(samples, reference)
        count, real = self._score_held_out(len(samples.images))
        if samples.about["pixels_sha256"] == reference.about.get("pixels_sha256"):
            warnings.append("the samples are the images of the reference")
        if self.train is not None and (same := len(samples.digests & self.train.digests)):
            warnings.append(f"{same:,} of the samples are training images, pixel by pixel")
        copies, neighbours = self._look_for_copies(samples)
        if copies is None:
            missing["copies"] = "no training images to look for them in: give --train_dir and --held_out"
        elif copies.held_out is None:
            missing["copies"] = "no images that were not trained on, to compare the distances with: give --held_out"
        else:
            metrics["copies"] = copies.metric
        result = {
            "samples": {**samples.about, "made_by": made_by(path)},
            "reference": reference.about,
            "train": self.train.about if self.train else None,
            "held_out": self.held_out.about if self.held_out else None,
            "metrics": metrics,
            "real": {"count": count, "metrics": real} if real else None,
            "missing": missing,
            "warnings": warnings,
            "pictures": {"neighbours": neighbours is not None, "distances": "copies" in metrics},
            "asked": asked,
            "versions": {"improved_diffusion": __version__, "torch": th.__version__, "numpy": np.__version__},
        }
        for warning in warnings:
            logger.warn(warning)
        for name, metric in metrics.items():
            text = f"{report.title(name)}: {report.number(name, metric)}"
            text += f" ({count:,} held-out real images: {report.number(name, real[name])})" if name in real else ""
            logger.log(text.replace("±", "+-"))  # not every terminal has it
        for name, why in missing.items():
            logger.log(f"no {report.title(name)}: {why}")
        shown = samples.images.take(selection(len(samples.images), report.SHOWN_SAMPLES).tolist())
        distances = (copies.distances, copies.held_out) if "copies" in metrics else None
        path = report.write(out_dir, result, shown, neighbours, distances)
        logger.log(f"wrote {path}, and report.json and pictures beside it")
        return result

    def _look_for_copies(self, samples: FeatureSet) -> tuple[Any, report.Neighbours | None]:
        """The samples' distances to the training images, and the nearest pairs; None where there are none of those."""
        if self.train is None:
            return None, None
        assert samples.features is not None and self.train.features is not None
        if self.normal is None and self.held_out is not None and self.held_out.features is not None:
            self.normal, _ = nearest(self.held_out.features, self.train.features)
        copies = find_copies(samples.features, self.train.features, self.normal)
        suspects = np.argsort(copies.distances, kind="stable")[: report.SHOWN_COPIES]
        _, near = nearest_neighbours(samples.features[suspects], self.train.features, count=report.SHOWN_NEIGHBOURS)
        train = np.stack([self.train.take(row) for row in near])
        return copies, report.Neighbours(samples.take(suspects.tolist()), train)


def open_network(options: argparse.Namespace) -> FeatureNetwork:
    """The network of --features. Collective. Raises UserError where there is none."""
    spec = _given(options, "features", "an exported program (.pt2), TorchScript (.pt), a URL, or inception")
    return FeatureNetwork(spec, options.feature_size, options.logits, distributed.dev())


def _given(options: argparse.Namespace, name: str, what: str) -> str:
    if not getattr(options, name):
        raise UserError(f"--{name} is missing: name {what}")
    return getattr(options, name)


def write_reference(options: argparse.Namespace) -> None:
    """Write the statistics and features of --images to --out. Collective."""
    if not options.out.endswith(".npz"):
        raise UserError(f"--out {options.out or 'is missing'}: name an npz to write, such as reference.npz")
    if files.is_url(options.out):
        raise UserError(f"--out {options.out} must be a local file: write it here, and copy it")
    network = open_network(options)
    image_set = ImageSet(_given(options, "images", "real images"), "--images", options.resize, options.colour)
    network.check(image_set.size, image_set.channels)  # what is wrong with it comes out now
    distributed.from_rank0(_check_writable, options.out)
    found = extract(image_set, network, options.feature_batch, "features")
    name = options.name or os.path.basename(os.path.abspath(options.images))
    distributed.from_rank0(_save_reference, options.out, found, name)


def _check_writable(path: str) -> None:
    if files.is_dir(path) or (files.exists(path) and "mu" not in images.npz_names(path)):
        raise UserError(f"--out {path} is there already and is no reference: name another file")
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"--out {path}: no file can be written into {folder}: name another place")


def _save_reference(path: str, found: FeatureSet, name: str) -> None:
    save_reference(path, found, name)
    logger.log(f"wrote {path}: {name}, {found.about['count']:,} images of {found.about['image_size']}")


# What is known of how samples were made


def made_by(path: str) -> dict[str, Any] | None:
    """What a samples.json says of the samples in a folder or an npz of ours; None where none lies beside them."""
    folder, name = os.path.split(files.full_path(path).rstrip("/"))
    if not (name == PNG_DIR or re.fullmatch(r"samples_[\dx]+\.npz", name)):
        return None
    beside = files.join(folder, REQUEST_FILE)
    if not files.exists(beside):
        return None
    try:
        request = json.loads(files.read_bytes(beside))
        return {**request, **implied_by(request)}
    except (ValueError, TypeError):
        raise UserError(f"{beside} is damaged: remove it, if how the samples were made need not be known") from None


def implied_by(request: Mapping[str, Any]) -> dict[str, Any]:
    """The average and the evaluations of the network that a request of samples implies."""
    found: dict[str, Any] = {}
    name = os.path.basename(str(request.get("model_path", "")))
    if match := re.fullmatch(r"ema_(.+)_(\d+)\.pt", name):
        found["average"] = match.group(1)
    elif re.fullmatch(r"model\d+\.pt", name):
        found["average"] = "none: the model itself"
    if request.get("sampler") in RULES and isinstance(request.get("steps"), int):
        found["evaluations"] = RULES[request["sampler"]]().evaluations(request["steps"])
    return found


def report_folder(path: str) -> str:
    """Where the report of given samples goes unless told: beside them, or into ./runs if they are behind a URL."""
    path = path if files.is_url(path) else os.path.realpath(path)
    stem = os.path.splitext(path.rstrip("/"))[0] if not files.is_dir(path) else path.rstrip("/")
    return f"{os.path.join('runs', os.path.basename(stem)) if files.is_url(path) else stem}_report"


def settle_for(options: argparse.Namespace, drawing_options: argparse.Namespace) -> None:
    """Prepare real images as the model's training did, unless told otherwise.

    :param drawing_options: with which the model was loaded. Raises UserError for samples that cannot be judged.
    """
    if options.print_steps:
        raise UserError("--print_steps draws nothing, so nothing could be judged: give it to image_sample.py")
    if drawing_options.channels == 4:
        raise UserError(f"{options.model_path} draws an alpha channel (--channels 4), which features cannot take")
    if options.num_samples < MIN_IMAGES:
        raise UserError(f"--num_samples {options.num_samples}: at least {MIN_IMAGES} are needed to tell anything")
    options.resize = options.resize or str(drawing_options.image_size)
    options.colour = options.colour or drawing_options.channels == 3


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError where the options say neither or both of which samples to judge and how to draw them."""
    if bool(options.samples) == bool(options.model_path):
        raise UserError("give --samples, to judge those, or --model_path, to draw them first: one of the two")
    of_judging = {f.name for group in (JudgedConfig, FeaturesConfig) for f in fields(group)} | {
        "num_samples",
        "out_dir",
    }
    others = sorted(options.flags - of_judging) + (["preset"] if options.preset else [])
    if options.samples and others:
        raise UserError(
            f"--{others[0]} is for drawing samples, and --samples {options.samples} are drawn already: leave it out"
        )
