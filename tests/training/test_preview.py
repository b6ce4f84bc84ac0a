"""Grids of samples during training."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
import watch_worker
from dist_worker import make_model, step_images
from script_helpers import pixels, run
from watch_worker import IMAGES, Loop, make_diffusion, previewed

from improved_diffusion.config import UserError
from improved_diffusion.data.low_res import downsample, pairs
from improved_diffusion.logs import logger
from improved_diffusion.models.factories import create_gaussian_diffusion
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.training.preview import PREVIEWS, PreviewGrid, build_previews
from improved_diffusion.utils import files, images


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(str(tmp_path / "log"), format_strs=["log"])


def test_a_grid_of_the_model_and_one_of_its_first_average(tmp_path):
    loop = Loop()
    grids = previewed(loop, tmp_path)
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {"step_000005.png", "step_000005_raw.png"}
    assert grids.keys() == {"samples_raw", "samples_ema"}
    np.testing.assert_array_equal(pixels(tmp_path / "previews/step_000005_raw.png"), grids["samples_raw"])
    np.testing.assert_array_equal(pixels(tmp_path / "previews/step_000005.png"), grids["samples_ema"])
    for name, params in (("samples_raw", loop.parameter_sets[""]), ("samples_ema", loop.parameter_sets["0.9"])):
        with loop.using(params):
            samples = make_diffusion(4).ddim_sample_loop(
                loop.model, (IMAGES, 3, 8, 8), model_kwargs={"y": th.arange(IMAGES) % 3},
                noise_fn=SeededNoise(range(3, 3 + IMAGES)),
            )  # fmt: skip
        expected = images.grid(images.to_uint8(samples), min_side=48)
        assert np.abs(grids[name].astype(int) - expected).max() <= 1  # batches of other sizes round differently


def test_the_grid_is_the_same_every_time_and_in_every_batch(tmp_path):
    first = previewed(Loop(), tmp_path)
    th.manual_seed(1)
    for microbatch in (4, 1, 100):
        again = previewed(Loop(microbatch), tmp_path)
        for name in first:
            difference = np.abs(first[name].astype(int) - again[name])
            assert difference.max() <= (microbatch != 4)


def test_without_averages_there_is_the_models_grid_alone(tmp_path):
    assert previewed(Loop(labels=()), tmp_path).keys() == {"samples_raw"}
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["step_000005_raw.png"]


def test_two_ranks_draw_what_one_does(tmp_path):
    run("torchrun", 2, Path(watch_worker.__file__), tmp_path, cwd=tmp_path).succeed()
    alone = previewed(Loop(), tmp_path / "alone")
    grids = [th.load(tmp_path / f"rank{rank}.pt", weights_only=False)["grids"] for rank in (0, 1)]
    assert grids[1] == {} and grids[0].keys() == alone.keys()
    for name in alone:
        assert np.abs(grids[0][name].astype(int) - alone[name]).max() <= 1


def test_a_full_disk_is_a_warning_and_not_the_end(tmp_path, monkeypatch):
    def full(path, data):
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    assert previewed(Loop(), tmp_path).keys() == {"samples_raw", "samples_ema"}
    text = (tmp_path / "log" / "log.txt").read_text()
    assert text.count("no preview after 5 steps: cannot write") == 2
    assert text.count("No space left on device") == 2


def trained(folder, hooks):
    """The model's and the average's parameters after six steps."""
    logger.configure(str(folder), format_strs=[])
    th.manual_seed(0)  # once, and not at each step: a hook that drew from these generators would be seen
    np.random.seed(0)
    loop = TrainLoop(
        model=make_model(), diffusion=make_diffusion(), data=((x, {"y": y}) for x, y in map(step_images, range(6))),
        batch_size=4, microbatch=-1, lr=1e-3, ema_rate="0.9", log_interval=6, save_interval=100, resume_checkpoint="",
        max_steps=6, hooks=hooks,
    )  # fmt: skip
    loop.run_loop()
    return [*loop.model.parameters(), *loop.emas[0].params]


def test_training_goes_on_as_if_there_were_no_grids(tmp_path):
    grid = PreviewGrid(make_diffusion(4), (3, 8, 8), 5, {"y": th.arange(5) % 3}, str(tmp_path), seed=0)
    without = trained(tmp_path / "without", [])
    assert all(th.equal(a, b) for a, b in zip(without, trained(tmp_path / "with", [(2, grid)])))
    assert len(list((tmp_path / "previews").iterdir())) == 6


# --sample_interval


def options_for(**changes):
    defaults = dict(sample_interval=5, seed=3, channels=3, class_cond=False, num_classes=0)
    return SimpleNamespace(**{**defaults, **changes})


def test_without_sample_interval_there_are_no_grids():
    assert build_previews(options_for(sample_interval=0), make_diffusion(), None) == []


@pytest.mark.parametrize(("steps", "drawn"), [(30, 25), (10, 10)])
def test_few_steps_and_the_classes_in_turn(steps, drawn):
    options = options_for(image_size=(8, 4), class_cond=True, num_classes=3)
    [(interval, grid)] = build_previews(options, make_diffusion(steps), None)
    assert interval == 5 and grid.shape == (3, 8, 4) and grid.count == PREVIEWS and grid.seed == 3
    assert grid.model_kwargs["y"].tolist() == [i % 3 for i in range(PREVIEWS)]
    assert grid.diffusion.num_timesteps == drawn


@pytest.mark.parametrize("class_cond", [False, True])
def test_super_resolution_starts_from_the_first_training_images(class_cond, tmp_path):
    training = watch_worker.Images(6)
    dataset = training if class_cond else [(image, {}) for image, _ in training]
    data = SimpleNamespace(stream=SimpleNamespace(dataset=dataset, usable=np.array([0, 2, 3, 4, 5])))  # 1: unreadable
    options = options_for(large_size=8, small_size=4, class_cond=class_cond, num_classes=3)
    [(_, grid)] = build_previews(options, make_diffusion(), data)
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
    [(_, grid)] = build_previews(
        options_for(large_size=8, small_size=4),
        create_gaussian_diffusion(steps=30, learn_sigma=True, noise_schedule="cosine", predict_xstart=True),
        SimpleNamespace(stream=SimpleNamespace(dataset=[(x.numpy(), {}) for x in low_res], usable=np.arange(4))),
    )
    grid.out_dir = str(tmp_path)
    grid(Loop(model=Enlarges(), labels=()))
    small = images.to_uint8(low_res)
    both = pairs(small, small.repeat(2, axis=1).repeat(2, axis=2))
    shown = pixels(tmp_path / "previews/step_000005_raw.png").astype(int)
    assert np.abs(shown - images.grid(both, columns=4, min_side=48)).max() <= 1
