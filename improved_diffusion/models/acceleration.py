"""How a network runs fast: compiled, in another memory layout, as CUDA graphs. Training and sampling both use it.

The module itself stays what it is, with its names and hooks: whoever calls it runs it layer by layer. `accelerate`
returns what to call instead. Compiled code and graphs are made for the shapes of the first call; calls of other shapes,
such as a last small batch, run layer by layer too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch as th
from torch import nn

from .. import fused_norm
from ..config import SpeedConfig, UserError, one_line
from ..logs import logger
from ..nn import GroupNorm32
from ..unet import AttentionBlock, Downsample, ResBlock, Upsample
from ..utils import host_memory
from ..utils.downloads import cache_dir
from ..utils.text import counted
from .determinism import be_deterministic

COMPILER = "inductor"  # torch's own
BLOCKS = (ResBlock, AttentionBlock, Upsample, Downsample)  # compiled one by one
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own
# Blocks of each width and size are compiled by themselves. torch stops at 8, without a word, and runs the others plain.
MOST_COMPILED = 1024
_MATMUL = {"all": "high", "none": "highest"}


def accelerate(model: nn.Module, options: SpeedConfig) -> Any:
    """What to call in place of the model: the model itself where the options ask for nothing that replaces calls.

    The model's memory layout changes, and so do torch's settings of TF32, cuDNN and determinism in this process; on a
    CPU the process keeps the memory of freed tensors. Raises UserError for what this machine cannot do.
    """
    _check(model, options, device_of(model))
    _set_arithmetic(options, device_of(model))
    if device_of(model).type == "cpu":
        host_memory.keep_freed()
    if options.memory_format == "channels_last":
        model.to(memory_format=th.channels_last)  # type: ignore[call-overload]
        if device_of(model).type == "cuda" and options.compile == "off":
            _report_norms(device_of(model))
    for module in model.modules():
        if type(module) is GroupNorm32:
            module.in_16_bits = options.norm_precision == "mixed"
    ways: list[Callable[[nn.Module], Any]] = []
    if options.compile != "off":
        _prepare_compiler()
        ways.append(CompiledBlocks if options.compile == "blocks" else CompiledModel)
    if options.cuda_graphs:
        ways.append(CUDAGraphs)
    for way in ways:
        model = way(model)
    return model


@functools.cache
def _report_norms(device: th.device) -> None:
    """Log, once, why group norms on a device lose what channels last gains, if they do."""
    reason = fused_norm.obstacle(device)
    if reason:
        logger.log(f"--memory_format channels_last: group norms copy to the other layout, which is slow: {reason}")


def device_of(model: nn.Module) -> th.device:
    """Where the model's parameters are; the CPU for one that has none."""
    return next((p.device for p in model.parameters()), th.device("cpu"))


def checkpoint_levels(model: nn.Module, levels: Sequence[int]) -> None:
    """Turn on activation checkpointing in the blocks on these levels of a U-Net or an encoder, 0 the one of full size.

    Raises UserError for a level that the model does not have.
    """
    if not levels:
        return
    by_level = _blocks_by_level(model)
    for level in levels:
        if level not in by_level:
            raise UserError(f"--checkpoint_levels {level}: the network has the levels 0 to {len(by_level) - 1}")
        for block in by_level[level]:
            block.use_checkpoint = True


def _blocks_by_level(model: Any) -> dict[int, list[Any]]:
    """The residual and attention blocks on each level; one between two levels counts to the larger."""
    found: dict[int, list[Any]] = {}
    level = 0
    for part in [*model.input_blocks, model.middle_block, *getattr(model, "output_blocks", ())]:
        for layer in part:
            resample = next((module for module in layer.modules() if isinstance(module, (Upsample, Downsample))), None)
            level -= isinstance(resample, Upsample)
            blocks = [module for module in layer.modules() if isinstance(module, (ResBlock, AttentionBlock))]
            found.setdefault(level, []).extend(blocks)
            level += isinstance(resample, Downsample)
    return found


