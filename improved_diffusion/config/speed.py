"""How a network runs: what changes time and memory, and of the results at most the last bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Config, extra
from .messages import UserError
from .values import comma_list, plain_text, str2bool, whole_number

COMPILE_MODES = ("off", "blocks", "model")
MEMORY_FORMATS = ("contiguous", "channels_last")
NORM_PRECISIONS = ("fp32", "mixed")
TF32 = ("convolutions", "all", "none")


def _or_switch(on: str, off: str) -> Callable[[Any], str]:
    """What reads a text, or a truth value that stands for one of two. Raises ValueError for anything else."""

    def parse(value: Any) -> str:
        try:
            return on if str2bool(value) else off
        except ValueError:
            return plain_text(value)

    return parse


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(Config):
    """Speed options."""

    compile: str = extra(
        "off",
        "torch.compile: blocks (each kind of block by itself, minutes at the first start) or model (all at once, much "
        "longer to compile); rounds differently, and dropout draws other masks",
        choices=COMPILE_MODES,
        parse=_or_switch("blocks", "off"),
        bare="blocks",
    )
    memory_format: str = extra(
        "contiguous",
        "layout of images and convolutions in memory; channels_last is what GPUs' 16-bit convolutions take, and group "
        "norms have kernels for it, which need the package triton; it rounds differently, and on CPUs dropout draws "
        "other masks",
        choices=MEMORY_FORMATS,
    )
    norm_precision: str = extra(
        "fp32",
        "group norms of bf16 and fp16 on GPUs; mixed: they read and write 16 bits and round each group's mean and "
        "deviation to them, with sums in fp32: a third of the memory traffic; of no use with compile or channels_last",
        choices=NORM_PRECISIONS,
    )
    tf32: str = extra(
        "convolutions",
        "what NVIDIA GPUs may compute in fp32 with inputs rounded to 10 bits (TF32), which is faster: all, none, or "
        "convolutions, as torch does by itself",
        choices=TF32,
        parse=_or_switch("all", "none"),
        bare="all",
    )
    cudnn_benchmark: bool = extra(
        False,
        "cuDNN times its algorithms and takes the fastest; which one wins may differ between starts, so a resumed run "
        "then continues with other last bits",
    )
    cuda_graphs: bool = extra(
        False,
        "record the network's launches on an NVIDIA GPU once and repeat them: faster where the host is the limit, as "
        "with small batches; takes more memory",
    )
    deterministic: bool = extra(
        False,
        "on GPUs, kernels that add in one order, so that a resumed run has the bits of one that never stopped; slower, "
        "and an operation that has no such kernel is an error",
    )

    def validate(self) -> None:
        super().validate()
        if self.deterministic and self.cudnn_benchmark:
            raise UserError(
                "--cudnn_benchmark may choose other kernels at each start, which contradicts --deterministic: give one "
                "of them"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSpeedConfig(SpeedConfig):
    """Speed options."""

    checkpoint_levels: str = extra(
        "",
        "activation checkpointing on these levels only, comma-separated, 0 the one of full size: less memory, more "
        "time; --use_checkpoint takes all levels",
    )

    def validate(self) -> None:
        super().validate()
        if any(level < 0 for level in self.levels):
            raise UserError(f"--checkpoint_levels {self.checkpoint_levels}: levels are 0 and up")
        if self.cuda_graphs and self.checkpoint_levels:
            raise UserError("--cuda_graphs cannot record activation checkpointing: leave out --checkpoint_levels")

    @property
    def levels(self) -> list[int]:
        """The levels with activation checkpointing."""
        try:
            return comma_list(self.checkpoint_levels, whole_number)
        except ValueError:
            raise UserError(
                f"--checkpoint_levels {self.checkpoint_levels}: expected numbers of levels such as 0,1"
            ) from None
