"""Images between two: which classes they have, and between what they lie."""

import numpy as np
import pytest
from editing_helpers import gaussian_images, gaussian_model
from gaussian_world import GaussianWorld

from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Interpolation
from improved_diffusion.editing.encode import psnr
from improved_diffusion.editing.interpolate import Interpolate
from improved_diffusion.editing.model import EditingModel
from improved_diffusion.sampling.labels import Classes, Labels
from improved_diffusion.sampling.noise import SeededNoise, slerp


def with_classes(**options):
    settings = Interpolation.of({"image_size": 8, "class_cond": True, "frames": 5, **options})
    loaded = LoadedModel("m.pt", settings, frozenset(options), None, None, {})
    return EditingModel(loaded, None, None, Classes(3, ["cat", "dog", "owl"]))


PAIR = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("classes, found, expected", [
    ("dog", None, [1, 1, 1, 1, 1]),
    ("owl,dog", [0, 0], [2, 2, 2, 1, 1]),
    ("", [0, 2], [0, 0, 0, 2, 2]),
])  # fmt: skip
def test_frames_have_the_class_of_the_nearer_end(classes, found, expected):
    labels = Interpolate(with_classes(images="a", classes=classes), PAIR, found).labels
    assert [labels.index(i) for i in range(5)] == expected


def test_frames_between_samples_have_the_classes_of_the_samples():
    labels = Interpolate(with_classes(seeds="3,8", seed=5)).labels
    samples = Labels(3, 5, [], None)
    assert [labels.index(i) for i in range(5)] == [*[samples.index(3)] * 3, *[samples.index(8)] * 2]


def test_more_classes_than_ends_are_refused():
    with pytest.raises(UserError, match="--classes 0,1,0"):
        Interpolate(with_classes(images="a", classes="0,1,0"), PAIR)


@pytest.mark.parametrize("count", [1, 3])
def test_interpolation_takes_two_images(count):
    with pytest.raises(UserError, match=rf"--images a: {count} images"):
        Interpolate(with_classes(images="a", classes="cat"), PAIR[:1].repeat(count, axis=0))


def test_either_images_or_seeds_are_given():
    for model, pair in ((with_classes(), None), (with_classes(seeds="3,7"), PAIR)):
        with pytest.raises(UserError, match=r"--images .* or --seeds"):
            Interpolate(model, pair, [0, 1])


def test_frames_lie_on_the_arc_between_the_noises():
    world, numbers = GaussianWorld(100, 10), (3, 8)
    model = gaussian_model(world, "ddim", kind=Interpolation, seeds="3,8", frames=5, seed=2)
    interpolate = Interpolate(model)
    ends = [SeededNoise(2, [number])(world.start(1)) for number in numbers]
    middle = interpolate.images_from([2], noise=slerp(*ends, 0.5))
    np.testing.assert_array_equal(interpolate.draw([2]), middle)
    np.testing.assert_array_equal(interpolate.draw([4, 2, 0])[1], middle[0])
    for frame, end in ((0, ends[0]), (4, ends[1])):
        np.testing.assert_array_equal(interpolate.draw([frame]), interpolate.images_from([frame], noise=end))


def test_the_ends_are_the_images():
    world, pair = GaussianWorld(1000, 50, grid="karras"), gaussian_images(2)
    frames = Interpolate(gaussian_model(world, "heun", kind=Interpolation, frames=3), pair).draw([0, 1, 2])
    assert psnr(frames[[0, 2]], pair).min() > 45 > 30 > psnr(frames[[1, 1]], pair).max()
