"""The count of memory without content agrees with what real steps take."""

import json
from pathlib import Path

import pytest

from benchmarks import memory
from improved_diffusion.config.settings import ImageModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its profiler


def small(levels="", **options):
    return ImageModel.of({"image_size": 16, "num_channels": 32, **options, "use_checkpoint": levels == "all"})


@pytest.mark.parametrize("precision, levels, batch", [("fp32", "", 2), ("bf16", "0", 8), ("bf16", "all", 4)])
def test_the_count_is_that_of_a_real_step(precision, levels, batch):
    settings = small(levels, **memory.SMALL[0])
    counted = max(memory.timeline(settings, precision, levels, batch, "cpu"))
    assert counted == pytest.approx(memory.measured(settings, precision, levels, batch), rel=memory.TOLERANCE)


@pytest.mark.parametrize("levels", ["", "0", "all"])
def test_two_numbers_of_images_give_the_peak_of_any(levels):
    settings = small(levels, **memory.SMALL[1])
    peak = memory.peaks(settings, "bf16", levels)
    for batch in (2, 100):
        assert peak(batch) == max(memory.timeline(settings, "bf16", levels, batch, "meta"))
    fits = memory.most_images(peak, 10**9)
    assert peak(fits) <= 10**9 < peak(fits + 1)


def test_more_checkpointing_takes_less():
    peaks = [memory.peaks(small(levels, **memory.SMALL[1]), "bf16", levels)(64) for levels in ("", "0", "0,1", "all")]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0] / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_count_is_what_a_gpu_measured(precision):
    results = Path(memory.__file__).parent / "results" / "speed_NVIDIA_H100_80GB_HBM3.json"
    rows = json.loads(results.read_text())["training"]["rows"]
    (measured,) = (r["peak_bytes"] for r in rows if (r["workload"], r["way"]) == ("cifar10-128", precision))
    counted = memory.peaks(memory.network("cifar10-hybrid", ""), precision, "")(128)
    assert counted == pytest.approx(measured, rel=0.02)
