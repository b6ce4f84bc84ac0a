"""TensorBoard and Weights & Biases as outputs of the logger. Their failures never end a run."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import distributed
from ..config import UserError
from ..utils import files
from . import logger


def make_trackers(names: Sequence[str], run_dir: str, config: Mapping[str, Any], resume_step: int = 0) -> list[Any]:
    """The named trackers, for logger.add_output; only on rank 0.

    :param names: of config.TRACKERS.
    :param run_dir: the run's folder, in which they keep their files.
    :param config: what W&B shows as the run's options.
    :param resume_step: the first step whose row is still to come.
    Raises UserError for a missing package, and a W&B that cannot be reached or logged in to.
    """
    if distributed.get_rank() != 0:
        return []
    return [TRACKERS[name](run_dir, config, resume_step) for name in names]


def _finite_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, without its step."""
    numbers = {key: float(value) for key, value in row.items() if key != "step" and hasattr(value, "__float__")}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


class Tracker:
    """Base of the trackers: warns once per outage; values that could not be sent are dropped."""

    name = ""

    def __init__(self) -> None:
        self.failing = False
        self.step = 0  # of the last row that had one

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a foreign package that uses the network may raise anything
            if not self.failing:
                self.failing = True
                logger.warn(f"{self.name} failed and gets no values until it works again; the run continues: {error!r}")
        else:
            self.failing = False

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        with self._surviving():
            self.step = int(kvs.get("step", self.step))
            scalars = _finite_scalars(kvs)
            if scalars:
                self._send(scalars, self.step)

    def writeimage(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, C]."""
        with self._surviving():
            self._send_image(name, image, step)

    def close(self) -> None:
        with self._surviving():
            self._finish()

    def _send(self, scalars: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _send_image(self, name: str, image: Any, step: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class TensorBoardOutput(Tracker):
    """Event files in run_dir/tensorboard."""

    name = "TensorBoard"
    FLUSH_SECONDS = 30
    WAITING = 1000  # values on their way to the thread that writes them: with torch's 10, training would wait for it
    PROBE_BYTES = 2**16  # free space needed to start again

    def __init__(self, run_dir: str, config: Mapping[str, Any], resume_step: int = 0):
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from None
        self.make_writer: Callable[..., Any] = SummaryWriter
        self.folder = os.path.join(run_dir, "tensorboard")
        files.make_dirs(self.folder)
        # The resumed run writes the steps from here on again.
        goes_on = any(name.startswith("events.") for name in os.listdir(self.folder))
        try:
            self.writer = self._open(resume_step if goes_on else None)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}: free some space or choose another --out_dir"
            ) from None

    def _open(self, purge_step: int | None) -> Any:
        return self.make_writer(
            self.folder, purge_step=purge_step, flush_secs=self.FLUSH_SECONDS, max_queue=self.WAITING
        )

    def _working_writer(self) -> Any:
        """The writer; a new one with its own file if the last has failed, because its thread has ended."""
        if self.failing:
            probe = os.path.join(self.folder, "probe")  # each failed writer would leave a thread and a file
            files.write_bytes(probe, bytes(self.PROBE_BYTES), durable=False)
            files.remove(probe)
            self.writer = self._open(None)
        return self.writer

    def _send(self, scalars: dict[str, float], step: int) -> None:
        writer = self._working_writer()
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)

    def _send_image(self, name: str, image: Any, step: int) -> None:
        self._working_writer().add_image(name, image, step, dataformats="HWC")

    def _finish(self) -> None:
        if not self.failing:
            self.writer.close()


class WandbOutput(Tracker):
    """A run of Weights & Biases, continued by a resumed run. Uses WANDB_PROJECT and WANDB_MODE=offline."""

    name = "W&B"

    def __init__(self, run_dir: str, config: Mapping[str, Any], resume_step: int = 0):
        super().__init__()
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from None
        self.wandb = wandb
        note = Path(run_dir, "wandb_run.json")
        self.run = self._start(run_dir, config, _read_id(note))
        # Offline and resumed runs count their rows from 0, so the step is the axis of the curves.
        self.run.define_metric("*", step_metric="step")
        files.write_bytes(note, json.dumps({"id": self.run.id, "project": self.run.project}).encode())

    def _start(self, run_dir: str, config: Mapping[str, Any], run_id: str | None) -> Any:
        try:
            with _nobody_to_ask():
                return self.wandb.init(
                    dir=run_dir,
                    project=os.environ.get("WANDB_PROJECT") or "improved_diffusion",
                    name=os.path.basename(os.path.abspath(run_dir)),
                    id=run_id,
                    resume="allow",
                    config=dict(config),
                )
        except Exception as error:  # no key, no network, no service: the classes differ by version
            reason = " ".join(str(error).split()).rstrip(".") or repr(error)
            raise UserError(
                f"W&B does not start: {reason}: run `wandb login` first, set WANDB_MODE=offline to sync later, or "
                "leave wandb out of --trackers"
            ) from None

    def _send(self, scalars: dict[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def _send_image(self, name: str, image: Any, step: int) -> None:
        from PIL import Image

        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)  # W&B has no grey with alpha
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def _finish(self) -> None:
        self.run.finish()


def _read_id(note: Path) -> str | None:
    """The id of the W&B run of this folder, if there is one."""
    if not note.exists():
        return None
    remedy = "remove it to start a new W&B run"
    run_id = files.read_record(note, remedy).get("id")
    if not isinstance(run_id, str) or not re.fullmatch(r"[\w-]{1,128}", run_id):
        raise UserError(f"{note} is damaged: {remedy}")
    return run_id


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Hide the terminal from W&B, which would wait there for a key, on a cluster forever."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(
        f"--trackers {package} needs a package that is missing ({error}): pip install 'improved_diffusion[{package}]'"
    )


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoardOutput, "wandb": WandbOutput}