def _set_arithmetic(options: SpeedConfig, device: th.device) -> None:
    """torch's own settings stay where an option has its default."""
    if options.tf32 in _MATMUL:
        th.set_float32_matmul_precision(_MATMUL[options.tf32])
        th.backends.cudnn.allow_tf32 = options.tf32 == "all"
    if options.cudnn_benchmark:
        th.backends.cudnn.benchmark = True
    if options.deterministic:
        be_deterministic(device)


def _check(model: nn.Module, options: SpeedConfig, device: th.device) -> None:
    """Raise UserError for options that this machine or this model cannot do."""
    if options.compile != "off":
        problem = _no_compiler(device)
        if problem:
            raise UserError(f"--compile {options.compile}: {problem}, or leave out --compile")
    if options.cuda_graphs:
        if device.type != "cuda":
            raise UserError(f"--cuda_graphs needs an NVIDIA GPU, but the network is on {device}: leave it out")
        if any(getattr(module, "use_checkpoint", False) for module in model.modules()):
            raise UserError("--cuda_graphs cannot record activation checkpointing: leave out --use_checkpoint")


def _no_compiler(device: th.device) -> str:
    """What torch.compile lacks for a device, and the remedy; empty where nothing is missing."""
    import torch._dynamo

    if not torch._dynamo.is_dynamo_supported():
        return "torch.compile does not support this version of Python: use an older one"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the package triton for GPUs: pip install triton (on Windows, triton-windows)"
    names = ("cc", "gcc", "clang", "cl") if device.type == "cuda" else ("c++", "g++", "clang++", "cl")
    if not (os.environ.get("CC" if device.type == "cuda" else "CXX") or any(map(shutil.which, names))):
        return (
            f"torch.compile needs a {'C' if device.type == 'cuda' else 'C++'} compiler, such as {names[1]}: install one"
        )
    return ""


def _prepare_compiler() -> None:
    """Keep compiled code in our folder, unless the user names one, and let every kind of block be compiled."""
    import torch._dynamo.config
    import torch._inductor.config

    temporary = os.path.join(tempfile.gettempdir(), "torchinductor_")  # what torch chooses, and puts there by itself
    if os.environ.get(CACHE_VARIABLE, temporary).startswith(temporary):
        os.environ[CACHE_VARIABLE] = str(cache_dir() / "compiled")
    torch._inductor.config.fx_graph_cache = True  # off before torch 2.6
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), MOST_COMPILED))
    if th.__version__.startswith("2.4."):
        config.inline_inbuilt_nn_modules = True  # as later ones do: equal blocks share their code


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What compiled code and graphs are made for: the shapes and types of tensors, and whether there are gradients."""
    tensors = (*enumerate(args), *sorted(kwargs.items()))
    shapes = tuple((name, getattr(value, "shape", None), getattr(value, "dtype", None)) for name, value in tensors)
    return (*shapes, th.is_grad_enabled())


class Accelerated(nn.Module):
    """Runs a network in another way for calls like the first one, and as it is for others.

    `paused`: calls run the network as it is, and none of them is the first one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.paused = model, False
        self._first: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        """What the network has: code that extends the published classes asks it for its own attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.paused:
            return self.model(*args, **kwargs)
        called = (*_signature(args, kwargs), self.model.training)
        if self._first is None:
            self._first = called
            return self.first(*args, **kwargs)
        return self.run(*args, **kwargs) if called == self._first else self.model(*args, **kwargs)

    def first(self, *args: Any, **kwargs: Any) -> Any:
        """The first call."""
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """A call like the first one."""
        raise NotImplementedError


@contextlib.contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """In the with statement, networks inside of `model` run as they are: for calls of shapes unlike the real ones."""
    found = [module for module in model.modules() if isinstance(module, Accelerated)]
    for module in found:
        module.paused = True
    try:
        yield
    finally:
        for module in found:
            module.paused = False


class _Compiled(Accelerated):
    """A network that torch.compile compiles, in the first call."""

    what: str

    def first(self, *args: Any, **kwargs: Any) -> Any:
        """Compile, and say how long it took. Raises UserError where torch cannot."""
        import torch._dynamo.exc

        start = time.monotonic()
        logger.log(f"compiling {self.what} ...")
        try:
            with warnings.catch_warnings():  # it asks the blocks' inputs for gradients that they do not keep
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
                result = self.run(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(str(error).partition("\n\n")[0])
            raise UserError(f"--compile: torch.compile failed: {reason}; leave out --compile") from error
        seconds = time.monotonic() - start
        logger.log(f"compiled {self.what} in {seconds:.0f} s; kept in {os.environ[CACHE_VARIABLE]} for the next start")
        return result


class CompiledModel(_Compiled):
    """Compiled as a whole."""

    what = "the network"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.__dict__["compiled"] = th.compile(model, backend=COMPILER, dynamic=False)  # no submodule: the names stay

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)


class CompiledBlocks(_Compiled):
    """Compiled block by block: those of equal shapes share their code, so that it takes a fraction of the time."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
        self.what = counted(len(self.blocks), "block")
        self.compiled = [_compiled_call(block) for block in self.blocks]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self._compiled_blocks():
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        """The blocks run compiled meanwhile."""
        for block, call in zip(self.blocks, self.compiled):
            block.__dict__["_compiled_call_impl"] = call
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["_compiled_call_impl"]


