"""What a checkpoint holds of a training run, and restoring it bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch as th

from .checkpointer import Checkpointer, ResumedSet, Weights
from .hooks import Hook
from .step import TrainStep
from .train_state import TrainState


class CheckpointedStep(TrainStep):
    """A TrainStep that can be saved and resumed."""

    checkpointer: Checkpointer
    resumed: ResumedSet | None  # what the run has been resumed from
    hooks: list[tuple[int, Hook]]
    _saved_after = -1  # the steps done when the loop last saved

    def save(self) -> None:
        """Write the checkpoint of the current step, and wait until it is written. Collective."""
        self._start_saving()
        self.checkpointer.wait()

    def _save_for_loop(self) -> None:
        """`save`, in the background unless somebody has replaced it and may want the files at once."""
        self._saved_after = self.steps_done
        if getattr(self.save, "__func__", None) is CheckpointedStep.save:
            self._start_saving()
        else:
            self.save()

    def _start_saving(self) -> None:
        self.checkpointer.save(self.absolute_step, self.steps_done, self._weights(), self._state())

    def _weights(self) -> Iterator[Weights]:
        yield "", self._master_params_to_state_dict(self.master_params), {}
        for ema in self.emas:
            yield ema.label, self._master_params_to_state_dict(ema.params), ema.description

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
