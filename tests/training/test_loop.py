"""The training loop: golden numbers, what must change nothing, resuming, and how a run ends."""

import functools
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import golden, make_diffusion, set_golden_weights
from torch.utils._python_dispatch import TorchDispatchMode
from train_helpers import (
    PRECISIONS,
    STEADY,
    Data,
    SmallModel,
    assert_same,
    assert_sets_equal,
    finished,
    into,
    load,
    log_rows,
    make_loop,
    parameters,
    parameters_of,
    small_diffusion,
    small_model,
    small_unet,
)

from improved_diffusion import distributed
from improved_diffusion.checkpoints import checkpoint, sets
from improved_diffusion.checkpoints.sets import complete_sets
from improved_diffusion.config import UserError
from improved_diffusion.config.published import model_and_diffusion_defaults
from improved_diffusion.logs import logger
from improved_diffusion.models.factories import create_model_and_diffusion
from improved_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler
from improved_diffusion.training import checkpointer
from improved_diffusion.training.loop import (
    TrainLoop,
    find_ema_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from improved_diffusion.training.metrics import LossMeter
from improved_diffusion.training.signals import SIGNALS, Stopped

pytestmark = pytest.mark.usefixtures("out_dir")

# Golden numbers


class GoldenTrainer:
    """The recipe of golden/README.md."""

    def __init__(self):
        rng = np.random.RandomState(5)
        self.batches = [rng.uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32) for _ in range(6)]
        for _ in range(6):
            rng.randint(0, 1000, 4)
        self.timesteps = [rng.randint(0, 100, 4) for _ in range(6)]
        self.noises = [th.from_numpy(rng.standard_normal((4, 3, 32, 32)).astype(np.float32)) for _ in range(6)]
        flags = dict(
            image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, diffusion_steps=100,
            noise_schedule="cosine",
        )  # fmt: skip
        self.model, self.diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})
        set_golden_weights(self.model, 5)
        self.times = iter(self.timesteps)

    def sample(self, batch_size, device):
        """As a schedule sampler: any object with this method serves."""
        return th.from_numpy(next(self.times)), th.ones(batch_size)

    def run(self, **kwargs):
        TrainLoop(
            model=self.model, diffusion=self.diffusion, data=((th.from_numpy(b), {}) for b in self.batches),
            batch_size=4, lr=2e-3, ema_rate="0.5,0.9", log_interval=10, save_interval=10000, resume_checkpoint="",
            schedule_sampler=self, weight_decay=0.05, lr_anneal_steps=6, **{"microbatch": -1, **kwargs},
        ).run_loop()  # fmt: skip

    def without_gradient(self):
        """The parameters on which the loss does not depend, so that rounding alone moves them: biases of channels which
        a norm of one channel a group takes out again."""
        return {name for name, p in self.model.named_parameters() if p.grad.abs().max() < 1e-7}


def assert_golden_run(trainer, folder):
    expected = golden("trainer")
    free = trainer.without_gradient()
    assert len(free) == 5 and all(name.endswith(".bias") for name in free)
    for prefix, name in (
        ("model", "model000006.pt"), ("ema_0.5_", "ema_0.5_000006.pt"), ("ema_0.9_", "ema_0.9_000006.pt"),
    ):  # fmt: skip
        state_dict = load(folder / name)
        assert {f"{prefix}/{key}" for key in state_dict} == {key for key in expected if key.startswith(prefix + "/")}
        for key, value in state_dict.items():
            flat, want = value.double().flatten().numpy(), expected[f"{prefix}/{key}"]
            if key in free:  # within what six steps may move it, this way and that
                np.testing.assert_allclose(flat[:4], want[2:], rtol=0, atol=2 * 2e-3 * 3.5)
                continue
            np.testing.assert_allclose(flat[:4], want[2:], rtol=1e-4, atol=1e-4, err_msg=key)
            if not key.endswith("qkv.bias"):  # the softmax takes the keys' third of it out again
                np.testing.assert_allclose((flat**2).sum(), want[1], rtol=1e-4, atol=1e-4, err_msg=key)
                # The rounding of near-zero gradients adds up, independently, over so many values.
                np.testing.assert_allclose(flat.sum(), want[0], rtol=1e-4, atol=1e-4 + 1e-5 * len(flat) ** 0.5)
    assert load(folder / "opt000006.pt")["param_groups"][0]["lr"] == pytest.approx(expected["opt/lr"].item(), rel=1e-12)


@pytest.mark.parametrize("injection", ["training_losses", "randn_like"])
def test_six_steps_are_the_published_ones(out_dir, monkeypatch, injection):
    trainer = GoldenTrainer()
    noises = iter(trainer.noises)
    if injection == "randn_like":
        monkeypatch.setattr(th, "randn_like", lambda x: next(noises))
    else:
        compute = trainer.diffusion.training_losses

        def with_noise(model, x_start, t, model_kwargs=None, noise=None):
            return compute(model, x_start, t, model_kwargs=model_kwargs, noise=next(noises))

        monkeypatch.setattr(trainer.diffusion, "training_losses", with_noise)
    trainer.run()
    assert_golden_run(trainer, out_dir)


def test_six_steps_in_microbatches_are_the_published_ones(out_dir, monkeypatch):
    trainer = GoldenTrainer()
    noises = iter(trainer.noises)
    monkeypatch.setattr(th, "randn_like", lambda x: next(noises))
    trainer.run(microbatch=3)
    assert_golden_run(trainer, out_dir)


