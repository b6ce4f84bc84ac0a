"""Grids of samples during training."""

from pathlib import Path

import numpy as np
import pytest
import torch as th
import watch_worker
from dist_worker import make_model, step_images
from script_helpers import pixels, run
from watch_worker import IMAGES, Loop, make_diffusion, previewed

from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.training.preview import PreviewGrid
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
                noise_fn=SeededNoise(3, range(IMAGES)),
            )  # fmt: skip
        expected = images.grid(images.to_uint8(samples), min_side=48)
        assert np.abs(grids[name].astype(int) - expected).max() <= 1  # batches of other sizes round differently


def test_classes_are_written_below_the_pictures(tmp_path):
    plain, loop = previewed(Loop(), tmp_path)["samples_raw"], Loop()
    kwargs = {"y": th.arange(4) % 3}
    PreviewGrid(make_diffusion(4), (3, 8, 8), 4, kwargs, str(tmp_path / "new"), 3, ["cat", "dog", "owl", "cat"])(loop)
    named = pixels(tmp_path / "new/previews/step_000005_raw.png")
    np.testing.assert_array_equal(named[:50, :102], plain[:50, :102])
    assert named.shape == (2 * 65 + 2, 102, 3) and (named[50:65] < 128).any()


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


@pytest.mark.parametrize(
    "shares, shown",
    [((0.0, 0.0), "0.9"), ((0.5, 0.001), "0.99"), ((0.5, 0.2), ""), ((1.0, 1.0), "")],
)
def test_the_average_shown_has_forgotten_the_initial_weights_else_the_model_is(tmp_path, shares, shown):
    loop = Loop(shares=shares)
    grids = previewed(loop, tmp_path)
    expected = previewed(Loop(labels=()), tmp_path / "raw")["samples_raw"]
    if shown:
        own = loop.parameter_sets[shown]
        loop.parameter_sets, loop.initial_shares = {"": own}, {}
        expected = previewed(loop, tmp_path / "average")["samples_raw"]
    np.testing.assert_array_equal(grids["samples_ema"], expected)
    text = (tmp_path / "log" / "log.txt").read_text()
    assert (f"step_000005.png (average {shown})" if shown else "step_000005.png (the model's own weights") in text


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
