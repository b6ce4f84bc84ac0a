"""Options of every command."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, UserError, extra


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Run."""

    seed: int = extra(0, "random seed")
    out_dir: str = extra("", "output folder; empty: ./runs/<name>")

    def validate(self) -> None:
        self.require(self.seed >= 0, "seed", "must not be negative")
        self.require(self.seed < 2**62, "seed", "must be less than 2**62")  # samples take the numbers that follow
        if "://" in self.out_dir:
            raise UserError(
                f"--out_dir {self.out_dir} must be a local folder: DIFFUSION_BLOB_LOGDIR puts checkpoints elsewhere"
            )
