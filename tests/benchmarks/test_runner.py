"""`python -m benchmarks`: each group measures tiny networks; failures are rows."""

import json
from pathlib import Path

import pytest
import torch as th
from torch import nn

from benchmarks.__main__ import GROUPS, main
from benchmarks.speed import launches
from benchmarks.speed.apart import Elsewhere
from benchmarks.speed.kernels import Profiles, kind_of
from benchmarks.speed.report import Report
from benchmarks.speed.ways import Clock, Way, compare
from benchmarks.speed.workloads import CIFAR10, ON_CPU, QUICK, Workload, parameters
from improved_diffusion import embeddings, fused_norm


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_measures_its_ways_and_writes_them(group, tmp_path, capsys):
    main([group, "--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("speed_*.json")
    found = json.loads(path.read_text())[group]
    assert {"device", "torch", "threads", "date", "title"} <= found.keys()
    measured = "operations" if group == "launches" else "seconds"
    assert found["rows"] and all("error" not in row and row[measured] > 0 for row in found["rows"]), found["rows"]
    printed = capsys.readouterr().out
    assert all(row["way"] in printed for row in found["rows"])


def test_a_step_of_the_cifar10_preset_starts_at_most_900_operations_on_a_gpu():
    before = nn.Dropout.forward, fused_norm.obstacle, embeddings.pays
    whole, network = launches.as_on_a_gpu(Workload("cifar10-2", CIFAR10, 2), num_channels=32)  # its depth counts
    assert network < whole <= 900
    assert before == (nn.Dropout.forward, fused_norm.obstacle, embeddings.pays)
    rows = json.loads((Path(launches.__file__).parents[1] / "results" / "speed_AMD_EPYC.json").read_text())["launches"]
    assert whole in [row["operations"] for row in rows["rows"]]  # what docs/speed.md says


def test_an_unknown_group_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["training", "trainig"])
    assert "'trainig'" in capsys.readouterr().err


def test_what_is_not_measured_again_stays(tmp_path):
    report = Report(tmp_path / "speed.json")
    report.begin("other", "first")
    report.add({"workload": "a", "way": "x", "seconds": 1.0}, {"workload": "b", "way": "x", "seconds": 2.0})
    again = Report(tmp_path / "speed.json")
    again.begin("peak", "another")
    again.begin("other", "first")
    again.add({"workload": "b", "way": "x", "seconds": 3.0})
    groups = json.loads((tmp_path / "speed.json").read_text())
    assert groups.keys() == {"other", "peak"}
    assert [(row["workload"], row["seconds"]) for row in groups["other"]["rows"]] == [("a", 1.0), ("b", 3.0)]


def test_profile_has_the_kinds_of_operations(tmp_path):
    x, weight = th.randn(2, 8, 8, 8), th.nn.Parameter(th.randn(8, 8, 3, 3))

    def call():
        h = th.nn.functional.group_norm(th.nn.functional.conv2d(x, weight, padding=1), 2).flatten(2)
        (h @ h.transpose(1, 2)).softmax(dim=-1).square().sum().backward()

    Profiles(tmp_path / "profile").add("first", call)
    Profiles(tmp_path / "profile").add("second", call)
    profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert profiles.keys() == {"first", "second"}
    assert {"convolutions", "norms", "attention", "matrix products"} <= profiles["first"]["kinds"].keys()
    assert 10 < profiles["first"]["operations"] < 100
    assert "convolutions" in (tmp_path / "profile.txt").read_text()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void at::native::RowwiseMomentsCUDAKernel<float>", "norms"),
        ("triton_red_fused_native_group_norm_silu_3", "norms"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix products"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
        ("aten::convolution_backward", "convolutions"),
    ],
)
def test_kernels_have_kinds(name, kind):
    assert kind_of(name) == kind


# Ways


def steady():
    return lambda: th.ones(8).sum()


def test_a_way_that_fails_is_a_row_and_the_others_go_on():
    def no_compiler():
        raise RuntimeError("no compiler\nhere")

    def memory_is_full():
        raise th.cuda.OutOfMemoryError("CUDA out of memory")

    def fails_later():
        left = iter(range(6))
        return lambda: next(left)

    ways = [Way("first", steady), Way("a", no_compiler), Way("b", memory_is_full), Way("c", fails_later)]
    timings = compare([*ways, Way("last", steady)], Clock(60), most=5, block=0.0)
    assert len(timings[-1].seconds) == 5
    rows = [timing.row(timings[0]) for timing in timings if timing.way.name != "last"]
    assert [row.get("error") for row in rows] == [
        None, r"RuntimeError: no compiler\nhere", "out of memory", "StopIteration: ",
    ]  # fmt: skip


def test_ways_take_turns_and_the_ratio_is_that_of_rounds():
    calls = []
    ways = [Way(name, lambda name=name: lambda: calls.append(name), warm_up=1) for name in "AB"]
    timings = compare(ways, Clock(1), least=3, most=3, block=0.0)
    assert calls[-6:] == list("ABABAB")
    timings[0].seconds, timings[1].seconds = [2.0, 4.0, 9.0], [1.0, 2.0, 3.0]
    assert timings[1].row(timings[0])["ratio"] == 2.0


def test_a_way_without_time_is_left_out():
    timings = compare([Way("first", steady), Way("second", steady, needs=100)], Clock(5), least=2, most=2)
    assert [bool(timing.error) for timing in timings] == [False, True]


def test_switches_of_one_way_do_not_reach_the_others():
    seen = []

    def fast():
        th.backends.cudnn.benchmark = True
        return lambda: seen.append(("fast", th.backends.cudnn.benchmark))

    def plain():
        return lambda: seen.append(("plain", th.backends.cudnn.benchmark))

    compare([Way("fast", fast), Way("plain", plain)], Clock(1), least=2, most=2, block=0.0)
    assert set(seen) == {("fast", True), ("plain", False)}
    assert th.backends.cudnn.benchmark is False


@pytest.mark.parametrize("workload", ON_CPU, ids=lambda workload: workload.name)
def test_floating_point_operations_are_those_of_a_forward_and_a_backward_pass(workload):
    assert 2.9 < workload.training_flops / workload.forward_flops < 3.05


def test_a_way_may_run_in_a_process_of_its_own():
    """It answers each call, with the memory that it takes; what fails in it is said."""
    (workload,) = QUICK
    call = Elsewhere(workload.name, "fp32")
    assert call.peak > parameters(workload.model()) * 4
    for _ in range(2):
        assert call() is None
    with pytest.raises(RuntimeError, match="StopIteration"):
        Elsewhere(workload.name, "there is none")
