"""What several test files share."""

import contextlib
import importlib
import json
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from improved_diffusion.respace import SpacedDiffusion

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"


def golden(name):
    """The arrays of golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def golden_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def assert_golden(actual, expected):
    """Equal to 1e-12 relative in float64, to 1e-5 absolute and relative in float32, exactly in integers."""
    actual = actual.detach().numpy() if isinstance(actual, th.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(actual, expected)
    elif expected.dtype == np.float64:
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=0)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def stand_in_network(learned_variance):
    """The function of golden/README.md that stands in for a network."""

    def model(x, t, **kwargs):
        t = t.float().view(-1, 1, 1, 1)
        mean_part = 0.6 * th.sin(1.3 * x + 0.01 * t) + 0.2 * x
        return th.cat([mean_part, th.tanh(0.7 * x - 0.003 * t)], dim=1) if learned_variance else mean_part

    return model


def set_golden_weights(model, offset=11):
    """Give every parameter the values that golden/README.md derives from its name."""
    for name, p in model.named_parameters():
        value = 0.08 * np.random.RandomState((zlib.crc32(name.encode()) + offset) % 2**32).standard_normal(p.shape)
        if p.ndim == 1 and name.endswith("weight"):
            value += 1
        p.data.copy_(th.from_numpy(value.astype(np.float32)))
    return model


def make_diffusion(T=10, kept=None, schedule="cosine", mean=ModelMeanType.EPSILON, var=ModelVarType.FIXED_SMALL,
                   loss=LossType.MSE, rescale=False):  # fmt: skip
    return SpacedDiffusion(
        use_timesteps=range(T) if kept is None else kept,
        betas=get_named_beta_schedule(schedule, T),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
        rescale_timesteps=rescale,
    )


def slope(x, y):
    """Of the least-squares line through the points."""
    return np.polyfit(x, y, 1)[0]


def settings_of(script):
    """The settings type of the command that scripts/<script>.py runs."""
    return importlib.import_module(f"improved_diffusion.cli.{script}").COMMAND.settings


@contextlib.contextmanager
def small_disk(kib):
    """A folder on a disk of its own that holds no more than `kib` KiB. Skips the test where it may not be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="small_disk"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
