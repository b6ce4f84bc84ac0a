"""The arithmetic of a step, and the share of the device's peak that it takes."""

import numpy as np
import pytest
import torch as th
from train_helpers import SmallModel, finished, into, log_rows, parameters_of, small_diffusion, small_unet

from improved_diffusion import distributed
from improved_diffusion.training.flops import training_flops

pytestmark = pytest.mark.usefixtures("out_dir")


def counted(model, **cond):
    return training_flops(model, small_diffusion().training_losses, th.zeros(4, 3, 8, 8), cond)


def test_the_flops_of_a_known_network():
    """Two for each product of a weight and an input, and thrice the forward pass."""
    width, pixels = 16, 64
    forward = width * width + pixels * (9 * 3 * width + 9 * width * width + width * 6)
    assert counted(SmallModel(width)) == 3 * 2 * forward
    assert counted(SmallModel(width, num_classes=5), y=th.zeros(4, dtype=th.int64)) == 3 * 2 * forward


def test_neither_precision_nor_recomputation_nor_the_type_of_the_pixels_counts():
    flops = counted(small_unet())
    half = small_unet()
    half.convert_to_bf16()
    assert flops == counted(half) == counted(small_unet(use_checkpoint=True)) > 1e6
    data = th.zeros(4, 3, 8, 8, dtype=th.uint8)
    assert flops == training_flops(half, small_diffusion().training_losses, data, {})


def test_counting_changes_neither_the_network_nor_the_random_numbers():
    model = small_unet(dropout=0.5)
    before, state = [p.clone() for p in model.parameters()], th.get_rng_state()
    counted(model)
    assert all(th.equal(p, old) for p, old in zip(model.parameters(), before))
    assert th.equal(th.get_rng_state(), state)


def test_the_share_of_the_peak_is_in_the_log_where_the_peak_is_known(out_dir, monkeypatch):
    flops = counted(SmallModel())
    monkeypatch.setattr(distributed, "device_peak", lambda device, precision: 1e9)
    finished(max_steps=3)
    for row in log_rows(out_dir):
        assert float(row["mfu"]) == pytest.approx(float(row["images_per_second"]) * flops / 1e9, rel=1e-6)


def test_the_share_of_the_peak_changes_no_weight(monkeypatch):
    """Nor what the global generators give to a run without a seed."""

    def run():
        th.manual_seed(0)
        np.random.seed(0)
        return parameters_of(finished(max_steps=2, seed=None))

    plain = run()
    monkeypatch.setattr(distributed, "device_peak", lambda device, precision: 1e9)
    assert th.equal(run(), plain)


def test_a_network_that_does_not_run_without_values_is_trained_without_the_share(tmp_path, monkeypatch):
    class Looks(SmallModel):
        def forward(self, x, timesteps):
            return super().forward(x, timesteps) + 0 * float(x.flatten()[0])

    monkeypatch.setattr(distributed, "device_peak", lambda device, precision: 1e9)
    into(tmp_path)
    finished(model=Looks(), max_steps=2)
    assert all("mfu" not in row for row in log_rows(tmp_path)) and "no mfu" in (tmp_path / "log.txt").read_text()


def test_a_compiled_network_is_counted_as_it_is():
    model, plain = SmallModel(), counted(SmallModel())
    model.torso[0].compile(backend="eager")
    model.compile(backend="eager")
    assert counted(model) == plain