# What must change nothing


@pytest.mark.parametrize("sampler", [False, True], ids=["uniform", "loss-second-moment"])
@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_microbatches_change_memory_and_nothing_else(microbatch, sampler):
    diffusion = small_diffusion(4)

    def run(microbatch):
        kwargs = {"schedule_sampler": LossSecondMomentResampler(diffusion, 2, 0.01)} if sampler else {}
        return finished(microbatch=microbatch, diffusion=diffusion, max_steps=6, lr=1e-3, **STEADY, **kwargs)

    whole, split = run(-1), run(microbatch)
    assert (parameters(whole.model) - parameters(split.model)).abs().max() < 1e-4
    assert (whole.ema_params[0][0] - split.ema_params[0][0]).abs().max() < 1e-4
    if sampler:
        assert whole.schedule_sampler._warmed_up()
        np.testing.assert_allclose(whole.schedule_sampler.weights(), split.schedule_sampler.weights(), rtol=1e-3)


def test_microbatches_give_the_gradient_of_the_batchs_mean():
    gradients = []
    for microbatch in (-1, 1, 2, 3):
        loop = make_loop(microbatch=microbatch)
        th.manual_seed(3)
        np.random.seed(3)
        loop.forward_backward(*next(loop.data))
        gradients.append(th.cat([p.grad.flatten() for p in loop.model.parameters()]))
    for other in gradients[1:]:
        th.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_importance_weights_multiply_the_losses(microbatch):
    class Fixed:
        def __init__(self, weight):
            self.weight = weight

        def sample(self, batch_size, device):
            return th.full((batch_size,), 7), th.full((batch_size,), self.weight)

    norms, losses = [], []
    for weight in (1.0, 2.0):
        loop = make_loop(schedule_sampler=Fixed(weight), microbatch=microbatch)
        th.manual_seed(0)
        loop.forward_backward(*next(loop.data))
        norms.append(th.cat([p.grad.flatten() for p in loop.model.parameters()]).norm().item())
        losses.append(loop.run_log.meter.read()["loss"])
    assert norms[1] / norms[0] == pytest.approx(2, rel=1e-4)
    assert losses[1] / losses[0] == pytest.approx(2, rel=1e-6)  # the log shows what is minimised


def test_a_run_is_a_function_of_its_seed():
    runs = [parameters(finished(seed=seed, model=small_model(dropout=0.2)).model) for seed in (0, 0, 1)]
    assert th.equal(runs[0], runs[1]) and not th.equal(runs[0], runs[2])


def test_without_a_seed_the_global_generators_are_left_alone():
    results = []
    for _ in range(2):
        th.manual_seed(9)
        np.random.seed(9)
        results.append(parameters(finished(seed=None).model))
    results.append(parameters(finished(seed=None).model))
    assert th.equal(results[0], results[1]) and not th.equal(results[0], results[2])


def test_the_interval_of_the_log_changes_nothing():
    runs = [parameters(finished(log_interval=interval).model) for interval in (1, 100)]
    assert th.equal(*runs)


