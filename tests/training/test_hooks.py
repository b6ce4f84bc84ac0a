"""What code that extends the published TrainLoop relies on."""

import csv
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch as th
from train_helpers import Data, assert_same, finished, into, load, log_rows, make_loop, parameters_of, small_diffusion

from improved_diffusion import dist_util, train_util
from improved_diffusion.logs import logger
from improved_diffusion.training import loop as loop_module
from improved_diffusion.training.hooks import TrainingView
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.training.objective import draw_noise

pytestmark = pytest.mark.usefixtures("out_dir")

HOOKS = {
    "_load_and_sync_parameters", "run_step", "forward_backward", "_log_grad_norm", "_anneal_lr", "log_step", "save",
    "_master_params_to_state_dict",
}  # fmt: skip
RESUMING = {"_load_optimizer_state", "_load_ema_parameters", "_state_dict_to_master_params"}


def counting(names):
    """A subclass that counts the calls of the named methods, and the counts."""
    calls = dict.fromkeys(names, 0)

    def replacement(name):
        def method(self, *args, **kwargs):
            calls[name] += 1
            return getattr(TrainLoop, name)(self, *args, **kwargs)

        return method

    return type("Counting", (TrainLoop,), {name: replacement(name) for name in names}), calls


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replaced_methods_are_those_that_the_loop_calls(out_dir, monkeypatch, precision):
    optimize = "optimize_fp16" if precision == "fp16" else "optimize_normal"
    setup = set() if precision == "fp32" else {"_setup_fp16"}
    kind, calls = counting(HOOKS | RESUMING | setup | {optimize})
    monkeypatch.setattr("train_helpers.TrainLoop", kind)
    finished(precision=precision, max_steps=3, save_interval=2)
    assert {name for name, count in calls.items() if not count} == RESUMING
    assert calls["run_step"] == calls[optimize] == calls["_log_grad_norm"] == 3 and calls["save"] == 2
    make_loop(precision=precision, resume_checkpoint=str(out_dir / "model000002.pt"))
    assert all(calls.values())


def test_a_replaced_save_finds_its_files_written(out_dir, monkeypatch):
    found = []

    class Uploading(TrainLoop):
        def save(self):
            super().save()
            found.append((out_dir / f"model{self.absolute_step:06d}.pt").exists())

    monkeypatch.setattr("train_helpers.TrainLoop", Uploading)
    finished(max_steps=5, save_interval=2)
    loop = make_loop(max_steps=1)
    loop.save = lambda: found.append("of the instance")
    loop.run_loop()
    assert found == [True, True, True, "of the instance"]


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_users_own_loop_logs_what_the_steps_report(out_dir, use_fp16):
    loop = make_loop(use_fp16=use_fp16)
    losses = []
    for _ in range(3):
        loop.run_step(*next(loop.data))
        losses.append(logger.dumpkvs()["loss"])
        loop.step += 1
    rows = log_rows(out_dir)
    assert [row["step"] for row in rows] == ["0", "1", "2"] and [row["samples"] for row in rows] == ["4", "8", "12"]
    assert [float(row["loss"]) for row in rows] == losses and len(set(losses)) == 3
    assert {"mse", "vb", "grad_norm", "loss_q0", "vb_q3"} <= rows[0].keys()
    assert ("lg_loss_scale" in rows[0]) == use_fp16
    loop.save()
    assert load(out_dir / "opt000003.pt")["improved_diffusion"]["step"] == 3


def test_a_step_by_hand_is_run_step():
    loop, other = make_loop(seed=None), make_loop(seed=None)
    for one, by_hand in ((loop, True), (other, False)):
        th.manual_seed(0)
        np.random.seed(0)
        if by_hand:
            one.forward_backward(*next(one.data))
            one.optimize_normal()
            one.log_step()
        else:
            one.run_step(*next(one.data))
    assert th.equal(parameters_of(loop), parameters_of(other))


