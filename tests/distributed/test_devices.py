"""Which device a rank gets, without any accelerator at hand: torch's own probes are replaced."""

from types import SimpleNamespace

import pytest
import torch as th

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.distributed import devices, errors
from improved_diffusion.distributed.launchers import Joined


def joined(world_size=1, local_rank=0):
    return Joined(None, local_rank, world_size, local_rank, world_size, "127.0.0.1", 0)


@pytest.fixture(autouse=True)
def own_device(monkeypatch):
    monkeypatch.setattr(devices, "_device", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pretend(monkeypatch, kind, count=4):
    """Torch finds accelerators of a kind; returns the devices that are set as the current one."""
    chosen = []
    module = SimpleNamespace(device_count=lambda: count, set_device=chosen.append)
    accelerator = SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: th.device(kind))
    monkeypatch.setattr(th, "accelerator", accelerator, raising=False)
    monkeypatch.setattr(th, "get_device_module", lambda device: module)
    return chosen


def test_a_lone_process_uses_mps(monkeypatch):
    pretend(monkeypatch, "mps")
    assert devices.choose_device(joined()) == "gloo"
    assert devices.dev() == th.device("mps") and devices.device_name() == "mps"
    devices.check_devices()


@pytest.mark.parametrize("capability, computes", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_nvidia_gpus_compute_in_bfloat16_since_ampere(capability, computes, monkeypatch):
    monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: capability)
    assert distributed.computes_bf16(th.device("cuda:0")) is computes


@pytest.mark.parametrize("computes", [True, False])
def test_processors_compute_in_bfloat16_where_torch_finds_the_instructions(computes, monkeypatch):
    monkeypatch.setattr(th.cpu, "_is_avx512_bf16_supported", lambda: computes, raising=False)
    assert distributed.computes_bf16(th.device("cpu")) is computes


def test_apple_gpus_train_in_float32():
    assert not distributed.computes_bf16(th.device("mps"))


def test_several_ranks_cannot_share_mps(monkeypatch):
    pretend(monkeypatch, "mps")
    with pytest.raises(UserError, match="mps"):
        devices.choose_device(joined(2))


def test_each_rank_gets_a_gpu_of_its_own(monkeypatch):
    chosen = pretend(monkeypatch, "cuda")
    monkeypatch.setattr(th.distributed, "is_nccl_available", lambda: True)
    assert devices.choose_device(joined(4, local_rank=3)) == "cpu:gloo,cuda:nccl"
    assert chosen == [th.device("cuda:3")] and devices.dev() == th.device("cuda:3")


@pytest.mark.parametrize("available", [True, False])
def test_xpus_use_xccl(monkeypatch, available):
    pretend(monkeypatch, "xpu", count=1)
    monkeypatch.setattr(th.distributed, "is_xccl_available", lambda: available, raising=False)
    assert devices.choose_device(joined()) == ("cpu:gloo,xpu:xccl" if available else "gloo")
    if not available:
        with pytest.raises(UserError, match="xpu"):
            devices.choose_device(joined(2))


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_torch_before_its_accelerator_module_is_asked_for_each_kind(monkeypatch, kind):
    monkeypatch.delattr(th, "accelerator", raising=False)
    for each, module in (("cuda", th.cuda), ("xpu", th.xpu), ("mps", th.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda each=each: each == kind)
    assert devices.find_accelerator() == th.device(kind)


def test_an_empty_cuda_visible_devices_means_the_cpu(monkeypatch):
    pretend(monkeypatch, "mps")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.find_accelerator() is None
    assert devices.choose_device(joined()) == "gloo"
    assert devices.dev() == th.device("cpu")


def test_no_float64_reaches_mps(monkeypatch):
    moved = []
    monkeypatch.setattr(th.Tensor, "to", lambda self, device, **kwargs: moved.append((self.dtype, device)))
    for dtype in (th.float64, th.float32, th.int64):
        devices.to_device(th.zeros(2, dtype=dtype), th.device("mps"))
    assert moved == [(dtype, th.device("mps")) for dtype in (th.float32, th.float32, th.int64)]
    devices.to_device(th.zeros(2, dtype=th.float64), "cpu")
    assert moved[-1][0] == th.float64
    assert not devices.has_float64(th.device("mps")) and devices.has_float64(th.device("cuda"))


def test_memory_is_pinned_only_for_copies_in_the_background():
    assert [devices.pins_memory(th.device(kind)) for kind in ("cpu", "mps", "cuda")] == [False, False, True]


def test_mps_answers_without_a_device_argument(monkeypatch):
    calls = []
    mps = SimpleNamespace(
        synchronize=lambda: calls.append("synchronize"),
        driver_allocated_memory=lambda: 30,
        recommended_max_memory=lambda: 100,
    )
    monkeypatch.setattr(th, "mps", mps)
    device = th.device("mps")
    devices.synchronize(device)
    assert calls == ["synchronize"]
    assert devices.memory_info(device) == (70, 100) and devices.peak_memory(device) == 30


def test_the_cpu_has_nothing_to_wait_for():
    device = th.device("cpu")
    devices.synchronize(device)
    devices.empty_cache(device)
    assert devices.memory_info(device) is None
    assert devices.peak_memory(device) > 2**20


def test_a_full_memory_is_told_from_other_errors():
    assert errors.is_out_of_memory(th.cuda.OutOfMemoryError("CUDA out of memory"))
    assert errors.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not errors.is_out_of_memory(RuntimeError("shape mismatch"))


def test_ranks_that_would_share_a_gpu_and_hosts_without_one_are_named(monkeypatch):
    def gathered(*rows):
        monkeypatch.setattr(devices, "all_gather_object", lambda mine: list(rows))

    monkeypatch.setattr(devices, "_visible", lambda: 1)
    gathered(("nodea", "gpu-1"), ("nodeb", "gpu-1"))
    devices.check_devices()
    gathered(("nodea", "gpu-1"), ("nodea", "gpu-1"))
    with pytest.raises(UserError, match="ranks 0 and 1 on nodea"):
        devices.check_devices()
    gathered(("nodea", "gpu-1"), ("nodeb", None))
    with pytest.raises(UserError, match="rank 1 on nodeb"):
        devices.check_devices()


def test_a_rank_alone_synchronizes_no_parameters():
    p = th.ones(2)
    distributed.sync_params([p])  # without a process group
    assert p.tolist() == [1, 1]


@pytest.mark.parametrize("values", [[1.0, 2.0], [3], []])
def test_a_host_copy_of_a_tensor_in_host_memory_is_the_tensor(values):
    tensor = th.tensor(values)
    assert th.equal(distributed.HostCopy(tensor).get(), tensor)


def test_a_host_copy_has_no_gradient():
    assert not distributed.HostCopy(th.ones(2, requires_grad=True) * 2).get().requires_grad
