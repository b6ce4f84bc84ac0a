"""Stopping and going on: what is restored, and that it changes nothing."""

import itertools
import math
import os

import numpy as np
import pytest
import torch as th
from train_helpers import (
    STEADY,
    Data,
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

from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.training import loop
from improved_diffusion.training.loop import find_resume_checkpoint

pytestmark = pytest.mark.usefixtures("out_dir")


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
    restored = [line.split(":")[0].strip() for line in text.split("resumed after 2 steps\n")[1].splitlines()]
    assert restored == ["model", "optimizer", "loss scale", "bad steps", "EMA 0.9", "data"]


def test_a_finished_run_that_is_resumed_writes_nothing(tmp_path):
    finished(max_steps=2)
    into(tmp_path / "rest")
    finished(max_steps=2, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    assert not [name for name in os.listdir(tmp_path / "rest") if name.endswith(".pt")]
    assert "nothing to do: 2 of --max_steps 2 steps are done" in (tmp_path / "rest" / "log.txt").read_text()


def test_a_finished_run_that_is_resumed_keeps_its_log(tmp_path):
    into(tmp_path / "run")
    finished(max_steps=3, log_interval=5)
    before = (tmp_path / "run" / "progress.csv").read_bytes()
    into(tmp_path / "run")
    finished(max_steps=3, log_interval=5, resume_checkpoint=str(tmp_path / "run" / "model000003.pt"))
    assert (tmp_path / "run" / "progress.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["opt000002.pt", "ema_0.9_000002.pt", "model000002.pt"])
def test_a_missing_part_is_named(out_dir, name):
    finished(max_steps=2)
    os.remove(out_dir / name)
    with pytest.raises(UserError) as error:
        make_loop(strict_resume=True, resume_checkpoint=str(out_dir / "model000002.pt"))
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
        make_loop(ema_rate="0.9,0.99", resume_checkpoint=resumed, strict_resume=True)


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
    th.testing.assert_close(resumed.emas[0].params, whole.emas[0].params, rtol=1e-4, atol=1e-5)


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
    assert "loss_scale (another kind of run saved it)" in (tmp_path / "rest" / "log.txt").read_text()
    loop.run_loop()


def test_a_new_rate_and_decay_win_over_the_saved_ones(tmp_path):
    finished(max_steps=2, lr=1e-3)
    loop = make_loop(lr=5e-4, weight_decay=0.3, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    group = loop.opt.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.3)


def test_find_resume_checkpoint_may_be_replaced(out_dir, monkeypatch):
    assert find_resume_checkpoint() is None
    finished(max_steps=2)
    monkeypatch.setattr(loop, "find_resume_checkpoint", lambda: str(out_dir / "model000002.pt"))
    assert make_loop().absolute_step == 2


TIMES = {"images_per_second", "data_wait", "peak_gib"}  # these columns are no function of the step


def rows_without_times(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in log_rows(folder)]


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["fp32", "everything"])
def test_rows_of_the_log_are_those_of_a_run_that_never_stopped(tmp_path, name, stop):
    """Stopped between two rows, with a checkpoint older than the last row, or right after it."""
    into(tmp_path / "whole")
    finished(**variant(name), max_steps=12, log_interval=4)
    into(tmp_path / "rest")
    finished(**variant(name), max_steps=10, log_interval=4, save_interval=stop)
    saved = tmp_path / "rest" / f"model{stop:06d}.pt"
    into(tmp_path / "rest")
    finished(**variant(name), max_steps=12, log_interval=4, resume_checkpoint=str(saved))
    assert rows_without_times(tmp_path / "rest") == rows_without_times(tmp_path / "whole")
    assert_sets_equal(tmp_path / "whole", tmp_path / "rest", 12)


class Counting:
    """A hook with a state, which writes into the log."""

    name = "counting"

    def __init__(self):
        self.count = 0

    def __call__(self, loop):
        self.count += 1
        logger.logkv("count", self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_hooks_and_what_they_have_logged_since_the_last_row_are_restored(tmp_path):
    into(tmp_path / "whole")
    finished(max_steps=9, log_interval=4, hooks=[(2, Counting())])
    into(tmp_path / "rest")
    finished(max_steps=6, log_interval=4, hooks=[(2, Counting())])
    into(tmp_path / "rest")
    finished(
        max_steps=9,
        log_interval=4,
        hooks=[(2, Counting())],
        resume_checkpoint=str(tmp_path / "rest" / "model000006.pt"),
    )
    assert [row["count"] for row in log_rows(tmp_path / "whole")] == ["", "2", "4"]
    assert rows_without_times(tmp_path / "rest") == rows_without_times(tmp_path / "whole")


def test_a_state_that_could_not_be_read_again_is_not_saved(out_dir):
    hook = Counting()
    hook.count = np.int64(3)
    finished(max_steps=2, hooks=[(9, hook)])
    assert load(out_dir / "opt000002.pt")["improved_diffusion"]["counting"] == {"count": 3}
    hook.count = {1, 2}
    with pytest.raises(TypeError, match="holds a set"):
        make_loop(max_steps=2, hooks=[(9, hook)]).save()


def test_parameters_without_a_gradient_have_no_state_to_resume(tmp_path):
    def model():
        made = small_model()
        made.time_embed.weight.requires_grad_(False)
        return made

    finished(model=model(), max_steps=2)
    into(tmp_path / "rest")
    finished(model=model(), max_steps=4, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))


def test_rows_of_another_interval_are_dropped_as_far_as_they_come_again(tmp_path):
    into(tmp_path / "run")
    finished(max_steps=9, log_interval=2)
    into(tmp_path / "run")
    resumed = str(tmp_path / "run" / "model000009.pt")
    finished(max_steps=20, log_interval=6, resume_checkpoint=resumed)
    steps = [float(row["step"]) for row in log_rows(tmp_path / "run")]
    assert steps == [0, 2, 4, 6, 8, 12, 18, 19]


def test_sums_of_two_ranks_go_on_with_one(out_dir):
    finished(max_steps=3, log_interval=10)
    path = out_dir / "opt000003.pt"
    state = load(path)
    (sums,) = state["improved_diffusion"]["meters"]
    state["improved_diffusion"]["meters"] = [sums, {name: 2 * pair for name, pair in sums.items()}]
    th.save(state, path)
    loop = make_loop(resume_checkpoint=str(out_dir / "model000003.pt"))
    for name, pair in loop.run_log.meter.sums.items():
        th.testing.assert_close(pair, 3 * sums[name])


@pytest.mark.parametrize("name", ["model000002.pt", "ema_0.9_000002.pt"])
def test_a_part_of_another_step_is_named(out_dir, name):
    finished(max_steps=4, save_interval=2)
    os.replace(out_dir / name.replace("2.pt", "4.pt"), out_dir / name)
    with pytest.raises(UserError, match=rf"{name} is from step 4, but .*opt000002\.pt from step 3"):
        make_loop(resume_checkpoint=str(out_dir / "model000002.pt"))


# Files that were changed


def set_in(content, keys, value):
    """Replace what is at the keys; a function of it gives the new value."""
    *front, last = keys
    for key in front:
        content = content[key]
    content[last] = value(content[last]) if callable(value) else value


def expanded(tensor):
    return th.zeros(1).expand(tensor.shape)


def swapped(numbers):
    return [numbers[1], numbers[0], *numbers[2:]]


REST = "improved_diffusion"


@pytest.mark.parametrize(
    "keys, value",
    [
        (["state"], 5),
        (["state"], {99: {}}),
        (["state"], {"a": {}}),
        (["state"], {-1: {"step": 1}}),
        (["state", 0], 5),
        (["state", 0], {}),
        (["state", 0], {"step": 1, "momentum_buffer": th.zeros(3)}),
        (["state", 0, "exp_avg"], expanded),
        (["state", 0, "exp_avg_sq"], lambda moment: moment[:1]),
        (["state", 0, "exp_avg"], lambda moment: moment.long()),
        (["state", 0, "exp_avg"], lambda moment: moment * float("nan")),
        (["state", 0, "exp_avg_sq"], lambda moment: moment - 1),
        (["state", 0, "exp_avg"], 3),
        (["state", 0, "exp_avg"], lambda moment: moment * 0 + 3e38),
        (["state", 0, "exp_avg"], lambda moment: moment * 0 - 1e4),
        (["state", 0, "exp_avg_sq"], lambda moment: moment * 0),
        (["state", 0, "step"], -1),
        (["state", 0, "step"], "a"),
        (["state", 0, "step"], th.tensor(float("inf"))),
        (["state", 0, "step"], th.zeros(3)),
        (["param_groups"], []),
        (["param_groups"], 5),
        (["param_groups", 0], {}),
        (["param_groups", 0, "params"], swapped),
        (["param_groups", 0, "params"], [0]),
        ([REST], 5),
        ([REST, "step"], -1),
        ([REST, "step"], "a"),
        ([REST, "step"], 10**15),
        ([REST, "first_row"], None),
        ([REST, "first_row"], 3),
        ([REST, "first_row"], 10**12),
        ([REST, "meters"], 5),
        ([REST, "meters"], [5]),
        ([REST, "meters"], [{"loss": th.zeros(10**4)}]),
        ([REST, "meters"], [{"loss": th.tensor([math.nan, 1.0])}]),
        ([REST, "meters"], [{"loss": th.tensor([1.0, math.inf])}]),
        ([REST, "meters"], [{"loss": th.tensor([1.0, -1.0])}]),
        ([REST, "meters"], [{"loss": th.ones(2)}, {"other": th.ones(2)}]),
        ([REST, "meters"], [{"loss": th.ones(2)}, {}]),
        ([REST, "unwritten_log"], [1]),
        ([REST, "unwritten_log"], {"a": [1]}),
        ([REST, "bad_steps"], 5),
        ([REST, "bad_steps", "counts"], th.zeros(3, dtype=th.int64)),
        ([REST, "bad_steps", "counts"], th.tensor([2**62, 0, 0, 0])),
        ([REST, "bad_steps", "counts"], th.tensor([0, 0, 2**62, 2**62])),
        ([REST, "bad_steps", "counts"], th.tensor([0, 0, 2, 2])),
        ([REST, "loss_scale", "lg"], 10**9),
        ([REST, "loss_scale", "lg"], th.tensor(float("nan"))),
        ([REST, "loss_scale", "lg"], th.zeros(2)),
        ([REST, "schedule_sampler", "loss_history"], lambda history: history[:2]),
        ([REST, "schedule_sampler", "loss_history"], lambda history: history * float("nan")),
        ([REST, "schedule_sampler", "loss_counts"], lambda counts: counts + 9),
        ([REST, "schedule_sampler", "loss_counts"], lambda counts: counts[:2]),
    ],
)
def test_a_state_that_no_run_writes_is_named_before_training(tmp_path, keys, value):
    name = "everything" if keys[1:2] and keys[1] in ("loss_scale", "schedule_sampler") else "fp32"
    finished(**variant(name), max_steps=2)
    path = tmp_path / "run" / "opt000002.pt"
    content = load(path)
    set_in(content, keys, value)
    th.save(content, path)
    into(tmp_path / "rest")
    with pytest.raises(UserError, match=r"opt000002\.pt") as error:
        make_loop(**variant(name), resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_steps_of_older_torch_are_whole_numbers(tmp_path):
    finished(max_steps=2)
    path = tmp_path / "run" / "opt000002.pt"
    content = load(path)
    for entry in list(content["state"].values())[1:]:
        entry["step"] = int(entry["step"])
    th.save(content, path)
    into(tmp_path / "rest")
    loop = make_loop(max_steps=3, resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
    loop.run_loop()
    assert {float(entry["step"]) for entry in loop.opt.state.values()} == {3}


def test_weights_that_are_not_finite_do_not_resume(tmp_path):
    finished(max_steps=2)
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        content = load(tmp_path / "run" / name)
        before = content["time_embed.weight"].clone()
        content["time_embed.weight"][0] = float("nan")
        th.save(content, tmp_path / "run" / name)
        with pytest.raises(UserError, match=rf"{name}.*not finite.*earlier checkpoint"):
            make_loop(resume_checkpoint=str(tmp_path / "run" / "model000002.pt"))
        content["time_embed.weight"] = before
        th.save(content, tmp_path / "run" / name)