def test_a_forward_backward_of_the_published_kind_trains(monkeypatch):
    """It leaves the whole gradient in the model's parameters."""

    class Published(TrainLoop):
        def forward_backward(self, batch, cond):
            train_util.zero_grad(self.model_params)
            for i in range(0, batch.shape[0], self.microbatch):
                micro = batch[i : i + self.microbatch]
                t, weights = self.schedule_sampler.sample(micro.shape[0], self.device)
                losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs={})
                train_util.log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})
                loss = (losses["loss"] * weights).mean()
                (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    for precision in ("fp32", "bf16", "fp16"):
        own = finished(precision=precision, max_steps=3)
        with monkeypatch.context() as patch:
            patch.setattr("train_helpers.TrainLoop", Published)
            theirs = finished(precision=precision, max_steps=3)
        assert th.equal(parameters_of(own), parameters_of(theirs)), precision


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_methods_of_the_published_kind_resume(tmp_path, monkeypatch, precision):
    class Published(TrainLoop):
        def _load_and_sync_parameters(self):
            main = train_util.find_resume_checkpoint() or self.resume_checkpoint
            self.resume_step = train_util.parse_resume_step_from_filename(main)
            self.model.load_state_dict(dist_util.load_state_dict(main, map_location="cpu"))

        def _load_ema_parameters(self, rate):
            path = train_util.find_ema_checkpoint(self.resume_checkpoint, self.resume_step, rate)
            return self._state_dict_to_master_params(dist_util.load_state_dict(path, map_location="cpu"))

        def _load_optimizer_state(self):
            path = Path(self.resume_checkpoint).parent / f"opt{self.resume_step:06}.pt"
            self.opt.load_state_dict(dist_util.load_state_dict(str(path), map_location="cpu"))

    half = finished(precision=precision, max_steps=3)
    main = str(tmp_path / "run" / "model000003.pt")
    monkeypatch.setattr("train_helpers.TrainLoop", Published)
    loop = make_loop(precision=precision, resume_checkpoint=main, max_steps=5)
    assert loop.absolute_step == 3 and th.equal(parameters_of(loop), parameters_of(half))
    assert all(th.equal(a, b) for a, b in zip(loop.ema_params[0], half.ema_params[0]))
    assert_same(dict(half.opt.state[half.master_params[0]]), dict(loop.opt.state[loop.master_params[0]]))
    loop.run_loop()
    assert [row["step"] for row in log_rows(tmp_path / "run")] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("schedule", ["", "warm-up"])
def test_a_rate_set_from_outside_stays_unless_there_is_a_schedule(schedule):
    loop = make_loop(lr=1e-3, lr_warmup_steps=10 if schedule else 0)
    loop.opt.param_groups[0]["lr"] = 5e-4
    loop.run_step(*next(loop.data))
    assert loop.opt.param_groups[0]["lr"] == (1e-4 if schedule else 5e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_optimizer_steps_and_skips_what_is_not_finite(precision):
    loop = make_loop(precision=precision)
    loop.lg_loss_scale = 8.0
    loop.opt = th.optim.SGD(loop.master_params, lr=1e-3, momentum=0.9)
    start = parameters_of(loop)
    loop.run_step(*next(loop.data))
    moved = parameters_of(loop)
    assert th.isfinite(moved).all() and not th.equal(moved, start)
    batch, cond = next(loop.data)
    loop.step = 1
    loop.run_step(batch * math.nan, cond)
    assert th.equal(parameters_of(loop), moved)


def test_the_loss_scale_can_be_set():
    loop = make_loop(use_fp16=True)
    loop.lg_loss_scale = 11.0
    loop.lg_loss_scale -= 1
    assert loop.lg_loss_scale == 10.0 and loop.loss_scale.scale.item() == 2**10


def test_averages_can_be_set():
    loop = make_loop(ema_rate="0.9,0.99")
    loop.ema_params = [[p.detach() * factor for p in loop.master_params] for factor in (2, 3)]
    for factor, params in zip((2, 3), loop.ema_params):
        assert all(th.equal(a, p.detach() * factor) for a, p in zip(params, loop.master_params))


class Without:
    """A diffusion whose training_losses draws its own noise, and gives a term without dimensions."""

    def __init__(self):
        self.diffusion = small_diffusion()
        self.num_timesteps = self.diffusion.num_timesteps

    def training_losses(self, model, x_start, t, model_kwargs=None):
        losses = self.diffusion.training_losses(model, x_start, t, model_kwargs)
        return {"loss": losses["loss"].mean(), "mse": losses["mse"]}


def test_training_losses_may_lack_noise_and_give_scalars(out_dir):
    finished(diffusion=Without(), max_steps=2, microbatch=2)
    assert all(float(row["loss"]) > 0 and float(row["mse"]) > 0 for row in log_rows(out_dir))


def test_noise_is_drawn_only_for_losses_that_take_it():
    batch = th.zeros(2, 3)
    assert draw_noise(lambda model, x_start, t, noise=None: None, batch)["noise"].shape == (2, 3)
    assert draw_noise(lambda *args, **kwargs: None, batch).keys() == {"noise"}
    assert draw_noise(lambda model, x_start, t, model_kwargs=None: None, batch) == {}


def test_weights_alone_resume_at_their_step_with_a_warning(tmp_path):
    finished(max_steps=2)
    weights = tmp_path / "elsewhere" / "model000040.pt"
    weights.parent.mkdir()
    weights.write_bytes((tmp_path / "run" / "model000002.pt").read_bytes())
    into(tmp_path / "rest")
    loop = make_loop(resume_checkpoint=str(weights), max_steps=42)
    assert loop.resume_step == loop.steps_done == 40 and loop.data.step == 40 and not loop.opt.state
    assert th.equal(th.cat([p.flatten() for p in loop.ema_params[0]]), parameters_of(loop))
    text = (tmp_path / "rest" / "log.txt").read_text()
    assert text.count("warning:") == 2 and "opt000040.pt" in text and "ema_0.9_000040.pt" in text
    loop.run_loop()
    assert [row["step"] for row in log_rows(tmp_path / "rest")] == ["40", "41"]


def test_without_strictness_the_files_that_exist_are_restored(tmp_path):
    half = finished(max_steps=2)
    (tmp_path / "run" / "ema_0.9_000002.pt").unlink()
    into(tmp_path / "rest")
    loop = make_loop(resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    assert loop.absolute_step == 2
    assert_same(dict(half.opt.state[half.master_params[0]]), dict(loop.opt.state[loop.master_params[0]]))


def test_a_loop_in_a_thread_trains(out_dir):
    thread = threading.Thread(target=finished, kwargs=dict(max_steps=2))
    thread.start()
    thread.join()
    assert (out_dir / "model000002.pt").exists()


def test_a_loop_is_what_hooks_are_promised():
    loop = make_loop(ema_rate="0.5", ema_sigma_rel="0.1")
    for name in (*TrainingView.__annotations__, "absolute_step", "using", "write_model"):
        assert hasattr(loop, name)
    assert list(loop.parameter_sets) == ["", "0.5", "sigma_rel0.1"]
    view: TrainingView = loop
    with view.using(view.parameter_sets["0.5"]):
        assert not view.model.training


def test_limits_of_time_are_arguments(monkeypatch):
    limits = {}
    monkeypatch.setattr(loop_module.distributed, "working", working := Working(limits))
    finished(max_steps=1, hooks=[(1, lambda loop: None)], hook_timeout=2.0, save_timeout=3.0)
    assert {2.0, 3.0} <= set(working.limits.values())


class Working:
    """Stands in for distributed.working and notes its limits."""

    def __init__(self, limits):
        self.limits = limits

    def __call__(self, what, limit_s=None):
        self.limits[what] = limit_s
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def test_a_deferred_value_is_read_when_its_row_is_written(out_dir):
    reads = []

    def values():
        reads.append(1)
        return {"early": 2, "late": 7.0}

    for _ in range(3):
        logger.defer(values)
    logger.logkv("early", 1)
    assert not reads
    assert logger.dumpkvs() == {"early": 1, "late": 7.0} and logger.dumpkvs() == {} and len(reads) == 1
    with open(out_dir / "progress.csv", newline="") as f:
        assert list(csv.DictReader(f)) == [{"early": "1", "late": "7.0"}]


def test_data_without_seek_or_conditions_are_enough():
    finished(data=((Data().__next__()[0], {}) for _ in range(9)), max_steps=2)