def test_any_module_can_be_trained(out_dir):
    class Timeless(th.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    finished(model=Timeless(3, 3, 1), diffusion=make_diffusion(10), max_steps=2, ema_rate="")
    assert sorted(os.listdir(out_dir)) == [
        "manifest000000.json", "manifest000002.json", "model000000.pt", "model000002.pt", "opt000000.pt",
        "opt000002.pt", "progress.csv",
    ]  # fmt: skip


def test_a_small_task_is_learned(out_dir):
    """Images that are all one constant."""

    class Constant:
        def __next__(self):
            return th.full((4, 3, 8, 8), 0.5), {}

    finished(data=Constant(), max_steps=200, lr=1e-2, log_interval=20)
    losses = [float(row["mse"]) for row in log_rows(out_dir)]
    assert losses[-1] < 0.3 * losses[0]


# Learning rate, clipping


@pytest.mark.parametrize(
    "kwargs, expected", [
        (dict(max_steps=3), [1e-3] * 3),
        (dict(max_steps=0, lr_anneal_steps=4), [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        (dict(max_steps=2, lr_anneal_steps=4), [1e-3, 7.5e-4]),
        (dict(max_steps=4, lr_schedule="linear"), [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        (dict(max_steps=2, lr_schedule="cosine"), [1e-3, 5e-4]),
        (dict(max_steps=0, lr_anneal_steps=3, lr_schedule="constant", lr_warmup_steps=2), [5e-4, 1e-3, 1e-3]),
    ],
)  # fmt: skip
def test_rates_of_a_run_are_logged(out_dir, kwargs, expected):
    finished(**kwargs)
    np.testing.assert_allclose([float(row["lr"]) for row in log_rows(out_dir)], expected)


def test_gradients_are_clipped_to_their_norm(out_dir):
    loop, norms = make_loop(grad_clip=0.01, max_steps=3), []
    step = loop.opt.step

    def spy():
        norms.append(th.cat([p.grad.flatten() for p in loop.master_params]).norm().item())
        step()

    loop.opt.step = spy
    loop.run_loop()
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(float(row["grad_norm"]) > 0.02 for row in log_rows(out_dir))  # as it was before


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_stay_close_to_fp32(precision):
    start = parameters(small_model())
    exact, rough = (make_loop(precision=p, max_steps=6, **STEADY) for p in ("fp32", precision))
    if precision == "fp16":
        rough.loss_scale.lg.fill_(8.0)  # from the start where no step overflows
    exact.run_loop()
    rough.run_loop()
    moved, other = parameters_of(exact) - start, parameters_of(rough) - start
    assert (moved - other).norm() < (0.2 if precision == "bf16" else 0.05) * moved.norm()
    assert rough.model.torso[0].weight.dtype == {"bf16": th.bfloat16, "fp16": th.float16}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpoints_are_in_float32_whatever_the_precision(out_dir, precision):
    loop = finished(precision=precision, max_steps=2)
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        state_dict = load(out_dir / name)
        assert {value.dtype for value in state_dict.values()} == {th.float32}
        small_model().load_state_dict(state_dict)
    th.testing.assert_close(
        th.cat([load(out_dir / "model000002.pt")[name].flatten() for name, _ in loop.model.named_parameters()]),
        parameters_of(loop), rtol=0, atol=0,
    )  # fmt: skip


def test_use_fp16_is_precision_fp16():
    loop = make_loop(use_fp16=True)
    assert loop.precision == "fp16" and loop.lg_loss_scale == 20
    assert make_loop().lg_loss_scale == 20 and not make_loop().use_fp16


def test_loss_scale_grows_with_each_step_and_is_logged(out_dir):
    loop = finished(use_fp16=True, fp16_scale_growth=0.25, max_steps=3)
    skipped = sum(float(row["skipped_steps"]) for row in log_rows(out_dir))
    assert loop.lg_loss_scale == pytest.approx(20 + 0.25 * (3 - skipped) - skipped)
    assert float(log_rows(out_dir)[-1]["lg_loss_scale"]) == loop.lg_loss_scale


def test_an_overflow_skips_the_step_and_lowers_the_scale(out_dir):
    loop = make_loop(use_fp16=True)
    loop.loss_scale.lg.fill_(8.0)
    loop.run_step(*next(loop.data))
    loop.step = 1
    before = [v.clone() for v in (parameters_of(loop), parameters(loop.model), loop.emas[0].params[0])]
    state = {name: value.clone() for name, value in loop.opt.state[loop.master_params[0]].items()}
    loop.loss_scale.lg.fill_(120.0)
    loop.run_step(*next(loop.data))
    assert loop.lg_loss_scale == 119
    for old, new in zip(before, (parameters_of(loop), parameters(loop.model), loop.emas[0].params[0])):
        assert th.equal(old, new)
    assert_same(state, dict(loop.opt.state[loop.master_params[0]]))
    assert loop.run_log.meter.read()["skipped_steps"] == 0.5
    loop.loss_scale.lg.fill_(8.0)
    loop.step = 2
    loop.run_step(*next(loop.data))
    assert not th.equal(before[0], parameters_of(loop))  # it goes on from there


def test_unknown_precisions_and_schedules_are_named():
    with pytest.raises(UserError, match="did you mean bf16"):
        make_loop(precision="bf61")
    with pytest.raises(UserError, match="did you mean cosine"):
        make_loop(lr_schedule="cosin")


# Averages and the optimizer


def test_each_rate_has_its_average(out_dir):
    finished(ema_rate="0.5,0.9", max_steps=1)
    start = small_model().state_dict()
    model, half, most = (load(out_dir / f"{name}000000.pt") for name in ("model", "ema_0.5_", "ema_0.9_"))
    for name, old in start.items():
        th.testing.assert_close(half[name], 0.5 * old + 0.5 * model[name], rtol=1e-5, atol=1e-6)
        th.testing.assert_close(most[name], 0.9 * old + 0.1 * model[name], rtol=1e-5, atol=1e-6)


def test_the_optimizer_is_torchs_adamw():
    """Against a loop written by hand with the plain optimizer."""
    arguments = dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-4)
    loop = finished(max_steps=3, **arguments)
    reference = make_loop(**arguments)
    optimizer = th.optim.AdamW(
        reference.model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-4, foreach=False, fused=False
    )
    reference.opt.step = lambda: None
    for step in range(3):
        reference.step = step
        reference.run_step(*next(reference.data))
        optimizer.step()
    th.testing.assert_close(parameters(loop.model), parameters(reference.model), rtol=1e-4, atol=1e-6)


# Files


def test_files_have_the_published_names(out_dir):
    finished(max_steps=6, save_interval=2, ema_rate="0.9,0.9999")
    steps = (0, 2, 4, 6)  # after the first step, every save_interval, and at the end
    expected = {f"{name}{step:06d}.pt" for step in steps for name in ("model", "opt", "ema_0.9_", "ema_0.9999_")}
    expected |= {f"manifest{step:06d}.json" for step in steps}
    assert set(os.listdir(out_dir)) == expected | {"progress.csv"}
    optimizer = load(out_dir / "opt000002.pt")
    assert optimizer["improved_diffusion"]["step"] == 3
    for entry in optimizer["state"].values():
        assert entry["step"] == 3


def test_the_last_step_is_not_saved_twice(out_dir):
    finished(max_steps=5, save_interval=2)
    assert sorted(name for name in os.listdir(out_dir) if name.startswith("model")) == [
        "model000000.pt", "model000002.pt", "model000004.pt",
    ]  # fmt: skip


def test_checkpoints_describe_themselves(out_dir):
    finished(max_steps=1, metadata={"config": {"image_size": 8}, "class_names": ["a"]})
    metadata = checkpoint.load(str(out_dir / "model000000.pt"))[1]
    assert metadata == {"config": {"image_size": 8}, "class_names": ["a"], "step": 1}
    assert checkpoint.load(str(out_dir / "ema_0.9_000000.pt"))[1]["ema_rate"] == 0.9


def test_checkpoints_may_go_to_another_folder(out_dir, tmp_path, monkeypatch):
    assert get_blob_logdir() == str(out_dir)
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    assert get_blob_logdir() == str(tmp_path / "elsewhere")
    finished(max_steps=1)
    assert "model000000.pt" in os.listdir(tmp_path / "elsewhere") and os.listdir(out_dir) == ["progress.csv"]


def test_other_ranks_write_nothing(out_dir, monkeypatch):
    loop = make_loop()
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    loop.save()
    assert not [name for name in os.listdir(out_dir) if name.endswith(".pt")]


# How a run ends


def test_max_steps_and_anneal_steps_end_the_run():
    assert finished(max_steps=3).absolute_step == 3
    assert finished(max_steps=0, lr_anneal_steps=2).absolute_step == 2


def test_max_hours_end_the_run(out_dir):
    loop = finished(max_steps=0, max_hours=1e-9, log_interval=3)
    assert loop.absolute_step == 1 and "model000000.pt" in os.listdir(out_dir)
    loop = make_loop(max_steps=0, max_hours=1.0, log_interval=2)
    loop.hooks = [(4, lambda loop: setattr(loop.time_limit, "started", loop.time_limit.started - 3601))]
    loop.run_loop()
    assert loop.absolute_step == 4 and "model000004.pt" in os.listdir(out_dir)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_with_a_checkpoint_of_that_step(tmp_path, number):
    into(tmp_path / "run")
    loop = make_loop(max_steps=9, hooks=[(3, lambda loop: os.kill(os.getpid(), number))])
    with pytest.raises(Stopped) as ended:
        loop.run_loop()
    assert (ended.value.signal, ended.value.steps_done) == (number, 3)
    assert loop.absolute_step == 3 and complete_sets(str(tmp_path / "run"), ["0.9"]) == [0, 3]
    text = (tmp_path / "run" / "log.txt").read_text()
    assert f"stopped by {signal.Signals(number).name} after 3 steps" in text and "--resume auto" in text
    before = parameters_of(loop)
    resumed = make_loop(max_steps=4, resume_checkpoint=str(tmp_path / "run" / "model000003.pt"))
    assert resumed.absolute_step == 3 and th.equal(parameters_of(resumed), before)


def test_a_signal_between_microbatches_leaves_the_step_as_if_it_had_not_begun(tmp_path):
    """Steps may take minutes, and a scheduler's patience ends sooner."""

    def loop_into(folder, max_steps):
        into(tmp_path / folder)
        diffusion = small_diffusion()
        sampler = LossSecondMomentResampler(diffusion, 1)
        return make_loop(diffusion=diffusion, schedule_sampler=sampler, microbatch=1, max_steps=max_steps)

    loop_into("whole", 2).run_loop()
    loop = loop_into("stopped", 5)
    losses, calls = loop.diffusion.training_losses, []

    def stop_in_the_third_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*args, **kwargs)

    loop.diffusion.training_losses = stop_in_the_third_step
    with pytest.raises(Stopped) as ended:
        loop.run_loop()
    assert ended.value.steps_done == 2 and len(calls) == 2 * 4 + 2
    assert_sets_equal(tmp_path / "stopped", tmp_path / "whole", 2)


def test_a_signal_during_the_last_step_leaves_a_finished_run():
    finished(max_steps=3, hooks=[(3, lambda loop: os.kill(os.getpid(), signal.SIGTERM))])


def test_a_signal_after_a_regular_save_writes_it_once(out_dir):
    loop = make_loop(max_steps=9, save_interval=2, hooks=[(3, lambda loop: os.kill(os.getpid(), signal.SIGTERM))])
    with pytest.raises(Stopped):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 2]  # that of step 2 was written after three steps


def test_the_published_test_switch_ends_the_run(out_dir, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    finished(max_steps=0, save_interval=3)
    assert sorted(name for name in os.listdir(out_dir) if name.startswith("model")) == [
        "model000000.pt", "model000003.pt",
    ]  # fmt: skip


def test_ctrl_c_says_what_was_saved():
    def interrupt(loop):
        raise KeyboardInterrupt

    loop = make_loop(save_interval=1, hooks=[(3, interrupt)])
    with pytest.raises(KeyboardInterrupt, match=r"after 3 steps.*model00000[01]\.pt; --resume auto"):
        loop.run_loop()
    loop = make_loop(hooks=[(0, interrupt)])  # an interval of 0: never
    loop.run_loop()


class Spoilt(Data):
    """Batches that are not numbers at the given steps."""

    def __init__(self, bad, **kwargs):
        super().__init__(**kwargs)
        self.bad = bad

    def __next__(self):
        step = self.step
        batch, kwargs = super().__next__()
        return (batch * math.nan if self.bad(step) else batch), kwargs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_that_are_never_finite_stop_the_run_with_a_message(out_dir, precision):
    loop = make_loop(
        data=Spoilt(lambda step: step >= 2), precision=precision, max_steps=100, max_bad_steps=5, log_interval=2,
        save_interval=3,
    )  # fmt: skip
    before = []
    loop.hooks = [(2, lambda loop: before.append(parameters_of(loop)) if not before else None)]
    with pytest.raises(UserError, match=r"first at step 2: .*last good checkpoint, .*model000000\.pt.*--lr"):
        loop.run_loop()
    assert loop.absolute_step == 6
    assert th.equal(parameters_of(loop), before[0])  # no parameter was spoilt


def test_rows_of_bad_steps_shorter_than_allowed_are_passed_over(out_dir):
    bad = Spoilt(lambda step: step % 4 != 0)
    finished(data=bad, max_steps=13, max_bad_steps=4, log_interval=4)
    assert [float(row["skipped_steps"]) for row in log_rows(out_dir)] == [0, 0.75, 0.75, 0.75]
    with pytest.raises(UserError, match=r"3 steps in a row.*first at step 1"):
        finished(data=Spoilt(lambda step: step % 4 != 0), max_steps=12, max_bad_steps=3, log_interval=4)


def test_a_row_of_bad_steps_goes_on_after_a_resume(tmp_path):
    """Overflows of float16, which are no reason not to save."""
    into(tmp_path / "run")
    loop = make_loop(use_fp16=True, max_steps=3, max_bad_steps=4, log_interval=1)
    loop.lg_loss_scale = 120.0
    loop.run_loop()
    loop = make_loop(
        use_fp16=True, max_steps=9, max_bad_steps=4, log_interval=1,
        resume_checkpoint=str(tmp_path / "run" / "model000003.pt"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"4 steps in a row.*first at step 0"):
        loop.run_loop()
    assert loop.absolute_step == 3


# What is not fit for a checkpoint


def names(folder, end=".json"):
    return sorted(name for name in os.listdir(folder) if name.endswith(end))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keep_last", [1, 2])
def test_in_a_row_of_bad_steps_nothing_is_saved_and_nothing_removed(out_dir, precision, keep_last):
    data = Spoilt(lambda step: step >= 5)
    loop = make_loop(data=data, precision=precision, max_steps=30, save_interval=2, keep_last=keep_last,
                     max_bad_steps=20)  # fmt: skip
    if precision == "fp16":
        loop.lg_loss_scale = 8.0
    with pytest.raises(UserError, match=r"first at step 5: .*last good checkpoint, .*model000002\.pt.*model000004\.pt"):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [2, 4]  # the set of step 4 has the weights that failed at 5


@pytest.mark.parametrize("max_steps", [7, 9])
def test_a_run_that_ends_in_a_row_of_bad_steps_fails_and_names_the_last_good_set(out_dir, max_steps):
    loop = make_loop(data=Spoilt(lambda step: step >= 6), max_steps=max_steps, save_interval=4)
    with pytest.raises(UserError, match=r"first at step 6: .*last good checkpoint, .*model000004\.pt, with"):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 4]
    assert len(log_rows(out_dir)) == max_steps


def test_a_run_of_bad_steps_alone_saves_nothing(out_dir):
    with pytest.raises(UserError, match=r"3 steps in a row.*first at step 0: .*checkpoint, none, with"):
        finished(data=Spoilt(lambda step: True), max_steps=3)
    assert names(out_dir, ".pt") == []


def test_a_checkpoint_that_was_due_in_a_row_of_bad_steps_is_written_after_it(out_dir):
    finished(data=Spoilt(lambda step: 3 <= step <= 5), max_steps=12, save_interval=4)
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 6, 8, 12]


@pytest.mark.parametrize("end", ["signal", "time"])
def test_a_stop_in_a_row_of_bad_steps_says_that_nothing_was_saved(tmp_path, end):
    into(tmp_path / "run")
    loop = make_loop(data=Spoilt(lambda step: step >= 4), max_steps=30, save_interval=3, max_hours=1.0)

    def stop(loop):
        if end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            loop.time_limit.started -= 3601

    loop.hooks = [(6, stop)]
    with pytest.raises((Stopped, UserError), match=r"model00000[03]\.pt"):
        loop.run_loop()
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0, 3]
    if end == "signal":
        assert f"continues from {tmp_path}/run/model000003.pt" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("part", ["parameter", "average", "width"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_never_saved(out_dir, part, value):
    loop = make_loop(max_steps=6, save_interval=3, ema_sigma_rel="0.1")

    def spoil(loop):
        if part == "parameter":
            with th.no_grad():
                loop.model_params[-1][0] = value
        else:
            loop.emas[0 if part == "average" else 1].params[0].view(-1)[0] = value

    loop.hooks = [(5, spoil)]
    with pytest.raises(UserError, match=r"(not finite|at step 5).*last good checkpoint, .*model000003\.pt"):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 3]
    with pytest.raises(UserError, match="not finite"):
        loop.save()


def test_overflows_while_the_loss_scale_is_searched_are_no_reason_not_to_save(tmp_path):
    into(tmp_path / "run")
    loop = make_loop(use_fp16=True, max_steps=5, save_interval=2, log_interval=1)
    loop.lg_loss_scale = 120.0
    loop.run_loop()
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0, 2, 4]
    assert [float(row["skipped_steps"]) for row in log_rows(tmp_path / "run")] == [1] * 5
    assert "5 steps in a row" in (tmp_path / "run" / "log.txt").read_text()


def test_a_loss_scale_that_cannot_fall_further_is_no_excuse(out_dir):
    class Steep:
        """A finite loss whose gradient is never finite."""

        def __init__(self, diffusion):
            self.diffusion, self.num_timesteps = diffusion, diffusion.num_timesteps

        def training_losses(self, model, x_start, t, **kwargs):
            losses = self.diffusion.training_losses(model, x_start, t, **kwargs)
            return {"loss": th.sqrt(losses["loss"] * 0)}

    loop = make_loop(use_fp16=True, diffusion=Steep(small_diffusion()), max_steps=4)
    loop.lg_loss_scale = -20.0
    with pytest.raises(UserError, match="4 steps in a row"):
        loop.run_loop()
    assert names(out_dir, ".pt") == []


# Errors


class Ending(Data):
    """Batches until a step, and then an error."""

    def __init__(self, step, error):
        super().__init__()
        self.last, self.error = step, error

    def __next__(self):
        if self.step == self.last:
            raise self.error
        return super().__next__()


def failing_hook(error):
    def hook(loop):
        raise error

    return hook


ERRORS = [
    UserError("an image"),
    StopIteration(),
    OSError(5, "Input/output error"),
    th.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("a fault of ours"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["data", "hook", "model"])
def test_an_error_ends_a_run_with_a_checkpoint_of_the_last_whole_step(tmp_path, error, place, monkeypatch):
    into(tmp_path / "run")
    loop = make_loop(data=Ending(5 if place == "data" else -1, error), max_steps=9, save_interval=3)
    if place == "hook":
        loop.hooks = [(5, failing_hook(error))]
    if place == "model":
        forward = loop.model.forward
        loop.model.forward = lambda *args: failing_hook(error)(loop) if loop.step == 5 else forward(*args)
    with pytest.raises(type(error)) as ended:
        loop.run_loop()
    assert ended.value is error
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0, 3, 5]
    assert f"saved {tmp_path}/run/model000005.pt" in (tmp_path / "run" / "log.txt").read_text()
    into(tmp_path / "rest")
    resumed = finished(resume_checkpoint=str(tmp_path / "run" / "model000005.pt"), max_steps=9)
    assert th.equal(parameters_of(resumed), parameters_of(finished(max_steps=9)))


def test_an_error_in_the_optimizer_leaves_no_whole_step_to_save(out_dir):
    loop = make_loop(max_steps=9)
    step = loop.opt.step

    def fail(*args):
        step(*args)
        if loop.step == 4:
            raise RuntimeError("half a step")

    loop.opt.step = fail
    with pytest.raises(RuntimeError, match="half a step"):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0]


