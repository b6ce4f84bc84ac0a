"""Options of every command."""

from __future__ import annotations

from dataclasses import dataclass

from .base import LONGEST_WAIT, Config, extra
from .messages import UserError
from .values import path_of


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Run."""

    # Samples take the numbers that follow.
    seed: int = extra(0, "random seed", low=0, high=2**62 - 1)
    out_dir: str = extra("", "output folder; empty: ./runs/<name>", parse=path_of)
    start_timeout: float = extra(180.0, "seconds that a rank waits at the start for the other ranks", high=LONGEST_WAIT)
    collective_timeout: float = extra(
        24.0, "hours that a collective operation between ranks may take", high=LONGEST_WAIT / 3600
    )
    hang_timeout: float = extra(
        600.0,
        "seconds that loading a batch, or one training step, may take; then the run ends with a message",
        high=LONGEST_WAIT,
    )

    def validate(self) -> None:
        for name in ("start_timeout", "collective_timeout", "hang_timeout"):
            self.require(getattr(self, name) > 0, name, "must be positive")
        if "://" in self.out_dir:
            raise UserError(
                f"--out_dir {self.out_dir} must be a local folder: DIFFUSION_BLOB_LOGDIR puts checkpoints elsewhere"
            )
