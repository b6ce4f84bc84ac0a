"""`python -m benchmarks`: each group measures tiny networks; failures are rows."""

import json

import pytest
import torch as th

from benchmarks.__main__ import GROUPS, main
from benchmarks.speed.kernels import kind_of
from benchmarks.speed.ways import Clock, Way, compare
from benchmarks.speed.workloads import ON_CPU, ON_GPU


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_measures_its_ways_and_writes_them(group, tmp_path, capsys):
    main([group, "--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("speed_*.json")
    found = json.loads(path.read_text())[group]
    assert {"device", "torch", "threads", "date", "title"} <= found.keys()
    assert found["rows"] and all("error" not in row and row["seconds"] > 0 for row in found["rows"]), found["rows"]
    printed = capsys.readouterr().out
    assert all(row["way"] in printed for row in found["rows"])


def test_groups_that_are_not_measured_again_stay(tmp_path):
    (path,) = _measured(tmp_path)
    path.write_text(json.dumps({"other": {"rows": []}}))
    assert json.loads(_measured(tmp_path)[0].read_text()).keys() == {"other", "peak"}


def _measured(folder):
    main(["peak", "--quick", "--device", "cpu", "--out", str(folder)])
    return list(folder.glob("speed_*.json"))


def test_profile_has_the_kinds_of_operations(tmp_path):
    argv = ["training", "--quick", "--device", "cpu", "--out", str(tmp_path), "--ways", "fp32", "--profile", "fp32"]
    main(argv)
    (path,) = tmp_path.glob("profile_*.json")
    (found,) = json.loads(path.read_text())["profiles"].values()
    assert {"convolutions", "norms", "attention", "optimizer"} <= found["kinds"].keys()
    assert found["operations"] > 100
    assert "convolutions" in path.with_suffix(".txt").read_text()


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


@pytest.mark.parametrize("workload", [*ON_CPU, *ON_GPU], ids=lambda workload: workload.name)
def test_floating_point_operations_are_those_of_a_forward_and_a_backward_pass(workload):
    assert 2.9 < workload.training_flops / workload.forward_flops < 3.05
