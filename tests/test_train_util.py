"""The training loop: golden numbers, what must change nothing, resuming, and how a run ends."""

import csv
import itertools
import math
import os

import numpy as np
import pytest
import torch as th
from helpers import golden, make_diffusion, set_golden_weights

from improved_diffusion import checkpoint, dist_util, logger, train_util
from improved_diffusion.config import UserError
from improved_diffusion.fp16_util import convert_module_to_bf16, convert_module_to_f16
from improved_diffusion.gaussian_diffusion import LossType, ModelVarType
from improved_diffusion.nn import timestep_embedding
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from improved_diffusion.train_util import (
    LossMeter,
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    learning_rate,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from improved_diffusion.unet import UNetModel

PRECISIONS = ("fp32", "bf16", "fp16")
# Of a parameter that the loss does not depend on, Adam divides rounding noise by its own size. A larger epsilon keeps
# that still, so that two ways of computing the same can be compared.
STEADY = dict(adam_eps=1e-4)


@pytest.fixture(autouse=True)
def out_dir(tmp_path, monkeypatch):
    """Where this test's runs log and save; into() starts a run in another folder."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here needs to survive a power cut
    logger.configure(dir=str(tmp_path / "run"), format_strs=["csv"])
    return tmp_path / "run"


def into(folder):
    logger.configure(dir=str(folder), format_strs=["csv", "log"])


class Data:
    """Batch k is a function of k."""

    def __init__(self, batch_size=4, classes=None):
        self.batch_size, self.classes, self.step = batch_size, classes, 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        rng = np.random.RandomState(self.step)
        self.step += 1
        batch = th.from_numpy(rng.uniform(-1, 1, (self.batch_size, 3, 8, 8)).astype(np.float32))
        kwargs = {"y": th.from_numpy(rng.randint(0, self.classes, self.batch_size))} if self.classes else {}
        return batch, kwargs


class SmallModel(th.nn.Module):
    """As little of a network as has a torso in 16 bits, dropout, timesteps and classes."""

    def __init__(self, width=16, dropout=0.0, num_classes=None):
        super().__init__()
        self.width = width
        self.time_embed = th.nn.Linear(width, width)
        self.label_emb = th.nn.Embedding(num_classes, width) if num_classes else None
        self.torso = th.nn.ModuleList([th.nn.Conv2d(3, width, 3, padding=1), th.nn.Conv2d(width, width, 3, padding=1)])
        self.dropout = th.nn.Dropout(dropout)
        self.out = th.nn.Conv2d(width, 6, 1)

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = self.torso[0](x.type(self.torso[0].weight.dtype))
        h = th.nn.functional.silu(h + emb.type(h.dtype)[:, :, None, None])
        return self.out(th.nn.functional.silu(self.torso[1](self.dropout(h))).float())

    def convert_to_fp16(self):
        self.torso.apply(convert_module_to_f16)

    def convert_to_bf16(self):
        self.torso.apply(convert_module_to_bf16)


def small_model(**kwargs):
    return set_golden_weights(SmallModel(**kwargs))


def small_unet(**kwargs):
    return set_golden_weights(UNetModel(3, 32, 6, 1, (1,), channel_mult=(1,), **kwargs))


def small_diffusion(T=20):
    return make_diffusion(T, var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_MSE)


def make_loop(model=None, **kwargs):
    arguments = dict(
        model=model or small_model(), diffusion=small_diffusion(), data=Data(), batch_size=4, microbatch=-1, lr=1e-3,
        ema_rate="0.9", log_interval=1, save_interval=1000, resume_checkpoint="", max_steps=4, seed=0,
    )  # fmt: skip
    return TrainLoop(**{**arguments, **kwargs})


def finished(**kwargs):
    loop = make_loop(**kwargs)
    loop.run_loop()
    return loop


def log_rows(folder):
    with open(folder / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def load(path):
    return th.load(path, weights_only=True)


def assert_same(one, other, path=""):
    """Bit for bit, through dicts and lists."""
    assert type(one) is type(other), path
    if isinstance(one, th.Tensor):
        assert one.dtype == other.dtype and th.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert one == other, path


def assert_sets_equal(folder, other, step):
    """All files of a step are the same in two folders."""
    names = [f"model{step:06d}.pt", f"opt{step:06d}.pt"]
    names += [name for name in os.listdir(folder) if name.startswith("ema_") and name.endswith(f"{step:06d}.pt")]
    assert len(names) > 2
    for name in names:
        assert_same(load(folder / name), load(other / name), name)


def parameters(model):
    return th.cat([p.detach().float().flatten() for p in model.parameters()])


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
        losses.append(loop.meter.read()["loss"])
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
        "model000000.pt", "model000002.pt", "opt000000.pt", "opt000002.pt", "progress.csv",
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


def test_constant_and_linear_and_cosine_rates():
    def rates(schedule, n=10, **kwargs):
        return [learning_rate(step, lr=2.0, schedule=schedule, total_steps=n, **kwargs) for step in range(n + 3)]

    assert rates("constant") == [2.0] * 13
    np.testing.assert_allclose(rates("linear"), [2 * (1 - k / 10) for k in range(10)] + [0] * 3)
    optimizer = th.optim.SGD([th.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates("cosine"), expected + [0] * 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("total", [10, 1000])
def test_one_cycle_is_torchs(total):
    optimizer = th.optim.SGD([th.zeros(1, requires_grad=True)], lr=1.0)
    # torch counts the last step as the end, and we the one after it.
    scheduler = th.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=total + 1, pct_start=(0.3 * total + 1) / (total + 1), div_factor=25,
        final_div_factor=1e4, cycle_momentum=False,
    )  # fmt: skip
    for step in range(total):
        rate = learning_rate(step, lr=0.01, schedule="one-cycle", total_steps=total)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_warm_up_multiplies_the_schedule():
    rates = [learning_rate(k, lr=1.0, schedule="constant", total_steps=0, warmup_steps=4) for k in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    rates = [learning_rate(k, lr=1.0, schedule="linear", total_steps=10, warmup_steps=2) for k in range(3)]
    np.testing.assert_allclose(rates, [0.5, 0.9, 0.8])


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


def parameters_of(loop):
    """The master parameters of a run, flat."""
    return th.cat([p.detach().flatten() for p in loop.master_params])


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
    assert make_loop().lg_loss_scale == 20 and make_loop().loss_scale is None


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
    before = [v.clone() for v in (parameters_of(loop), parameters(loop.model), loop.emas[0].flat)]
    state = {name: value.clone() for name, value in loop.opt.state[loop.master_params[0]].items()}
    loop.loss_scale.lg.fill_(120.0)
    loop.run_step(*next(loop.data))
    assert loop.lg_loss_scale == 119
    for old, new in zip(before, (parameters_of(loop), parameters(loop.model), loop.emas[0].flat)):
        assert th.equal(old, new)
    assert_same(state, dict(loop.opt.state[loop.master_params[0]]))
    assert loop.meter.read()["skipped_steps"] == 0.5
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


def test_other_ranks_write_nothing(out_dir):
    loop = make_loop()
    loop.rank = 1
    loop.save()
    assert not [name for name in os.listdir(out_dir) if name.endswith(".pt")]


# Resuming


def variant(name):
    """What a run of this name is made of, fresh each time."""
    diffusion = small_diffusion(4)
    return {
        "fp32": lambda: {},
        "bf16": lambda: dict(precision="bf16"),
        "fp16": lambda: dict(precision="fp16", fp16_scale_growth=0.1),
        "dropout": lambda: dict(model=small_model(dropout=0.3)),
        "classes": lambda: dict(model=small_model(num_classes=5), data=Data(classes=5)),
        "loss-second-moment": lambda: dict(
            diffusion=diffusion, schedule_sampler=LossSecondMomentResampler(diffusion, 2, 0.01)
        ),
        "annealing": lambda: dict(lr_anneal_steps=6, weight_decay=0.1, lr_warmup_steps=2, grad_clip=1.0),
        "everything": lambda: dict(
            model=small_unet(dropout=0.3, num_classes=5), data=Data(classes=5), precision="fp16", diffusion=diffusion,
            schedule_sampler=LossSecondMomentResampler(diffusion, 2, 0.01), ema_rate="0.5,0.9", microbatch=3,
        ),
    }[name]()  # fmt: skip


VARIANTS = ("fp32", "bf16", "fp16", "dropout", "classes", "loss-second-moment", "annealing", "everything")


@pytest.mark.parametrize("name", VARIANTS)
def test_n_and_n_steps_are_2n_bit_for_bit(tmp_path, name):
    into(tmp_path / "whole")
    finished(**variant(name), max_steps=6)
    into(tmp_path / "half")
    half = finished(**variant(name), max_steps=3)
    into(tmp_path / "rest")
    resumed = str(tmp_path / "half" / "model000003.pt")
    loop = make_loop(**variant(name), max_steps=6, resume_checkpoint=resumed)
    assert loop.absolute_step == 3 and th.equal(parameters_of(loop), parameters_of(half))
    loop.run_loop()
    assert not th.equal(parameters_of(loop), parameters_of(half))
    assert_sets_equal(tmp_path / "whole", tmp_path / "rest", 6)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", ["fp32", "everything"])
def test_a_run_that_was_cut_off_goes_on_after_the_saved_step(tmp_path, name, step):
    into(tmp_path / "whole")
    finished(**variant(name), max_steps=5, save_interval=2)
    into(tmp_path / "rest")
    resumed = str(tmp_path / "whole" / f"model{step:06d}.pt")
    loop = make_loop(**variant(name), max_steps=5, save_interval=2, resume_checkpoint=resumed)
    assert loop.absolute_step == step + 1  # a set is saved after its step
    loop.run_loop()
    assert_sets_equal(tmp_path / "whole", tmp_path / "rest", 4)
    rows = log_rows(tmp_path / "whole")[step + 1 :]
    assert [row["loss"] for row in rows] == [row["loss"] for row in log_rows(tmp_path / "rest")]


def test_what_was_restored_is_logged(tmp_path):
    finished(max_steps=2, use_fp16=True)
    into(tmp_path / "rest")
    make_loop(max_steps=4, use_fp16=True, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    text = (tmp_path / "rest" / "log.txt").read_text()
    assert "after 2 steps: restored model, EMA 0.9, optimizer, loss_scale" in text


def test_a_finished_run_that_is_resumed_writes_nothing(tmp_path):
    finished(max_steps=2)
    into(tmp_path / "rest")
    finished(max_steps=2, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    assert not [name for name in os.listdir(tmp_path / "rest") if name.endswith(".pt")]


@pytest.mark.parametrize("name", ["opt000002.pt", "ema_0.9_000002.pt", "model000002.pt"])
def test_a_missing_part_is_named(out_dir, name):
    finished(max_steps=2)
    os.remove(out_dir / name)
    with pytest.raises(UserError) as error:
        make_loop(resume_checkpoint=str(out_dir / "model000002.pt"))
    assert str(out_dir / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["opt000002.pt", "ema_0.9_000002.pt", "model000002.pt"])
def test_a_damaged_part_is_named(out_dir, name):
    finished(max_steps=2)
    data = (out_dir / name).read_bytes()
    (out_dir / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        make_loop(resume_checkpoint=str(out_dir / "model000002.pt"))


def test_a_set_of_another_model_or_precision_is_named(out_dir):
    finished(max_steps=2)
    resumed = str(out_dir / "model000002.pt")
    with pytest.raises(UserError, match=r"model000002\.pt does not fit.*"):
        make_loop(model=small_model(width=32), resume_checkpoint=resumed)
    with pytest.raises(UserError, match=r"opt000002\.pt does not fit.*--precision"):
        make_loop(precision="bf16", resume_checkpoint=resumed)
    with pytest.raises(UserError, match=r"ema_0\.99_000002\.pt is missing"):
        make_loop(ema_rate="0.9,0.99", resume_checkpoint=resumed)


def test_data_that_cannot_seek_are_warned_of(tmp_path):
    finished(max_steps=2)
    into(tmp_path / "rest")
    data = itertools.repeat((th.zeros(4, 3, 8, 8), {}))
    make_loop(data=data, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    assert "no seek" in (tmp_path / "rest" / "log.txt").read_text()


def test_published_optimizer_states_resume(tmp_path):
    """A set written by other code: plain state dicts, and the state of a plain torch.optim.AdamW."""
    into(tmp_path / "whole")
    whole = finished(max_steps=5, weight_decay=0.05, **STEADY)
    into(tmp_path / "published")
    loop = make_loop(max_steps=3, weight_decay=0.05, **STEADY)
    plain = th.optim.AdamW(loop.model.parameters(), lr=1e-3, weight_decay=0.05, eps=1e-4)
    loop.opt.step = lambda: plain.step()
    average = [p.detach().clone() for p in loop.model.parameters()]
    for step in range(3):
        loop.step = step
        loop.run_step(*next(loop.data))
        for a, p in zip(average, loop.model.parameters()):
            a.mul_(0.9).add_(p.detach(), alpha=0.1)
    folder = tmp_path / "published"
    state = plain.state_dict()
    assert set(state) == {"state", "param_groups"}
    th.save(loop.model.state_dict(), folder / "model000003.pt")
    th.save(state, folder / "opt000003.pt")
    names = [name for name, _ in loop.model.named_parameters()]
    th.save(dict(zip(names, average)), folder / "ema_0.9_000003.pt")

    into(tmp_path / "rest")
    resumed = make_loop(max_steps=5, weight_decay=0.05, resume_checkpoint=str(folder / "model000003.pt"), **STEADY)
    assert resumed.absolute_step == 3
    resumed.run_loop()
    th.testing.assert_close(parameters(resumed.model), parameters(whole.model), rtol=1e-4, atol=1e-5)
    th.testing.assert_close(resumed.emas[0].flat, whole.emas[0].flat, rtol=1e-4, atol=1e-5)


def test_published_optimizer_states_of_fp16_resume(tmp_path):
    """There the optimizer has one flat parameter, and nothing else is saved."""
    finished(max_steps=3, use_fp16=True)
    path = tmp_path / "run" / "opt000003.pt"
    state = load(path)
    del state["improved_diffusion"]
    th.save(state, path)
    into(tmp_path / "rest")
    loop = make_loop(max_steps=5, use_fp16=True, resume_checkpoint=str(tmp_path / "run" / "model000003.pt"))
    assert loop.absolute_step == 3 and loop.lg_loss_scale == 20
    assert "loss_scale (it comes from other code)" in (tmp_path / "rest" / "log.txt").read_text()
    loop.run_loop()


def test_a_new_rate_and_decay_win_over_the_saved_ones(tmp_path):
    finished(max_steps=2, lr=1e-3)
    loop = make_loop(lr=5e-4, weight_decay=0.3, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    group = loop.opt.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.3)


def test_find_resume_checkpoint_may_be_replaced(out_dir, monkeypatch):
    assert find_resume_checkpoint() is None
    finished(max_steps=2)
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: str(out_dir / "model000002.pt"))
    assert make_loop().absolute_step == 2


# How a run ends


def test_max_steps_and_anneal_steps_end_the_run():
    assert finished(max_steps=3).absolute_step == 3
    assert finished(max_steps=0, lr_anneal_steps=2).absolute_step == 2


def test_max_hours_end_the_run(out_dir):
    loop = finished(max_steps=0, max_hours=1e-9, log_interval=3)
    assert loop.absolute_step == 1 and "model000000.pt" in os.listdir(out_dir)
    loop = make_loop(max_steps=0, max_hours=1.0, log_interval=2)
    loop.hooks = [(4, lambda loop: setattr(loop, "started", loop.started - 3601))]
    loop.run_loop()
    assert loop.absolute_step == 5 and "model000005.pt" in os.listdir(out_dir)  # at the next row of the log


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
    with pytest.raises(KeyboardInterrupt, match=r"model000002\.pt; --resume auto"):
        loop.run_loop()
    loop = make_loop(hooks=[(0, interrupt)])  # an interval of 0: never
    loop.run_loop()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_that_are_never_finite_stop_the_run_with_a_message(out_dir, precision):
    class Broken(Data):
        def __next__(self):
            batch, kwargs = super().__next__()
            return (batch * math.nan if self.step > 2 else batch), kwargs

    loop = make_loop(data=Broken(), precision=precision, max_steps=100)
    before = []
    loop.hooks = [(2, lambda loop: before.append(parameters_of(loop)) if not before else None)]
    if precision == "fp16":
        with pytest.raises(UserError):  # the scale falls first, for as long as it may help
            loop.run_loop()
        assert loop.absolute_step > 20
    else:
        with pytest.raises(UserError, match=r"not finite.*--lr.*--grad_clip 1.*model000000\.pt"):
            loop.run_loop()
        assert loop.absolute_step == 2
    assert th.equal(parameters_of(loop), before[0])  # no parameter was spoilt


def test_one_bad_batch_is_passed_over(out_dir):
    class Hiccup(Data):
        def __next__(self):
            batch, kwargs = super().__next__()
            return (batch * math.nan if self.step == 2 else batch), kwargs

    diffusion = small_diffusion(2)
    sampler = LossSecondMomentResampler(diffusion, 2, 0.01)
    loop = finished(data=Hiccup(), log_interval=2, max_steps=6, diffusion=diffusion, schedule_sampler=sampler)
    assert th.isfinite(parameters_of(loop)).all() and np.isfinite(sampler.weights()).all()
    assert [float(row["skipped_steps"]) for row in log_rows(out_dir)] == [0, 0.5, 0]


def test_hooks_are_called_at_their_interval():
    calls = []
    hooks = [(2, lambda loop: calls.append(loop.absolute_step)), (5, lambda loop: calls.append("5"))]
    finished(max_steps=6, hooks=hooks)
    assert calls == [1, 3, "5", 5]


# The log


def test_rows_hold_the_published_keys(out_dir):
    finished(max_steps=12, log_interval=4, use_fp16=True)
    rows = log_rows(out_dir)
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    assert [int(row["samples"]) for row in rows] == [4, 20, 36]
    keys = {"step", "samples", "grad_norm", "lg_loss_scale", "lr", "skipped_steps"}
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


def test_quartiles_split_the_losses_by_timestep():
    meter = LossMeter()
    meter.add_losses(8, th.tensor([0, 1, 2, 7, 7]), {"loss": th.tensor([1.0, 3.0, 5.0, 7.0, 9.0])})
    assert meter.read() == {"loss": 5.0, "loss_q0": 2.0, "loss_q1": 5.0, "loss_q3": 8.0}
    assert meter.read() == {}
    meter.add("norm", th.tensor(math.inf), counted=th.tensor(0.0))
    meter.add("norm", th.tensor(3.0), counted=th.tensor(1.0))
    assert meter.read() == {"norm": 3.0}


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
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 1)
    loop.global_batch = 12
    loop.step = 4
    loop.log_step()
    assert logger.getkvs()["samples"] == 60
