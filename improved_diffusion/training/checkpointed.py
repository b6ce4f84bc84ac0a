"""What a checkpoint holds of a training run, and restoring it bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch as th

from .. import distributed
from ..config import UserError
from ..logs import logger
from .checkpointer import Checkpointer, ResumedSet, Weights
from .hooks import Hook
from .signals import LastSave
from .step import TrainStep
from .train_state import TrainState

NOT_FINITE = "the weights or their averages are not finite"


class CheckpointedStep(TrainStep):
    """A TrainStep that can be saved and resumed."""

    checkpointer: Checkpointer
    last_save: LastSave
    resumed: ResumedSet | None  # what the run has been resumed from
    hooks: list[tuple[int, Hook]]
    _saved_after = -1  # the steps done when the loop last saved
    _postponed = False  # a checkpoint is due, as soon as the weights are fit for one

    def save(self) -> None:
        """Write the checkpoint of the current step, and wait until it is written. Collective.

        Raises UserError where the weights, or an average, are not finite.
        """
        if not self._is_finite():
            raise UserError(NOT_FINITE)
        self._start_saving()
        self.checkpointer.wait()

    def _save_for_loop(self) -> None:
        """`save`, in the background unless somebody has replaced it and may want the files at once.

        In a row of bad steps the checkpoint is put off: it is due after the next good step. Raises Diverged for weights
        that are not finite, which no step can mend.
        """
        problem = next(filter(None, distributed.all_gather_object(self._problem())), None)
        if problem == NOT_FINITE:
            raise self.checkpointer.diverged(f"after {self.steps_done} steps {NOT_FINITE}", self.steps_done)
        if problem and not self._postponed:
            last = self.checkpointer.newest() or "none"
            logger.warn(f"no checkpoint after {self.steps_done} steps: {problem}; last checkpoint: {last}")
        self._postponed = bool(problem)
        if not problem:
            self._saved_after = self.steps_done
            self._call_save()

    def _call_save(self) -> None:
        if getattr(self.save, "__func__", None) is CheckpointedStep.save:
            self._start_saving()
        else:
            self.save()

    def _start_saving(self, alone: bool = False) -> None:
        self.checkpointer.save(self.absolute_step, self.steps_done, self._weights(), self._state(), alone)

    def _description(self) -> Mapping[str, Any]:
        """What the present weights say of themselves besides what all checkpoints of the run do."""
        describe = getattr(self.diffusion, "description", None)
        return describe(self.steps_done) if describe else {}

    def _save_after_error(self) -> None:
        """Save the last whole step, by rank 0 alone: the other ranks may not have come here. A failure is a warning."""
        try:
            if distributed.get_rank() == 0:
                with self.last_save:
                    self._save_alone()
            else:
                self.last_save.wait(self.checkpointer.timeout)
        except Exception as error:
            logger.warn(f"no checkpoint of the last steps before the error: {error}")

    def _save_alone(self) -> None:
        done = self.steps_done
        if self._made and self._whole and self._saved_after != done and not self.checkpointer.writer.has_given_up:
            self.step = done - self.resume_step  # the step is done, whatever should have followed it
            distributed.empty_cache(self.device)
            if problem := self._problem():
                raise UserError(problem)
            if distributed.get_world_size() > 1:
                self._start_saving(alone=True)
            else:
                self._call_save()
            self._saved_after = done
        self.checkpointer.finish(prune=False)

    # What is fit for a checkpoint

    def _problem(self) -> str | None:
        """Why the present weights are not fit for a checkpoint, by what this rank knows. Waits for the device.

        A float16 overflow with a finite loss is no sign of bad weights as long as the loss scale can fall.
        """
        row = self.run_log.bad_row()
        overflow = row and self.use_fp16 and self.run_log.loss_is_finite and self.loss_scale.can_fall
        if row and not overflow:
            return f"no finite loss and gradient since step {row.first}"
        return None if self._is_finite() else NOT_FINITE

    def _is_finite(self) -> bool:
        """Whether the parameters and their averages are. Waits for the device."""
        params = [*self.master_params, *(part for ema in self.emas for part in ema.parts)]
        largest = [th.linalg.vector_norm(p.detach(), math.inf).float() for p in params if p.numel()]
        return not largest or bool(th.isfinite(th.stack(largest)).all())

    def _weights(self) -> Iterator[Weights]:
        facts = self._description()
        yield "", self._master_params_to_state_dict(self.master_params), facts
        for ema in self.emas:
            yield ema.label, self._master_params_to_state_dict(ema.params), {**facts, **ema.description}

    def _state(self) -> TrainState:
        parts: dict[str, Any] = {"loss_scale": self.loss_scale} if self.use_fp16 else {}
        parts |= {"schedule_sampler": self.schedule_sampler, "bad_steps": self.run_log.bad_steps}
        parts |= {hook.name: hook for _, hook in self.hooks if hasattr(hook, "name")}
        return TrainState(self.opt, self.run_log, parts)

    def write_model(self, name: str, params: Sequence[th.Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the given parameters, or averages, to a file beside the checkpoints, together with the next one."""
        self.checkpointer.save_beside(name, self.steps_done, self._master_params_to_state_dict(params), metadata)

    def _load_optimizer_state(self) -> None:
        """Restore the optimizer and what else its file holds; a loop that resumes calls it."""
        assert self.resumed is not None
        self.resumed.load_state(self._state(), self.lr)
        self.resume_step = self.resumed.done

    def _load_ema_parameters(self, rate: float | str) -> Sequence[th.Tensor]:
        """The stored average of a rate (or other label), or the current parameters where there is none."""
        assert self.resumed is not None
        state_dict = self.resumed.load_average(self.model, rate)
        return self.master_params if state_dict is None else self._state_dict_to_master_params(state_dict)
