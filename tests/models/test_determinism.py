"""--deterministic: what it sets, that nothing is set without it, and what is said of operations that it refuses."""

import os

import pytest
import torch as th
from script_helpers import write_images
from train_helpers import assert_sets_equal, into, make_loop, small_model

import improved_diffusion as idf
from improved_diffusion.config import SpeedConfig, TrainSpeedConfig, UserError
from improved_diffusion.models.acceleration import accelerate
from improved_diffusion.models.determinism import WORKSPACE_VARIABLE, be_deterministic, refusals_explained


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """torch's settings are as before afterwards."""
    cudnn, before = th.backends.cudnn, (th.are_deterministic_algorithms_enabled(), th.backends.cudnn.deterministic)
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    yield
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    cudnn.benchmark = False
    on, cudnn.deterministic = before
    th.use_deterministic_algorithms(on)


def switches():
    return th.are_deterministic_algorithms_enabled(), th.backends.cudnn.deterministic, th.backends.cudnn.benchmark


def test_without_the_option_torchs_settings_stay():
    for on in (False, True):
        th.use_deterministic_algorithms(on, warn_only=on)
        th.backends.cudnn.deterministic = th.backends.cudnn.benchmark = on
        accelerate(small_model(), SpeedConfig())
        assert switches() == (on, on, on) and th.is_deterministic_algorithms_warn_only_enabled() == on
        assert WORKSPACE_VARIABLE not in os.environ


def test_the_option_makes_torch_deterministic_and_strict():
    th.use_deterministic_algorithms(True, warn_only=True)
    th.backends.cudnn.benchmark = True
    model = small_model()
    assert accelerate(model, SpeedConfig(deterministic=True)) is model
    assert switches() == (True, True, False) and not th.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("given, expected", [(None, ":4096:8"), (":4096:8", ":4096:8"), (":16:8", ":16:8")])
def test_a_workspace_of_the_users_stays(given, expected, monkeypatch):
    if given:
        monkeypatch.setenv(WORKSPACE_VARIABLE, given)
    be_deterministic(th.device("cuda"))
    assert os.environ[WORKSPACE_VARIABLE] == expected


@pytest.mark.parametrize("given", [":4096:2:16:8", "", ":0:0"])
def test_a_workspace_that_is_not_deterministic_is_named(given, monkeypatch):
    monkeypatch.setenv(WORKSPACE_VARIABLE, given)
    with pytest.raises(UserError, match=f"--deterministic.*{WORKSPACE_VARIABLE}"):
        be_deterministic(th.device("cuda"))
    assert switches() == (False, False, False)
    be_deterministic(th.device("cpu"))  # has no use for it


def test_it_contradicts_timing_algorithms():
    for kind in (SpeedConfig, TrainSpeedConfig):
        with pytest.raises(UserError, match="--cudnn_benchmark"):
            kind(deterministic=True, cudnn_benchmark=True)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    for name, steps, resume in (("whole", 4, ""), ("half", 2, ""), ("half", 4, "model000002.pt")):
        into(tmp_path / name)
        start = resume and str(tmp_path / name / resume)
        speed = TrainSpeedConfig(deterministic=True)
        make_loop(model=small_model(dropout=0.1), max_steps=steps, speed=speed, resume_checkpoint=start).run_loop()
    assert_sets_equal(tmp_path / "whole", tmp_path / "half", 4)


# Operations without a deterministic form


def refused():
    """What torch refuses on a CPU too."""
    th.use_deterministic_algorithms(True)
    th.zeros(3).put_(th.tensor([0, 0]), th.ones(2))


def test_a_refused_operation_is_named_with_the_option():
    with pytest.raises(UserError, match=r"--deterministic.*put_") as caught, refusals_explained():
        refused()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_product_before_the_option_is_explained():
    text = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2."
    )
    with pytest.raises(UserError, match=f"--deterministic.*{WORKSPACE_VARIABLE}=:4096:8"), refusals_explained():
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "error", [RuntimeError("other"), ValueError("x does not have a deterministic implementation"), KeyError(1)]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, refusals_explained():
        raise error
    assert caught.value is error


def test_training_and_sampling_end_with_it(tmp_path):
    tiny = dict(
        image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="8",
        diffusion_steps=30, num_workers=0, batch_size=2, deterministic=True,
    )  # fmt: skip
    photos = write_images(tmp_path / "photos", 2)
    model = idf.train(photos, out_dir=str(tmp_path / "run"), max_steps=1, **tiny)
    hooks = th.nn.modules.module
    handle = hooks.register_module_forward_pre_hook(lambda module, args: refused())
    try:
        with pytest.raises(UserError, match=r"--deterministic.*put_"):
            idf.train(photos, out_dir=str(tmp_path / "other"), max_steps=1, **tiny)
        with pytest.raises(UserError, match=r"--deterministic.*put_"):
            model.sample(1, steps=2, deterministic=True)
    finally:
        handle.remove()
    log = (tmp_path / "other" / "log.txt").read_text()
    assert "put_" in log and "Traceback" not in log
