"""What a run will need, before it starts."""

import os

import pytest
from helpers import small_disk
from train_helpers import into, make_loop, small_unet

from improved_diffusion.training.dry_run import (
    _largest_microbatch,
    checkpoint_bytes,
    dry_run,
    set_bytes,
    warn_of_small_disk,
)

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
    batch, cond = next(loop.data)
    monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device: (2**24, 2**24))
    some = _largest_microbatch(loop, batch, cond)
    monkeypatch.setattr("improved_diffusion.distributed.memory_info", lambda device: (2**26, 2**26))
    assert 1 < some < 64 and _largest_microbatch(loop, batch, cond) == pytest.approx(4 * some, abs=4)


def test_three_steps_are_made_and_nothing_is_written(tmp_path):
    into(tmp_path / "run")
    loop = make_loop(max_steps=7200)
    dry_run(loop)
    assert loop.step == 3
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "hours to --max_steps 7,200" in text and "estimated; now 4" in text
    assert sorted(os.listdir(tmp_path / "run")) == ["log.txt"]
