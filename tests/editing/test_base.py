"""What the editing commands share: labels of images, and images that do not fit."""

import numpy as np
import pytest

from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Encoding
from improved_diffusion.editing.base import ImageEdit, read_given
from improved_diffusion.editing.model import EditingModel
from improved_diffusion.sampling.labels import Classes


def model_with_classes(names, num=None, kind=Encoding, **options):
    """A model that knows its options and classes, and cannot draw."""
    settings = kind.of({"image_size": 8, "class_cond": True, **options})
    loaded = LoadedModel("m.pt", settings, frozenset(options), None, None, {})
    return EditingModel(loaded, None, None, Classes(num or len(names), names))


def test_labels_are_the_wanted_ones_else_those_of_the_images():
    images, model = np.zeros((3, 8, 8, 3), np.uint8), model_with_classes(["cat", "dog"], images="a")
    assert [ImageEdit(model, images, [0, 1, 1]).labels.index(i) for i in range(4)] == [0, 1, 1, 0]
    wanted = model_with_classes(["cat", "dog"], images="a", classes="dog")
    assert [ImageEdit(wanted, images, [0, 0, 0]).labels.index(i) for i in range(3)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"--images a has no classes among cat, dog, which m\.pt needs.*--classes"):
        ImageEdit(model, images)
    with pytest.raises(UserError, match=r"--images a has the label 2, but the model has the classes 0\.\.1"):
        ImageEdit(model, images, [0, 2, 0])


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 8, 9, 3), np.uint8), ((2, 8, 8, 3), np.float32), ((0, 8, 8, 3), np.uint8), ((8, 8, 3), np.uint8)],
)
def test_images_that_do_not_fit_the_model_are_refused(shape, dtype):
    with pytest.raises(UserError, match=r"m\.pt takes uint8 \[N, 8, 8, 3\]"):
        ImageEdit(model_with_classes(["cat", "dog"], classes="cat"), np.zeros(shape, dtype))


def test_output_among_the_images_is_refused(tmp_path):
    model = model_with_classes(["cat"], images=str(tmp_path), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="--out_dir"):
        read_given(model)
