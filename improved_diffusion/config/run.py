"""Options of every command."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, UserError, extra


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Run."""

    seed: int = extra(0, "random seed")
    out_dir: str = extra("", "output folder; empty: ./runs/<name>")
    start_timeout: float = extra(180.0, "seconds that a rank waits at the start for the other ranks")
    collective_timeout: float = extra(24.0, "hours that a collective operation between ranks may take")
    hang_timeout: float = extra(
        600.0, "seconds that loading a batch, or one training step, may take; then the run ends with a message"
    )

    def validate(self) -> None:
        self.require(self.seed >= 0, "seed", "must not be negative")
        self.require(self.seed < 2**62, "seed", "must be less than 2**62")  # samples take the numbers that follow
        for name in ("start_timeout", "collective_timeout", "hang_timeout"):
            self.require(getattr(self, name) > 0, name, "must be positive")
        if "://" in self.out_dir:
            raise UserError(
                f"--out_dir {self.out_dir} must be a local folder: DIFFUSION_BLOB_LOGDIR puts checkpoints elsewhere"
            )
