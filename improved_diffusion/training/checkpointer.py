"""The checkpoints of a training run: writing sets in the background, and reading the one to resume from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch as th

from .. import distributed
from ..checkpoints import checkpoint, sets
from ..checkpoints.checkpoint import parse_resume_step_from_filename
from ..config import UserError
from ..logs import logger
from ..utils import files
from .train_state import TrainState

Weights = tuple[
    str, Mapping[str, th.Tensor], Mapping[str, Any]
]  # an average's label ("": the model), state dict, facts


_owners: dict[str, object] = {}  # folder -> which run of this process saves there


def get_blob_logdir() -> str:
    """The folder of the checkpoints: DIFFUSION_BLOB_LOGDIR, else the logger's folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The path of the moving average beside a model's checkpoint, or None where there is none."""
    if main_checkpoint is None:
        return None
    path = _beside(main_checkpoint, checkpoint.ema_name(rate, step))
    return path if files.exists(path) else None


def _beside(main: str, name: str) -> str:
    return files.join(files.folder_of(main), name)


def _holds_models(folder: str) -> bool:
    return any(checkpoint.model_steps(folder))


class Diverged(UserError):
    """The weights of a run are no good, and are not saved."""


class Checkpointer:
    """Writes the sets of a run: modelNNNNNN.pt, ema_LABEL_NNNNNN.pt, optNNNNNN.pt and manifestNNNNNN.json.

    Rank 0 writes; the other ranks only take part in the collectives.
    :param description: of the model, for the checkpoints' metadata.
    :param keep_last, keep_every: which sets to keep, see sets.prune.
    :param timeout: seconds that writing a set may take.
    """

    def __init__(self, description: Mapping[str, Any], keep_last: int, keep_every: int, timeout: float):
        self.folder = get_blob_logdir()
        self.token = object()  # this run, in _owners
        self.resumed_from = ""  # the model's file
        self.description = description
        self.keep_last, self.keep_every, self.timeout = keep_last, keep_every, timeout
        self.writer = sets.SetWriter(self.folder, logger.log, logger.warn, keep_last, keep_every)

    def save(self, step: int, done: int, weights: Iterable[Weights], state: TrainState, alone: bool = False) -> None:
        """Copy a set to host memory and begin to write it, once the one before is written. Collective.

        :param step: the number in the files' names.
        :param done: training steps done.
        :param alone: on rank 0 only, see TrainState.state_dict.
        """
        if not alone:
            self.take_folder()
        with distributed.working("the previous checkpoint to be written", self.timeout):
            self.writer.wait()  # first: host memory may have no room for two
        rest = state.state_dict(done, alone)
        if distributed.get_rank() != 0:
            return
        parts: list[tuple[str, Any]] = []
        for label, state_dict, facts in weights:
            name = checkpoint.ema_name(label, step) if label else checkpoint.model_name(step)
            parts.append((name, checkpoint.describe(state_dict, {**self.description, "step": done, **facts})))
        self.writer.submit(step, done, [*parts, (checkpoint.optimizer_name(step), rest)])

    def save_beside(self, name: str, done: int, state_dict: Mapping[str, th.Tensor], facts: Mapping[str, Any]) -> None:
        """Write a model's file of its own together with the next set."""
        if distributed.get_rank() == 0:
            self.writer.write_beside(name, checkpoint.describe(state_dict, {**self.description, "step": done, **facts}))

    def wait(self) -> None:
        """Wait until the last set is written; a failure is a warning."""
        with distributed.working("the checkpoint to be written", self.timeout):
            self.writer.wait()

    def finish(self, prune: bool = True) -> None:
        """Wait until the last set is written, see SetWriter.finish; a failure raises UserError."""
        with distributed.working("the last checkpoint to be written", self.timeout):
            self.writer.finish(prune)

    def newest(self) -> str | None:
        """The model's file of the newest set that is written, after waiting for the one in progress."""
        self.wait()
        return self.writer.last_saved

    def diverged(self, what: str, since: int) -> Diverged:
        """The error of a run whose weights are no good: those after `since` steps failed."""
        newest = self.newest()
        good = self.writer.last_before(since)
        also = f"; {newest} has the weights that failed" if newest != good else ""
        return Diverged(
            f"{what}: resume from the last good checkpoint, {good or 'none'}, with a lower --lr, --grad_clip 1 or "
            f"--precision fp32, and check the data{also}"
        )

    # The folder

    def take_folder(self) -> None:
        """Make the folder this run's. Collective.

        A run that starts afresh where another one of this process has saved gets a folder of its own, and a log there.
        """
        owner = _owners.setdefault(self.folder, self.token)
        if owner is not self.token and self.number_here(self.resumed_from) is None:
            if distributed.from_rank0(_holds_models, self.folder):
                before, shared = self.folder, files.same(self.folder, logger.get_dir())
                logger.configure_anew()
                self.folder = logger.get_dir() if shared else distributed.from_rank0(files.unused, before)
                self.writer.directory = self.folder
                logger.log(f"{before} holds another run of this process: this one is saved in {self.folder}")
            _owners[self.folder] = self.token

    def number_here(self, main: str) -> int | None:
        """The number of the set of modelNNNNNN.pt, if it is in this run's folder, else None."""
        if not main or not files.same(files.folder_of(main), self.folder):
            return None
        return parse_resume_step_from_filename(main)

    def rename_newer(self, main: str) -> None:
        """Rename the sets of this folder that are newer than the one resumed from: --resume auto would find them."""
        number = self.number_here(main)
        if distributed.get_rank() == 0 and number is not None:
            names = sets.rename_newer(self.folder, number)
            if names:
                logger.log(f"renamed newer checkpoints, which now end in .newer: {', '.join(names)}")


