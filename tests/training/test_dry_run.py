"""What a run will need, before it starts, and what it says while one waits."""

import contextlib
import os
import time

import pytest
from helpers import small_disk
from train_helpers import finished, into, make_loop, small_unet

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageDistillation, ImageTraining
from improved_diffusion.training import dry_run as dry_run_module
from improved_diffusion.training import patience
from improved_diffusion.training.dry_run import (
    _estimated_microbatch,
    _estimated_step,
    _OneImage,
    _time_one_image,
    check_memory,
    checkpoint_bytes,
    dry_run,
    set_bytes,
    warn_of_small_disk,
)
from improved_diffusion.training.kinds import task_of

pytestmark = pytest.mark.usefixtures("out_dir")


def test_the_bytes_of_a_set_are_those_of_its_files(tmp_path):
    into(tmp_path / "run")
    loop = make_loop(model=small_unet(), ema_rate="0.9,0.99", ema_sigma_rel="0.1")
    loop.run_step(*next(loop.data))
    loop.save()
    sizes = {name: os.path.getsize(tmp_path / "run" / name) for name in os.listdir(tmp_path / "run") if ".pt" in name}
    whole, snapshots = set_bytes(loop)
    assert sum(sizes.values()) == pytest.approx(whole, rel=0.1)
    assert sizes["ema_sigma_rel0.1_000000.pt"] == pytest.approx(snapshots, rel=0.1)


@pytest.mark.parametrize(
    "kwargs, kept, pruned",
    [
        (dict(max_steps=100, save_interval=10), 11, 0),  # 0, 10, .., 90, and the last
        (dict(max_steps=95, save_interval=10), 11, 0),
        (dict(max_steps=100, save_interval=10, keep_last=2), 2, 9),
        (dict(max_steps=100, save_interval=10, keep_last=2, keep_every=20), 7, 4),  # 0, 20, .., 80, and 90, 100
        (dict(max_steps=0, save_interval=10), 2, 0),
    ],
)
def test_how_many_checkpoints_will_lie_on_the_disk(kwargs, kept, pruned):
    loop = make_loop(ema_sigma_rel="0.1", **kwargs)
    whole, snapshots = set_bytes(loop)
    assert checkpoint_bytes(loop) == (kept, kept * whole + pruned * snapshots)


def test_a_disk_that_is_too_small_is_told_of(monkeypatch):
    with small_disk(200) as disk:
        into(disk / "run")
        warn_of_small_disk(make_loop(max_steps=100, save_interval=10, keep_last=1))
        assert "--keep_last" not in (disk / "run" / "log.txt").read_text()
        warn_of_small_disk(make_loop(max_steps=100, save_interval=10))
        text = (disk / "run" / "log.txt").read_text()
        assert "warning: the run's 11 checkpoints need" in text and "--keep_last" in text


def test_the_largest_microbatch_follows_from_the_memory_of_one_image(monkeypatch):
    loop = make_loop(model=small_unet())
    one = _time_one_image(loop, *next(loop.data))
    monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device: (2**24, 2**24))
    some = _estimated_microbatch(loop, one)
    monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device: (2**26, 2**26))
    assert 1 < some < 64 and _estimated_microbatch(loop, one) == pytest.approx(4 * some, rel=0.2)


def test_three_steps_are_made_and_nothing_is_written(tmp_path):
    into(tmp_path / "run")
    loop = make_loop(max_steps=7200)
    dry_run(loop)
    assert loop.step == 3
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "hours to --max_steps 7,200" in text and "estimated; now 4" in text
    assert [f"step {n} of 3 took" in text for n in (1, 2, 3)] == [True] * 3
    assert sorted(os.listdir(tmp_path / "run")) == ["log.txt"]


@pytest.mark.parametrize("seconds, bytes_each", [(100.0, 1000), (0.01, 2**60)])
def test_what_takes_too_long_or_has_no_memory_is_not_tried(tmp_path, monkeypatch, seconds, bytes_each):
    into(tmp_path / "run")
    monkeypatch.setattr(dry_run_module, "_time_one_image", lambda *args: _OneImage(seconds, bytes_each))
    loop = make_loop(max_steps=7200)
    dry_run(loop)
    assert loop.step == 0
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "; estimated)" in text
    assert ("400 s a step is too slow" in text and "--preset auto" in text) == (seconds > 60)
    assert ("--microbatch 1" in text) == (bytes_each > 2**50)


def test_a_slow_first_pass_is_not_held_against_the_step(monkeypatch):
    loop = make_loop()
    sizes = []
    monkeypatch.setattr(dry_run_module, "_forward_backward", lambda loop, batch, cond, size: sizes.append(size))
    batch, cond = next(loop.data)
    loop.batch_size = 1000
    assert _estimated_step(loop, batch, cond, _OneImage(2.0, 1000), part=64) < 60 and sizes == [1]
    assert _estimated_step(loop, batch, cond, _OneImage(20.0, 1000), part=64) == 20_000 and sizes == [1]


def test_steps_that_turn_out_slow_are_not_repeated(tmp_path, monkeypatch):
    into(tmp_path / "run")
    times = iter(range(0, 10_000, 61))
    monkeypatch.setattr(dry_run_module.time, "perf_counter", lambda: next(times))
    loop = make_loop(max_steps=7200)
    assert dry_run_module._time_steps(loop) == 61 and loop.step == 1


def test_a_long_step_is_spoken_of_while_it_lasts(tmp_path, monkeypatch):
    into(tmp_path / "run")
    monkeypatch.setattr(patience, "SLOW", 0.05)
    with patience.ticking("the first step"):
        time.sleep(0.3)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("the first step: ") >= 2 and text.count("--preset auto") == 1


def test_the_first_step_says_how_long_the_run_takes(tmp_path):
    into(tmp_path / "run")
    finished(max_steps=3)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("the first step took") == 1 and "the remaining 2 take" in text


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (600, "10.0 min"), (9000, "2.5 hours"), (864_000, "10.0 days")])
def test_durations_are_in_the_unit_that_fits(seconds, text):
    assert patience.duration(seconds) == text


@pytest.mark.parametrize(
    "free, total, outcome", [(2**20, 2**20, "error"), (2**20, 2**40, "warning"), (2**39, 2**40, "")]
)
def test_a_network_that_no_memory_holds_is_told_of_before_it_is_made(tmp_path, monkeypatch, free, total, outcome):
    into(tmp_path / "run")
    monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device: (free, total))
    task = task_of(ImageTraining.of(dict(image_size=32, num_channels=64)))
    with pytest.raises(UserError, match="parameters") if outcome == "error" else contextlib.nullcontext():
        check_memory(task, "fp32", averages=1)
    assert ("warning: the network" in (tmp_path / "run" / "log.txt").read_text()) == (outcome == "warning")


@pytest.mark.parametrize("precision, whole, teacher", [("fp32", 20, 4), ("bf16", 24, 2)])
@pytest.mark.parametrize("options, is_kept", [
    ({}, False), (dict(guidance_scale=2, class_cond=True), True), (dict(method="progressive"), True),
])  # fmt: skip
def test_a_teacher_that_stays_in_memory_counts(tmp_path, monkeypatch, options, is_kept, precision, whole, teacher):
    into(tmp_path / "run")
    task = task_of(ImageDistillation.of({"image_size": 8, "channel_mult": "1", "num_channels": 32, **options}))
    count = sum(p.numel() for p in task.network().parameters())
    for total, fits in ((whole * count, not is_kept), ((whole + teacher) * count, True)):
        monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device, total=total: (total, total))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="Adam, averages, the teacher"):
            check_memory(task, precision, averages=1)
