"""A training run and what it leaves behind."""

import os

import pytest
from filelock import FileLock, Timeout
from script_helpers import write_images

import improved_diffusion as idf
from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.training import signals
from improved_diffusion.training.loop import TrainLoop

TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", attention_resolutions="4",
    diffusion_steps=20, noise_schedule="cosine", num_workers=0, batch_size=2, max_steps=1,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 4)


def is_free(folder):
    """Whether somebody else can claim the folder."""
    try:
        with FileLock(os.path.join(folder, ".lock"), timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.parametrize("error", [None, UserError("a mistake"), RuntimeError("a fault"), KeyboardInterrupt()])
def test_a_run_that_has_ended_holds_nothing(error, photos, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    if error is None:
        idf.train(photos, out_dir=folder, **TINY)
    else:

        def fail(loop):
            assert logger.get_dir() == folder
            raise error

        monkeypatch.setattr(TrainLoop, "run_loop", fail)
        with pytest.raises(type(error)):
            idf.train(photos, out_dir=folder, **TINY)
    assert is_free(folder)
    assert logger.Logger.CURRENT is logger.Logger.DEFAULT


def test_the_folder_is_free_after_a_mistake_before_the_loop(photos, tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(UserError, match="batch_size 100"):
        idf.train(photos, out_dir=folder, **{**TINY, "batch_size": 100})
    assert is_free(folder)


def test_a_running_run_holds_its_folder(photos, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TrainLoop, "run_loop", lambda loop: seen.append(is_free(logger.get_dir())))
    with pytest.raises(UserError, match="holds no checkpoint"):
        idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    assert seen == [False]


def test_a_warning_to_an_earlier_run_does_not_stop_the_next(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_early", signals.SIGNALS[-1])
    assert idf.train(photos, out_dir=str(tmp_path / "run"), **{**TINY, "max_steps": 3}).step == 3


def test_a_moving_average_is_not_taken_for_a_model_that_starts_at_step_0(photos, tmp_path):
    idf.train(photos, out_dir=str(tmp_path / "run"), **TINY)
    average = str(tmp_path / "run/ema_0.9999_000000.pt")
    with pytest.raises(UserError, match=r"ema_0\.9999_000000\.pt .*model000000\.pt"):
        idf.train(photos, out_dir=str(tmp_path / "new"), resume_checkpoint=average, **{**TINY, "max_steps": 2})