class ResumedSet:
    """The set that a run resumes from: modelNNNNNN.pt and the files of the same number beside it.

    :param strict: whether a missing file raises UserError; else it is a warning, and its part starts afresh.
    """

    def __init__(self, main: str, strict: bool):
        self.main, self.strict = main, strict
        self.number = parse_resume_step_from_filename(main)
        self.done = self.number  # training steps done, as the optimizer's file says
        self.opt_path: str | None = None
        self.described_step: int | None = None  # by the model's file
        self.restored = [f"model: {main}"]

    def load_model(self, model: th.nn.Module) -> None:
        """Load the weights. Raises UserError for a file that is missing, damaged or of another model. Collective."""
        state_dict, metadata = checkpoint.load(self.main, names=model.state_dict().keys())
        checkpoint.load_into(model, state_dict, self.main)
        self.described_step = metadata.get("step")

    def load_state(self, state: TrainState, lr: float) -> None:
        """Restore the optimizer and all that is in its file; see TrainState.load_state_dict. Collective."""
        self.opt_path = self._find(checkpoint.optimizer_name(self.number), "the optimizer's state")
        if self.opt_path is None:
            return
        content = distributed.load_state_dict(self.opt_path, map_location="cpu")
        self.done, parts = state.load_state_dict(content, self.opt_path, self.number, lr)
        self._check_step(self.main, self.described_step)
        self.restored.append(f"optimizer: {self.opt_path}")
        self.restored += [f"{name.replace('_', ' ')}: in the same file" for name in parts]

    def load_average(self, model: th.nn.Module, label: float | str) -> dict[str, th.Tensor] | None:
        """The state dict of a moving average, None where it is missing and need not be there. Collective."""
        path = self._find(checkpoint.ema_name(label, self.number), "the moving average")
        if path is None:
            return None
        state_dict, metadata = checkpoint.load(path, names=model.state_dict().keys())
        checkpoint.check_fits(model, state_dict, path)
        self._check_step(path, metadata.get("step"))
        self.restored.append(f"EMA {label}: {path}")
        return state_dict

    def _find(self, name: str, what: str) -> str | None:
        if self.strict:
            return distributed.from_rank0(checkpoint.find_in_set, self.main, name, what)
        path = _beside(self.main, name)
        if distributed.from_rank0(files.exists, path):
            return path
        logger.warn(f"{path} is missing: {what} starts afresh from the weights of {self.main}")
        return None

    def _check_step(self, path: str, step: int | None) -> None:
        if self.opt_path is not None and step not in (None, self.done):
            raise UserError(
                f"{path} is from step {step}, but {self.opt_path} from step {self.done}: they are of different saves; "
                "resume from another checkpoint"
            )

    def log(self, first_row: int) -> None:
        """Say what was restored, part by part."""
        lines = [*self.restored, f"data: from step {self.done} on; log: from the row of step {first_row} on"]
        logger.log(f"resumed after {self.done} steps\n" + "\n".join(f"  {line}" for line in lines))
