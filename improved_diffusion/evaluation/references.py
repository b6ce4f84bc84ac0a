"""References: statistics of real images on disk, and whether two sets can be compared."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np

from .. import distributed
from ..config import UserError
from ..config.settings import ReferenceStatistics
from ..logs import logger
from ..utils import files, images
from ..utils.text import counted
from .feature_sets import AS_THEY_ARE, MIN_IMAGES, FeatureSet, ImageSet, check_resizing, extract
from .features import LARGEST, FeatureNetwork
from .metrics.frechet import Moments
from .report import checked_about

PUBLISHED_NAMES = ("mu", "sigma", "mu_s", "sigma_s")  # of statistics in an npz
_TEXTS = ("name", "images", "image_size", "features", "features_sha256", "prepared")  # in a description
MAX_WIDTH = 2**14  # features; the time of the Frechet distance grows with the cube
ROUNDING = 1e-2  # of statistics in 16 bits
FEW = 10_000  # published scores use at least as many samples and real images


# Writing


def write_reference(settings: ReferenceStatistics) -> None:
    """Write the statistics and the features of --images to --out. Collective."""
    out, path = settings.reference.out, settings.reference.images
    if not out.endswith(".npz"):
        raise UserError(f"--out {out or 'is missing'}: name an npz to write, such as reference.npz")
    if files.is_url(out):
        raise UserError(f"--out {out} must be a local file: write it locally, then copy it")
    check_resizing(settings.features.resize, settings.reading)
    network = FeatureNetwork.of(settings.features)
    if not path:
        raise UserError("--images is missing: name real images, a folder, a zip or an npz")
    image_set = ImageSet(path, "--images", settings.features.resize, settings.features.colour, reading=settings.reading)
    network.check(image_set.size, image_set.channels)  # fails early
    distributed.from_rank0(_check_writable, out)
    found = extract(image_set, network, settings.features.feature_batch, "features")
    name = settings.reference.name or os.path.basename(os.path.abspath(path))
    distributed.from_rank0(save_reference, out, found, name)
    logger.log(f"wrote {out}: {name}, {found.about['count']:,} images of {found.about['image_size']}")


def _check_writable(path: str) -> None:
    if files.is_dir(path) or (files.exists(path) and "mu" not in images.npz_names(path)):
        raise UserError(f"--out {path} exists and is not a reference: name another file")
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"--out {path}: no file can be written into {folder}: name another place")


def save_reference(path: str, reference: FeatureSet, name: str) -> None:
    """Write moments, features and description under the published names, as an npz that holds no objects."""
    arrays: dict[str, np.ndarray] = {}
    for suffix, of in (("", reference.moments), ("_s", reference.spatial_moments)):
        if of is not None:
            arrays |= {f"mu{suffix}": of.mu, f"sigma{suffix}": of.sigma}
    if reference.features is not None:
        arrays["features"] = reference.features
    about = json.dumps({"name": name, **reference.about})
    images.save_npz(path, **arrays, about=np.array(about))


# Reading


def load_reference(path: str, flag: str) -> FeatureSet | None:
    """The statistics in an npz, and on rank 0 its features; None where the path has images only. Collective.

    Raises UserError for a damaged file.
    """
    if not path.lower().endswith(".npz") or not files.exists(path):
        return None
    what, members = f"{flag} {path}", images.npz_names(path)
    if not {"mu", "sigma"} & set(members):
        if "arr_0" in members:
            return None
        raise UserError(f"{what} has neither mu and sigma, of features, nor arr_0, of images")
    arrays = images.read_npz(path, (*PUBLISHED_NAMES, "about"))
    own = _moments_of(arrays, "", what)
    spatial = _moments_of(arrays, "_s", what) if {"mu_s", "sigma_s"} & arrays.keys() else None
    about = {"images": files.full_path(path), **_description(arrays, what), "file": files.full_path(path)}
    about["file_sha256"] = distributed.from_rank0(files.sha256, path)
    features: list[np.ndarray] = []  # they may be large and stay on rank 0, which does the comparison
    if "features" in members:
        distributed.from_rank0(lambda: features.append(_read_features(path, own, what)))
    return FeatureSet(flag, about, features[0] if features else None, None, own, spatial)


def _description(arrays: dict[str, np.ndarray], what: str) -> dict[str, Any]:
    """What statistics say of themselves; {} for published ones. Raises UserError for what `save_reference` does not
    write."""
    if "about" not in arrays:
        return {}
    try:
        about = checked_about(files.parse_json(str(arrays["about"]), what))
        if about.get("count", 1) < 1 or not all(isinstance(about.get(name, ""), str) for name in _TEXTS):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"{what} has a damaged description: write it again with the command evaluate reference"
        ) from None
    return about


def needs_images(path: str) -> bool:
    """Whether an npz of statistics has images and no features, such as those of OpenAI's ADM."""
    names = images.npz_names(path)
    return "arr_0" in names and "features" not in names


def with_statistics(images: FeatureSet, statistics: FeatureSet) -> FeatureSet:
    """The images of an npz with its statistics, which may be of more images and of another network."""
    about = {**images.about, "file": statistics.about["file"], "file_sha256": statistics.about["file_sha256"]}
    about["statistics"] = "those in the file"
    return replace(images, about=about, moments=statistics.moments, spatial_moments=statistics.spatial_moments)


