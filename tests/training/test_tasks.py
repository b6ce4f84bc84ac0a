"""What each kind of run trains, and what its options add to the loop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
import watch_worker
from script_helpers import pixels, write_images
from watch_worker import Images, Loop, make_diffusion

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ClassifierTraining, ImageTraining, SuperResTraining
from improved_diffusion.data.low_res import downsample, pairs
from improved_diffusion.logs import logger
from improved_diffusion.models.factories import create_gaussian_diffusion
from improved_diffusion.training.classifier import ClassifierObjective, ClassifierValidation
from improved_diffusion.training.kinds import task_of
from improved_diffusion.training.preview import PREVIEWS
from improved_diffusion.training.validation import Validation
from improved_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel
from improved_diffusion.utils import images

TINY = dict(num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", attention_resolutions="4")
SIZES = dict(large_size=8, small_size=4)


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(str(tmp_path / "log"), format_strs=["log"])


def image_task(**options):
    return task_of(ImageTraining.of({"image_size": 8, "seed": 3, **options}))


def super_res_task(**options):
    return task_of(SuperResTraining.of({**SIZES, **options}))


def stream_of(dataset, usable=None, class_names=None, seen_classes=(0, 1, 2)):
    """A BatchStream, as far as the tasks look at it."""
    usable = np.arange(len(dataset)) if usable is None else np.array(usable)
    inner = SimpleNamespace(dataset=dataset, usable=usable)
    return SimpleNamespace(stream=inner, class_names=class_names, seen_classes=list(seen_classes))


# What is trained


@pytest.mark.parametrize(
    ("settings", "network", "needs_classes"),
    [
        (ImageTraining.of({"image_size": 8, **TINY}), UNetModel, False),
        (ImageTraining.of({"image_size": 8, "class_cond": True, **TINY}), UNetModel, True),
        (SuperResTraining.of({**SIZES, **TINY}), SuperResModel, False),
        (ClassifierTraining.of({"image_size": 8, "num_classes": 3, "classifier_width": 32}), EncoderUNetModel, True),
    ],
)
def test_the_kind_of_settings_decides_the_network(settings, network, needs_classes):
    task = task_of(settings)
    model, objective = task.build()
    assert type(model) is network and task.needs_classes is needs_classes
    assert isinstance(objective, ClassifierObjective) == (network is EncoderUNetModel)
    assert objective.num_timesteps == 1000


# --sample_interval


def test_without_sample_interval_there_are_no_grids():
    assert image_task().hooks(make_diffusion(), stream_of([])) == []


@pytest.mark.parametrize(("steps", "drawn"), [(30, 25), (10, 10)])
def test_few_steps_and_the_classes_in_turn(steps, drawn):
    task = image_task(image_size="8x4", class_cond=True, num_classes=3, sample_interval=5)
    [(interval, grid)] = task.hooks(make_diffusion(steps), stream_of([]))
    assert interval == 5 and grid.shape == (3, 8, 4) and grid.count == PREVIEWS and grid.seed == 3
    assert grid.model_kwargs["y"].tolist() == [i % 3 for i in range(PREVIEWS)]
    assert grid.diffusion.num_timesteps == drawn


@pytest.mark.parametrize("class_cond", [False, True])
def test_super_resolution_starts_from_readable_training_images(class_cond):
    training = watch_worker.Images(6)
    dataset = training if class_cond else [(image, {}) for image, _ in training]
    data = stream_of(dataset, usable=[0, 2, 3, 4, 5])  # 1: unreadable
    task = super_res_task(class_cond=class_cond, num_classes=3, sample_interval=5)
    [(_, grid)] = task.hooks(make_diffusion(), data)
    first = th.from_numpy(np.stack([training[i][0] for i in data.stream.usable]))
    assert grid.count == 5 and th.equal(grid.model_kwargs["low_res"], downsample(first, 4))
    assert grid.model_kwargs.keys() == ({"low_res", "y"} if class_cond else {"low_res"})
    if class_cond:
        assert grid.model_kwargs["y"].tolist() == [0, 2, 0, 1, 2]


def test_super_resolution_shows_the_small_image_beside_the_sample(tmp_path):
    class Enlarges(th.nn.Module):
        """Takes low_res for the noise-free image."""

        def forward(self, x, t, low_res):
            x0 = th.nn.functional.interpolate(low_res, size=8, mode="nearest")
            return th.cat([x0, th.zeros_like(x0)], dim=1)

    low_res = th.rand(4, 3, 4, 4) * 2 - 1
    diffusion = create_gaussian_diffusion(steps=30, learn_sigma=True, noise_schedule="cosine", predict_xstart=True)
    [(_, grid)] = super_res_task(sample_interval=5).hooks(diffusion, stream_of([(x.numpy(), {}) for x in low_res]))
    grid.out_dir = str(tmp_path)
    grid(Loop(model=Enlarges(), labels=()))
    small = images.to_uint8(low_res)
    both = pairs(small, small.repeat(2, axis=1).repeat(2, axis=2))
    shown = pixels(tmp_path / "previews/step_000005_raw.png").astype(int)
    assert np.abs(shown - images.grid(both, columns=4, min_side=48)).max() <= 1


# --val_dir


def validating(folder, **options):
    """A class-conditional image task with held-out images."""
    return image_task(
        **{
            "class_cond": True,
            "data_dir": "train",
            "val_dir": str(folder),
            "val_interval": 7,
            "batch_size": 6,
            **options,
        }
    )


def test_without_val_dir_there_is_no_validation():
    assert validating("").hooks(make_diffusion(), stream_of([])) == []


def test_classes_have_the_training_images_numbers(tmp_path):
    folder = write_images(tmp_path / "val", 4, classes=("cat", "dog"))
    data = stream_of([], class_names=["ant", "cat", "cow", "dog"])
    [(interval, hook)] = validating(folder).hooks(make_diffusion(), data)
    assert type(hook) is Validation and interval == 7 and hook.batch_size == 6 and hook.small_size is None
    assert [int(hook.dataset[i][1]["y"]) for i in range(4)] == [1, 1, 3, 3]  # the files' order is by name
    assert hook.dataset[0][0].shape == (3, 8, 8)


def test_a_super_resolution_run_validates_on_its_large_size(tmp_path):
    folder = write_images(tmp_path / "val", 2)
    sizes = dict(large_size="16x8", small_size="8x4", microbatch=2)
    [(_, hook)] = super_res_task(**sizes, val_dir=str(folder)).hooks(make_diffusion(), stream_of([]))
    assert hook.batch_size == 2 and hook.small_size == "8x4"
    array, kwargs = hook.dataset[0]
    assert array.shape == (3, 16, 8) and kwargs == {}


def test_a_classifier_validates_its_accuracy(tmp_path):
    folder = write_images(tmp_path / "val", 4, classes=("cat", "dog"))
    task = task_of(ClassifierTraining.of({"image_size": 8, "val_dir": str(folder), "num_classes": 2}))
    objective = ClassifierObjective(make_diffusion())
    [(_, hook)] = task.hooks(objective, stream_of([], class_names=["cat", "dog"]))
    assert type(hook) is ClassifierValidation and [int(hook.dataset[i][1]["y"]) for i in range(4)] == [0, 0, 1, 1]


def test_what_cannot_be_validated_on_is_refused_before_training(tmp_path):
    folder = write_images(tmp_path / "val", 4, classes=("cat", "dog"))

    def hooks(path, names):
        return validating(path).hooks(make_diffusion(), stream_of([], class_names=names))

    with pytest.raises(UserError, match=r"--val_dir .*val has the class dog, .*train.* ant, cat\)"):
        hooks(folder, ["ant", "cat"])
    with pytest.raises(UserError, match=r"--val_dir .*nowhere"):
        hooks(tmp_path / "nowhere", ["cat"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--val_dir .*empty"):
        hooks(tmp_path / "empty", ["cat"])
    with pytest.raises(UserError, match="--val_images 0 of 2 images"):
        Validation(make_diffusion(), Images(2), num_images=0, batch_size=1)
    broken = folder / "dog_03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"dog_03.png"):
        hooks(folder, ["cat", "dog"])
