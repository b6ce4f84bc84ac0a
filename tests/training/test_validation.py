"""What is measured on held-out images, and which model is the best so far."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
import watch_worker
from script_helpers import TINY_IMAGE, call, run, write_images
from watch_worker import IMAGES, Images, Loop, make_diffusion, validated

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.data.dataset import selection
from improved_diffusion.data.low_res import downsample
from improved_diffusion.logs import logger
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.training import validation
from improved_diffusion.training.validation import SEED, Validation

KEYS = {
    f"val_{what}{ema}{se}"
    for ema in ("", "_ema_0.9", "_ema_0.99")
    for what, se in (("loss", ""), ("bpd", ""), ("bpd", "_se"))
}


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(str(tmp_path / "log"), format_strs=["log"])


def log_of(tmp_path):
    return (tmp_path / "log" / "log.txt").read_text()


def test_the_model_and_each_average_are_measured(tmp_path):
    result = validated(Loop())
    assert result.keys() == KEYS
    assert len(set(result.values())) == len(KEYS)
    assert log_of(tmp_path).splitlines()[-1] == (
        "validation after 5 steps: loss {:.4g} (EMA 0.9: {:.4g}, EMA 0.99: {:.4g}), "
        "bits/dim {:.3f} +- {:.3f} (EMA 0.9: {:.3f} +- {:.3f}, EMA 0.99: {:.3f} +- {:.3f})"
    ).format(
        *(result[f"val_loss{ema}"] for ema in ("", "_ema_0.9", "_ema_0.99")),
        *(result[f"val_bpd{ema}{se}"] for ema in ("", "_ema_0.9", "_ema_0.99") for se in ("", "_se")),
    )


def test_the_numbers_are_the_same_at_every_evaluation_and_in_every_run():
    first = validated(Loop())
    th.manual_seed(1)
    np.random.seed(1)
    assert validated(Loop()) == first


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_the_rounding_at_most(batch_size):
    expected = validated(Loop(), batch_size=2)
    assert validated(Loop(), batch_size=batch_size) == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_that_of_training_at_the_images_own_timesteps_and_noise():
    loop, images, diffusion = Loop(), Images(IMAGES), make_diffusion()
    hook = Validation(diffusion, images, num_images=IMAGES, batch_size=4)
    hook(loop)
    losses = []
    for i, (array, kwargs) in enumerate(images):
        x = th.from_numpy(array)[None]
        y = th.from_numpy(kwargs["y"][None])
        with th.no_grad():
            out = diffusion.training_losses(
                loop.model.eval(), x, th.tensor([hook.loss_t[i]]), {"y": y}, SeededNoise(SEED, [i])(x)
            )
        losses.append(float(out["loss"]))
    assert logger.getkvs()["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("n", [1, 7, 20, 45])
def test_each_nth_of_the_timesteps_has_its_image(n):
    hook = Validation(make_diffusion(20), Images(50), num_images=n, batch_size=8)
    t = np.sort(hook.loss_t)
    assert ((t >= np.floor(np.arange(n) * 20 / n)) & (t < np.ceil((np.arange(n) + 1) * 20 / n))).all()
    assert n < 20 or set(t) == set(range(20))
    assert n < 7 or list(hook.loss_t) != sorted(hook.loss_t)


def test_a_fixed_selection_is_evaluated_and_all_where_there_are_no_more(tmp_path):
    def selected(count):
        return list(Validation(make_diffusion(), Images(9), num_images=count, batch_size=4).selected)

    assert selected(4) == selection(9, 4).tolist()
    assert selected(9) == list(range(9))
    assert "validation uses" not in log_of(tmp_path)
    assert selected(512) == list(range(9))
    assert log_of(tmp_path).count("--val_images 512: validation uses all 9 images") == 1


@pytest.mark.parametrize("order", ["class by class", "the classes in turn"])
def test_every_class_of_an_ordered_folder_is_validated_on(order):
    classes = np.repeat(np.arange(4), 64) if order == "class by class" else np.tile(np.arange(4), 64)
    selected = Validation(make_diffusion(), Images(256), num_images=64, batch_size=4).selected
    assert np.bincount(classes[selected], minlength=4).min() >= 8


def test_the_bound_agrees_with_its_evaluation_at_every_timestep(monkeypatch):
    loop, images, diffusion, n = Loop(labels=()), Images(48), make_diffusion(60), 48
    batch = th.from_numpy(np.stack([array for array, _ in images]))
    kwargs = {"y": th.arange(n) % 3}
    loop.model.eval()
    whole = [diffusion.calc_bpd_loop(loop.model, batch, model_kwargs=kwargs)["total_bpd"].mean() for _ in range(4)]
    errors = []
    for seed in range(10):
        monkeypatch.setattr(validation, "SEED", 1000 * seed)
        Validation(diffusion, images, num_images=n, batch_size=n)(loop)
        row = logger.getkvs()
        errors.append((row["val_bpd"] - np.mean(whole)) / row["val_bpd_se"])
    assert np.abs(errors).max() < 3
    assert abs(np.mean(errors)) < 3 / math.sqrt(len(errors))
    # The images stay the same here, so that the errors are those of timesteps and noise alone.
    assert np.std(errors, ddof=1) < 1.5


def test_the_standard_error_is_honest_over_sets_of_images(monkeypatch):
    loop = Loop(labels=())
    estimates, reported = [], []
    for seed in range(24):
        monkeypatch.setattr(validation, "SEED", 1000 * seed)
        result = validated(loop, count=16, batch_size=16, images=Images(16, seed))
        estimates.append(result["val_bpd"])
        reported.append(result["val_bpd_se"])
    # The spread of 24 estimates is known to 15%.
    assert 0.6 < np.std(estimates, ddof=1) / np.mean(reported) < 1.5


def test_with_as_few_timesteps_as_evaluations_the_bound_is_exact():
    loop, images, diffusion = Loop(labels=()), Images(3), make_diffusion(5)
    Validation(diffusion, images, num_images=3, batch_size=3)(loop)
    draw = SeededNoise(SEED, range(3))
    batch = th.from_numpy(np.stack([array for array, _ in images]))
    draw(batch)  # the loss's
    rising = th.arange(5).expand(3, 5)
    bound = diffusion.calc_bpd_loop(
        loop.model.eval(), batch, model_kwargs={"y": th.arange(3)}, noise_fn=draw, timesteps=rising
    )
    assert logger.getkvs()["val_bpd"] == pytest.approx(bound["total_bpd"].mean().item(), rel=1e-6)


def test_of_one_image_there_is_no_standard_error(tmp_path):
    assert validated(Loop(labels=()), count=1).keys() == {"val_loss", "val_bpd"}
    assert "+-" not in log_of(tmp_path)


def test_the_model_trains_on_as_if_nothing_had_happened():
    loop = Loop()
    loop.model.train()
    before = [p.clone() for p in loop.model.parameters()]
    state = th.get_rng_state(), np.random.get_state()[1].copy()
    validated(loop)
    assert loop.model.training
    assert all(th.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    assert th.equal(th.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert all(p.grad is None for p in loop.model.parameters())


def test_super_resolution_models_get_low_res_as_in_training():
    seen = []

    class Model(th.nn.Module):
        def forward(self, x, t, low_res, y):
            seen.append(low_res)
            return th.zeros(len(x), 6, 8, 8)

    images = Images(2)
    validated(Loop(labels=(), model=Model()), count=2, images=images, small_size=4)
    expected = downsample(th.from_numpy(np.stack([array for array, _ in images])), 4)
    assert len(seen) == 9 and all(th.equal(low_res, expected) for low_res in seen)


def test_two_ranks_measure_what_one_does(tmp_path):
    run("torchrun", 2, Path(watch_worker.__file__), tmp_path, cwd=tmp_path).succeed()
    alone, one = validated(Loop()), validated(Loop(), count=1)
    for rank in (0, 1):
        result = th.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert result["all"] == pytest.approx(alone, rel=1e-5)
        assert {key: result["one"][key] for key in one} == pytest.approx(one, rel=1e-5)
        assert result["best"]["best"]["step"] == 5


# The best


def scored(hook, loop, step, **losses):
    """Let the hook see the given losses, those of the model and of the averages "0.9" and "0.99", after a step."""
    hook._keep_best(loop, step, dict(zip(("", "0.9", "0.99"), losses["of"], strict=False)))
    return loop.written.pop() if loop.written else None


@pytest.fixture
def hook():
    return Validation(make_diffusion(), Images(2), num_images=2, batch_size=2)


def test_the_average_of_least_loss_is_kept_and_a_worse_one_leaves_it(hook):
    loop = Loop()
    name, params, metadata = scored(hook, loop, 10, of=(0.1, 0.3, 0.2))
    assert name == "best.pt" and params is loop.parameter_sets["0.99"]
    assert metadata == {"best": {"val_loss": 0.2, "step": 10, "ema": "0.99"}}
    assert scored(hook, loop, 20, of=(0.05, 0.2, 0.25)) is None
    _, params, metadata = scored(hook, loop, 30, of=(0.5, 0.19, math.nan))
    assert params is loop.parameter_sets["0.9"]
    assert metadata == {"best": {"val_loss": 0.19, "step": 30, "ema": "0.9"}}


def test_without_averages_the_model_itself_is_kept(hook):
    loop = Loop(labels=())
    _, params, metadata = scored(hook, loop, 10, of=(0.4,))
    assert params is loop.parameter_sets[""] and metadata["best"]["ema"] == ""


def test_a_loss_that_is_not_a_number_is_never_the_best(hook):
    loop = Loop()
    assert scored(hook, loop, 10, of=(0.1, math.nan, math.inf)) is None
    assert scored(hook, loop, 20, of=(0.1, math.nan, 7.0))[2]["best"]["val_loss"] == 7.0


def test_the_best_survives_a_resume(hook, tmp_path):
    loop = Loop()
    scored(hook, loop, 10, of=(0.1, 0.3, 0.2))
    state = json.loads(json.dumps(hook.state_dict()))
    after = Validation(make_diffusion(), Images(2), num_images=2, batch_size=2)
    after.load_state_dict(state)
    assert scored(after, loop, 20, of=(0.1, 0.21, 0.22)) is None
    assert scored(after, loop, 30, of=(0.1, 0.19, 0.22)) is not None


def test_the_best_on_other_images_does_not_count(hook, tmp_path):
    loop = Loop()
    scored(hook, loop, 10, of=(0.1, 0.3, 0.2))
    other = Validation(make_diffusion(), Images(3), num_images=3, batch_size=2)
    other.load_state_dict(hook.state_dict())
    assert scored(other, loop, 20, of=(0.1, 0.9, 0.8))[2]["best"]["val_loss"] == 0.8
    assert "validation on other images than before: best.pt starts afresh" in log_of(tmp_path)


def test_a_run_that_was_interrupted_finds_the_same_best(tmp_path):
    """And the best is a checkpoint like any other: images can be drawn from it."""
    train, held_out = write_images(tmp_path / "train", 8, size=(8, 8)), write_images(tmp_path / "val", 4, seed=1)
    args = ["--data_dir", train, "--class_cond", "True", "--batch_size", 4, "--lr", 1e-3, "--ema_rate", 0.5,
            "--val_dir", held_out, "--val_interval", 2, "--save_interval", 2, "--log_interval", 1]  # fmt: skip

    def trained(steps, folder):
        result = call("image_train", *TINY_IMAGE, *args, "--max_steps", steps, "--out_dir", folder, "--resume", "auto",
                      cwd=tmp_path).succeed()  # fmt: skip
        return re.findall("validation after .*", result.out)

    whole = trained(7, tmp_path / "whole")
    assert len(whole) == 3
    parts = [trained(3, tmp_path / "parts"), trained(7, tmp_path / "parts")]
    assert parts[0] == whole[:1] and parts[1] == whole[1:]
    best = [checkpoint.load(str(tmp_path / name / "best.pt")) for name in ("whole", "parts")]
    assert best[0][1]["best"] == best[1][1]["best"] and best[0][1]["best"]["ema"] == "0.5"
    assert all(th.equal(value, best[1][0][name]) for name, value in best[0][0].items())
    call("image_sample", "--model_path", tmp_path / "whole/best.pt", "--num_samples", 2, "--out_dir", tmp_path / "new",
         cwd=tmp_path).succeed()  # fmt: skip