def _read_features(path: str, of_all: Moments, what: str) -> np.ndarray:
    """The features in an npz, float [N, D]. Raises UserError for those that do not belong to the moments."""
    features, width = images.read_npz(path, ("features",))["features"], len(of_all.mu)
    finite = features.dtype.kind == "f" and np.isfinite(features).all()
    if features.ndim != 2 or features.shape[1] != width or not finite:
        raise UserError(f"{what} has features of {features.shape} beside mu of {width}, or not finite: write it again")
    if len(features) < MIN_IMAGES:
        raise UserError(f"{what} has the features of {len(features)} images: at least {MIN_IMAGES} are needed")
    # Of a selection of the images, the mean is off by a few standard errors.
    deviation = np.sqrt(np.diag(of_all.sigma).clip(min=0)) * 10 / np.sqrt(len(features))
    if (np.abs(features.mean(axis=0, dtype=np.float64) - of_all.mu) > deviation + ROUNDING * np.abs(of_all.mu)).any():
        raise UserError(
            f"{what} has features that are not those of its mu: write it again with the command evaluate reference"
        )
    return features


def _moments_of(arrays: dict[str, np.ndarray], suffix: str, what: str) -> Moments:
    names = (f"mu{suffix}", f"sigma{suffix}")
    for name in names:
        if name not in arrays:
            raise UserError(f"{what} has no {name}: statistics are both {names[0]} [D] and {names[1]} [D, D]")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise UserError(f"{what} has a {name} that is not of finite real numbers: use another file")
    mu, sigma = (arrays[name].astype(np.float64) for name in names)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not 1 <= len(mu) <= MAX_WIDTH:
        raise UserError(
            f"{what} has {names[0]} of {mu.shape} and {names[1]} of {sigma.shape}: expected [D] and [D, D], with D up "
            f"to {MAX_WIDTH}"
        )
    largest = np.abs(sigma).max()
    if not 0 < largest < LARGEST**2 or np.abs(mu).max() > LARGEST:
        raise UserError(f"{what} has {names[0]} and {names[1]} of numbers that are out of range, such as {largest:.3g}")
    if np.abs(sigma - sigma.T).max() > ROUNDING * largest or np.linalg.eigvalsh(sigma)[0] < -ROUNDING * largest:
        raise UserError(
            f"{what} has a {names[1]} that is not a covariance: it must be symmetric, without negative eigenvalues"
        )
    return Moments(mu, sigma)


# Whether two sets can be compared


def check_form(ours: tuple[str, dict[str, Any]], theirs: tuple[str, dict[str, Any]], written: bool) -> None:
    """Raise UserError where two sets, each a name and a description, have different sizes or channels.

    :param written: theirs is a file of statistics. What a description lacks is not compared.
    """
    (name, about), (other, their) = ours, theirs
    size, channels = about["image_size"], about["channels"]
    for key, has, remedy in (
        ("image_size", f"images of {size}", f"give --resize {size} to resize and centre-crop both as training does"),
        (
            "channels",
            counted(channels, "channel"),
            "convert one of them, or give --colour True to treat grey images as RGB",
        ),
    ):
        if key in their and about[key] != their[key]:
            remedy += ", and write the reference again with the command evaluate reference" if written else ""
            raise UserError(f"{name} has {has}, {other} {their[key]}: {remedy}")


def check_network(network: dict[str, Any], reference: FeatureSet) -> None:
    """Raise UserError where a reference was made with another network than the one described."""
    about = reference.about
    if about.get("features_sha256", network["features_sha256"]) != network["features_sha256"]:
        raise UserError(
            f"{reference.name} was made with the features {_short(about)}, not {_short(network)}: give the same "
            "--features, or write it again"
        )


def _short(about: dict[str, Any]) -> str:
    return f"{about.get('features')} (SHA-256 {about['features_sha256'][:12]})"


def check_comparable(samples: FeatureSet, reference: FeatureSet) -> list[str]:
    """Warnings about what makes a comparison doubtful. Raises UserError where it would be meaningless."""
    check_form((samples.name, samples.about), (reference.name, reference.about), reference.images is None)
    check_network(samples.about, reference)
    for what in ("moments", "spatial_moments"):
        ours, theirs = getattr(samples, what), getattr(reference, what)
        if ours and theirs and len(ours.mu) != len(theirs.mu):
            kind = "features" if what == "moments" else "spatial features"
            raise UserError(
                f"{reference.name} has {len(theirs.mu)} {kind}, --features {samples.about['features']} gives "
                f"{len(ours.mu)}: give the features that it was made with"
            )
    return _doubts(samples.about, reference.about)


def _doubts(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    doubts = []
    for who, about in (("samples", ours), ("images in the reference", theirs)):
        if about.get("count", FEW) < FEW:
            doubts.append(
                f"only {about['count']:,} {who}: FID depends on their number; compare it only with FIDs of as many"
            )
    if "features_sha256" not in theirs or "statistics" in theirs:
        doubts.append(
            "the statistics of the reference do not say which network, which resizing and how many images made them: "
            "most public ones come from the Inception network's own resizing (--features inception --feature_size "
            "native)"
        )
        return doubts
    if ours.get("prepared") != AS_THEY_ARE and theirs.get("prepared") == AS_THEY_ARE:
        doubts.append(
            "the samples were resized to the size of the reference, and the reference's images were not resized"
        )
    if ours.get("feature_size") != theirs.get("feature_size"):
        doubts.append(
            f"samples were resized to {ours.get('feature_size')} for the features, images of the reference to "
            f"{theirs.get('feature_size')}"
        )
    if ours.get("lossy_files") != theirs.get("lossy_files"):
        which = (
            "the samples are JPEGs and the reference is not"
            if ours.get("lossy_files")
            else "the reference is of JPEGs and the samples are not"
        )
        doubts.append(f"{which}: compression alone changes the scores")
    return doubts