def _compiled_call(block: nn.Module) -> Any:
    """What nn.Module.compile makes the block call, without leaving it there."""
    block.compile(backend=COMPILER, dynamic=False)
    return block.__dict__.pop("_compiled_call_impl")


class CUDAGraphs(Accelerated):
    """The launches of the first call, recorded and repeated: forward and backward where there are gradients.

    The gradients stand in memory that the next backward pass writes over; those that another pass adds to are copied.
    """

    def first(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.model.parameters()).device
        self.names = sorted(kwargs)
        inputs = [value.detach().clone().requires_grad_(value.requires_grad) for value in self._ordered(args, kwargs)]
        named = _Positional(self.model, self.names).train(self.model.training)
        with th.random.fork_rng([device], device_type=device.type):  # trial runs draw nothing from the generators
            record = _record_training if th.is_grad_enabled() else _record_inference
            self.graphed = record(named, inputs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if th.is_grad_enabled():
            _copy_gradients(self.model)
        return self.graphed(*self._ordered(args, kwargs))

    def _ordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[th.Tensor]:
        return [*args, *(kwargs[name] for name in self.names)]


class _Positional(nn.Module):
    """A network whose keyword arguments come last, in the order of their names: graphs take no keywords."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: th.Tensor) -> th.Tensor:
        count = len(args) - len(self.names)
        return self.model(*args[:count], **dict(zip(self.names, args[count:], strict=True)))


def _record_training(network: nn.Module, inputs: list[th.Tensor]) -> Callable[..., th.Tensor]:
    # Recording runs on a stream of its own, which newer versions of torch warn of in every backward pass that follows.
    warn_of_streams = getattr(th.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn_of_streams is not None:
        warn_of_streams(False)
    make: Any = th.cuda.make_graphed_callables  # typed for any callable
    return make(network, tuple(inputs), allow_unused_input=True)


def _record_inference(network: nn.Module, inputs: list[th.Tensor]) -> Callable[..., th.Tensor]:
    stream = th.cuda.Stream()
    stream.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(stream):  # trial runs: libraries allocate and choose their algorithms
        for _ in range(3):
            network(*inputs)
    th.cuda.current_stream().wait_stream(stream)
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        output = network(*inputs)

    def replay(*args: th.Tensor) -> th.Tensor:
        for own, given in zip(inputs, args, strict=True):
            own.copy_(given)
        graph.replay()
        return output.clone()

    return replay


def _copy_gradients(model: nn.Module) -> None:
    """Move the gradients out of the graphs' memory before it is written again: with several microbatches."""
    held = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    if held:
        copies = th._foreach_mul([grad for _, grad in held], 1.0)
        for (p, _), copy in zip(held, copies, strict=True):
            p.grad = copy