def test_an_error_in_a_row_of_bad_steps_saves_nothing(tmp_path):
    into(tmp_path / "run")
    loop = make_loop(data=Spoilt(lambda step: step >= 3), max_steps=9, hooks=[(5, failing_hook(UserError("an image")))])
    with pytest.raises(UserError, match="an image"):
        loop.run_loop()
    assert complete_sets(str(tmp_path / "run"), ["0.9"]) == [0]
    assert "no checkpoint of the last steps" in (tmp_path / "run" / "log.txt").read_text()


def test_an_error_right_after_a_save_does_not_save_again(out_dir):
    loop = make_loop(data=Ending(4, UserError("an image")), max_steps=9, save_interval=3)
    with pytest.raises(UserError, match="an image"):
        loop.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 3]  # that of step 3 was written after four steps


def test_an_error_before_the_first_step_saves_nothing(out_dir):
    with pytest.raises(UserError, match="an image"):
        finished(data=Ending(0, UserError("an image")))
    assert names(out_dir, ".pt") == []


def test_a_save_that_fails_does_not_hide_the_error(tmp_path, monkeypatch):
    into(tmp_path / "run")
    loop = make_loop(data=Ending(5, UserError("an image")), max_steps=9)

    def full(*args):
        raise UserError("No space left on device")

    loop.hooks = [(4, lambda loop: monkeypatch.setattr(sets, "write_set", full))]
    with pytest.raises(UserError, match="an image"):
        loop.run_loop()
    assert "No space left on device" in (tmp_path / "run" / "log.txt").read_text()


