"""Draw images guided by a classifier, by default as guided-diffusion does."""

from dataclasses import replace

from ..config.settings import ClassifierSampling
from .image_sample import COMMAND as IMAGE_SAMPLE

COMMAND = replace(
    IMAGE_SAMPLE,
    summary="Draw images guided by a classifier, by default as guided-diffusion does: an npz, PNGs and a grid.",
    settings=ClassifierSampling,
    first=("classifier_path", "classifier_scale", "classifier_guidance", *IMAGE_SAMPLE.first),
)