def test_after_ctrl_c_nothing_writes_into_the_folder(out_dir, monkeypatch):
    """A second one ends a run at once, in the midst of a save too."""
    began, go_on = threading.Event(), threading.Event()
    to_bytes = checkpoint.to_bytes

    def slow(part):
        began.set()
        go_on.wait(0.5)
        return to_bytes(part)

    def interrupt(loop):
        began.wait(30)
        raise KeyboardInterrupt

    loop = make_loop(hooks=[(2, interrupt)])
    monkeypatch.setattr(checkpoint, "to_bytes", slow)
    with pytest.raises(KeyboardInterrupt, match="after 2 steps"):
        loop.run_loop()
    assert loop.checkpointer.writer.thread is None
    before = os.listdir(out_dir)
    go_on.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint writer"]
    assert os.listdir(out_dir) == before and not complete_sets(str(out_dir), ["0.9"])


# Several runs of a process


@pytest.mark.parametrize("where", ["given", "default", "blob"])
def test_a_second_run_of_a_process_has_a_folder_of_its_own(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    logger.reset()
    if where != "default":
        into(tmp_path / "run")
    if where == "blob":
        monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blob"))
    folders = []
    make_loop()  # forgets the runs of other tests
    for steps in (2, 3):
        loop = TrainLoop(
            model=small_model(), diffusion=small_diffusion(), data=Data(), batch_size=4, microbatch=-1, lr=1e-3,
            ema_rate="0.9", log_interval=1, save_interval=10, resume_checkpoint="", max_steps=steps,
        )  # fmt: skip
        loop.run_loop()
        folders.append(loop.checkpointer.folder)
        assert len(log_rows(Path(logger.get_dir()))) == steps
    assert [complete_sets(folder, ["0.9"]) for folder in folders] == [[0, 2], [0, 3]]
    assert folders[0] == {"given": str(tmp_path / "run"), "blob": str(tmp_path / "blob")}.get(where, folders[0])


def test_a_run_that_goes_on_from_an_earlier_one_of_the_process_shares_its_folder(out_dir):
    loop = finished(max_steps=2)
    token = loop.checkpointer.token
    resumed = make_loop(max_steps=4, resume_checkpoint=str(out_dir / "model000002.pt"))
    checkpointer._owners[str(out_dir)] = token
    resumed.run_loop()
    assert complete_sets(str(out_dir), ["0.9"]) == [0, 2, 4]


def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradient_is(out_dir):
    class InfiniteLoss:
        def __init__(self, diffusion):
            self.diffusion, self.num_timesteps, self.calls = diffusion, diffusion.num_timesteps, 0

        def training_losses(self, *args, **kwargs):
            losses = self.diffusion.training_losses(*args, **kwargs)
            self.calls += 1
            return {**losses, "loss": losses["loss"] + (math.inf if self.calls == 2 else 0.0)}

    finished(diffusion=InfiniteLoss(small_diffusion()), max_steps=4, log_interval=1)
    assert [float(row["skipped_steps"]) for row in log_rows(out_dir)] == [0, 1, 0, 0]


def test_one_bad_batch_is_passed_over(out_dir):
    diffusion = small_diffusion(2)
    sampler = LossSecondMomentResampler(diffusion, 2, 0.01)
    bad = Spoilt(lambda step: step == 1)
    loop = finished(data=bad, log_interval=2, max_steps=6, diffusion=diffusion, schedule_sampler=sampler)
    assert th.isfinite(parameters_of(loop)).all() and np.isfinite(sampler.weights()).all()
    assert [float(row["skipped_steps"]) for row in log_rows(out_dir)] == [0, 0.5, 0, 0]


def test_the_gradients_norm_is_logged_before_and_after_clipping(out_dir):
    finished(max_steps=3, grad_clip=0.01)
    for row in log_rows(out_dir):
        assert float(row["grad_norm"]) > 0.02 and float(row["grad_norm_clipped"]) == pytest.approx(0.01)


class HostReads(TorchDispatchMode):
    """Counts how often a value is read on the host, for which a GPU would have to finish its work."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is th.ops.aten._local_scalar_dense.default:
            self.reads.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_reads_a_value_on_the_host_between_rows_of_the_log(precision):
    loop = make_loop(
        model=small_unet(dropout=0.1), precision=precision, grad_clip=1.0, ema_rate="0.9,0.99", ema_warmup=True,
        ema_sigma_rel="0.1", microbatch=2, max_steps=100, log_interval=10, lr_warmup_steps=4,
    )  # fmt: skip
    loop.run_step(*next(loop.data))  # fills the tables of coefficients
    with HostReads() as counter:
        for _ in range(3):
            loop.step += 1
            loop.run_step(*next(loop.data))
        assert counter.reads == []
        float(loop.grad_norm)
        assert counter.reads


class Operations(TorchDispatchMode):
    """Counts the operations that torch starts beside the model's own, each of which costs the host microseconds."""

    def __init__(self, loop):
        super().__init__()
        self.count, self.is_models = 0, False
        loop.diffusion.training_losses = self.of_model(loop.diffusion.training_losses)

    def of_model(self, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self.is_models = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_models = False

        return wrapped

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.is_models
        return func(*args, **(kwargs or {}))


class ManyParameters(SmallModel):
    def __init__(self):
        super().__init__()
        self.more = th.nn.ParameterList([th.nn.Parameter(th.zeros(1)) for _ in range(200)])

    def forward(self, x, timesteps):
        return super().forward(x, timesteps) + th.cat(list(self.more)).sum()


@pytest.mark.parametrize(
    "precision, sampler", [("fp32", "uniform"), ("bf16", "uniform"), ("fp16", "loss-second-moment")]
)
def test_a_step_takes_few_operations_beside_the_models(precision, sampler, monkeypatch):
    """However many parameters there are, each of which would otherwise cost some."""
    diffusion = small_diffusion()
    sampler = create_named_schedule_sampler(sampler, diffusion)
    loop = make_loop(model=ManyParameters(), diffusion=diffusion, schedule_sampler=sampler, precision=precision)
    for _ in range(2):
        loop.run_step(*next(loop.data))
        loop.step += 1
    operations = Operations(loop)
    monkeypatch.setattr(th.Tensor, "backward", operations.of_model(th.Tensor.backward))
    steps = LossMeter.AT_ONCE  # so that what waits is added once
    with operations:
        for _ in range(steps):
            loop.run_step(*next(loop.data))
            loop.step += 1
    assert operations.count / steps < 85


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_bytes_are_trained_on_as_the_images_that_they_stand_for(microbatch):
    class Bytes(Data):
        def __next__(self):
            batch, kwargs = super().__next__()
            return ((batch + 1) * 127.5).to(th.uint8), kwargs

    class Floats(Bytes):
        def __next__(self):
            batch, kwargs = super().__next__()
            return batch.float() / 127.5 - 1, kwargs

    runs = [parameters(finished(data=data(), microbatch=microbatch, max_steps=2).model) for data in (Bytes, Floats)]
    assert th.equal(*runs)


def test_hooks_are_called_at_their_interval():
    calls = []
    hooks = [(2, lambda loop: calls.append(loop.absolute_step)), (5, lambda loop: calls.append("5"))]
    finished(max_steps=6, hooks=hooks)
    assert calls == [1, 3, "5", 5]


# The log


def test_rows_hold_the_published_keys(out_dir):
    finished(max_steps=12, log_interval=4, use_fp16=True)
    rows = log_rows(out_dir)
    assert [int(row["step"]) for row in rows] == [0, 4, 8, 11]  # the last one is what was left
    assert [int(row["samples"]) for row in rows] == [4, 20, 36, 48]
    keys = {"step", "samples", "grad_norm", "lg_loss_scale", "lr", "skipped_steps"}
    keys |= {"images_per_second", "data_wait", "peak_gib"}
    keys |= {f"{name}{quartile}" for name in ("loss", "mse", "vb") for quartile in ("", "_q0", "_q1", "_q2", "_q3")}
    assert set(rows[0]) == keys


def test_rows_are_means_over_the_steps_since_the_last(out_dir, tmp_path):
    finished(max_steps=9, log_interval=4)
    each = tmp_path / "each"
    into(each)
    finished(max_steps=9, log_interval=1)
    losses = [float(row["loss"]) for row in log_rows(each)]
    expected = [losses[0], np.mean(losses[1:5]), np.mean(losses[5:9])]
    np.testing.assert_allclose([float(row["loss"]) for row in log_rows(out_dir)], expected, rtol=1e-6)


def test_log_loss_dict_logs_means_and_quartiles():
    logger.dumpkvs()
    log_loss_dict(make_diffusion(8), th.tensor([0, 1, 2, 7, 7]), {"loss": th.tensor([1.0, 3.0, 5.0, 7.0, 9.0])})
    assert logger.getkvs() == {"loss": 5.0, "loss_q0": 2.0, "loss_q1": 5.0, "loss_q3": 8.0}


# Names


def test_steps_and_averages_are_found_by_name(tmp_path):
    assert parse_resume_step_from_filename("runs/x/model000123.pt") == 123
    assert parse_resume_step_from_filename("weights.pt") == 0
    main = str(tmp_path / "model000010.pt")
    assert find_ema_checkpoint(None, 10, 0.9999) is None
    assert find_ema_checkpoint(main, 10, 0.9999) is None
    (tmp_path / "ema_0.9999_000010.pt").touch()
    assert find_ema_checkpoint(main, 10, 0.9999) == find_ema_checkpoint(main, 10, "0.9999")
    assert find_ema_checkpoint(main, 10, 0.9999) == str(tmp_path / "ema_0.9999_000010.pt")


def test_the_batch_of_all_ranks_is_counted(out_dir, monkeypatch):
    loop = make_loop()
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    loop.global_batch = 12
    loop.step = 4
    loop.log_step()
    assert logger.getkvs()["samples"] == 60


@pytest.mark.parametrize(
    "options, warned",
    [
        (dict(ema_rate="0.9999"), True),
        (dict(ema_rate="0.5,0.9999"), True),
        (dict(ema_rate="0.9999", max_steps=0, lr_anneal_steps=12), True),
        (dict(ema_rate="0.9999", ema_warmup=True), False),
        (dict(ema_rate="0.5"), False),
        (dict(ema_rate="", ema_sigma_rel="0.1"), False),
    ],
)
def test_averages_that_would_stay_noise_are_warned_of_at_the_start(tmp_path, options, warned):
    into(tmp_path)
    finished(**{"max_steps": 12, **options})
    text = (tmp_path / "log.txt").read_text()
    assert ("0.9999: 99.9%" in text and "--ema_warmup True" in text) == warned
    assert not warned or text.index("warning: ") < text.index("initial weights")


class Wrapped(th.nn.Module):
    """A user's model around networks of this package."""

    def __init__(self):
        super().__init__()
        self.net, self.ema_net = small_unet(), small_unet()

    def forward(self, x, timesteps, **kwargs):
        return self.net(x, timesteps, **kwargs) + 0 * self.ema_net(x, timesteps, **kwargs)


def test_a_model_of_the_users_own_around_ours_is_resumed_as_it_was(tmp_path):
    into(tmp_path / "run")
    finished(model=Wrapped(), max_steps=2, save_interval=2)
    resumed = finished(model=Wrapped(), resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    into(tmp_path / "whole")
    assert th.equal(parameters_of(resumed), parameters_of(finished(model=Wrapped())))
