"""Measures on held-out images while a model trains, and the best model so far."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th

from .. import distributed
from ..bound import BoundSummary, stratified_timesteps
from ..checkpoints.description import is_best
from ..config import UserError
from ..data.dataset import selection
from ..data.low_res import downsample
from ..logs import logger
from ..sampling.noise import SeededNoise
from .hooks import TrainingView

EVALUATIONS = 8  # of the network for each image's bits/dim; the loss needs one more
SEED = 20210218  # of timesteps and noise: not an option, so that the numbers of different runs can be compared
BEST_FILE = "best.pt"


class HeldOutImages:
    """A hook for TrainLoop: measures the model and each moving average on the same images, timesteps and noise.

    The average of least loss so far (the model where there are no averages) is kept as best.pt. A subclass says what is
    measured of a batch, and how that is logged.
    :param diffusion: what the model is trained on.
    :param dataset: images as ImageDataset gives them.
    :param num_images: how many to evaluate, a fixed `selection`; all if there are fewer.
    :param batch_size: images in one forward pass. Like the number of ranks it changes memory use only.
    :param small_size: of super-resolution's low_res; None: the model takes none.
    Raises UserError for images that cannot be read. Collective.
    """

    name = "validation"

    def __init__(
        self, diffusion: Any, dataset: Any, *, num_images: int, batch_size: int, small_size: Any = None
    ) -> None:
        if num_images < 1 or not len(dataset):
            raise UserError(f"--val_images {num_images} of {len(dataset)} images: validation needs at least one")
        if num_images > len(dataset):
            logger.log(f"--val_images {num_images}: validation uses all {len(dataset)} images")
        self.diffusion, self.dataset, self.batch_size, self.small_size = diffusion, dataset, batch_size, small_size
        self.selected = selection(len(dataset), num_images)
        n = self.num_images = len(self.selected)
        self.rng = np.random.default_rng(SEED)
        # One timestep in each of n equal strata, in random order: every quarter of the loss has its share of images.
        self.loss_t = ((self.rng.permutation(n) + self.rng.random(n)) * diffusion.num_timesteps / n).astype(np.int64)
        self.mine = range(distributed.get_rank(), n, distributed.get_world_size())
        self.best: dict[str, Any] | None = None
        for problem in distributed.all_gather_object(self._problem()):
            if problem:
                raise UserError(f"{problem} (an image for validation): repair or remove it")

    def _problem(self) -> str | None:
        """What is wrong with the first of this rank's images that cannot be used."""
        for i in self.mine:
            try:
                self.dataset[self.selected[i]]
            except UserError as error:
                return str(error)
        return None

    def measure(
        self, model: Any, batch: th.Tensor, model_kwargs: dict[str, th.Tensor], numbers: Sequence[int]
    ) -> Sequence[th.Tensor]:
        """The loss and other numbers of each image: tensors [N].

        :param numbers: of the batch's images [N, C, H, W], within `selected`.
        """
        raise NotImplementedError

    def log(self, steps: int, tables: Mapping[str, np.ndarray]) -> None:
        """Log what was measured after so many steps.

        :param tables: the model's numbers under "" and each average's under its label: float64 [num_images, K], one
            column for each tensor of `measure`.
        """
        raise NotImplementedError

    def __call__(self, view: TrainingView, /) -> None:
        """Measure, log, and keep the best. Collective."""
        steps = view.absolute_step + 1
        tables = {label: self._table(view, params) for label, params in view.parameter_sets.items()}
        self.log(steps, tables)
        self._keep_best(view, steps, {label: float(table[:, 0].mean()) for label, table in tables.items()})

    def _table(self, view: TrainingView, params: Sequence[th.Tensor]) -> np.ndarray:
        """What is measured of each image with these parameters: float64 [num_images, K]."""
        mine = [self.mine[start : start + self.batch_size] for start in range(0, len(self.mine), self.batch_size)]
        with view.using(params), th.no_grad():
            parts = [self._rows(view, list(numbers)) for numbers in mine]
        gathered = distributed.all_gather_object(np.concatenate(parts) if parts else None)
        rows = [part for part in gathered if part is not None]
        # In the images' order: sums do not depend on the ranks.
        table = np.empty((self.num_images, *rows[0].shape[1:]), rows[0].dtype)
        for rank, part in enumerate(rows):
            table[rank :: len(gathered)] = part
        return table

    def _rows(self, view: TrainingView, numbers: list[int]) -> np.ndarray:
        columns = self.measure(view.model, *self._batch(view, numbers), numbers)
        return np.stack([column.cpu().double().numpy() for column in columns], axis=1)

    def _batch(self, view: TrainingView, numbers: list[int]) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """(images, what the network takes besides), on the device."""
        batch, kwargs = th.utils.data.default_collate([self.dataset[i] for i in self.selected[numbers]])
        batch = batch.to(view.device)
        kwargs = {key: value.to(view.device) for key, value in kwargs.items()}
        if self.small_size is not None:
            kwargs["low_res"] = downsample(batch, self.small_size)
        return batch, kwargs

    def noise_of(self, numbers: Sequence[int]) -> SeededNoise:
        """The noise of images with these numbers within `selected`: the same at every evaluation."""
        return SeededNoise(SEED, self.selected[list(numbers)])

    def losses(
        self,
        model: Any,
        batch: th.Tensor,
        model_kwargs: dict[str, th.Tensor],
        numbers: Sequence[int],
        noise: th.Tensor,
    ) -> dict[str, th.Tensor]:
        """The training losses [N], each image at its own timestep."""
        t = th.from_numpy(self.loss_t[numbers]).to(batch.device)
        return self.diffusion.training_losses(model, batch, t, model_kwargs=model_kwargs, noise=noise)

    # The best

    def _keep_best(self, view: TrainingView, steps: int, losses: Mapping[str, float]) -> None:
        params = dict(view.parameter_sets)
        if len(params) > 1:
            del params[""]
        label = min(params, key=lambda label: _or_infinity(losses[label]))
        if _or_infinity(losses[label]) >= (self.best["val_loss"] if self.best else math.inf):
            return
        self.best = {"val_loss": losses[label], "step": steps, "ema": label}
        view.write_model(BEST_FILE, params[label], {"best": self.best})

    @property
    def _identity(self) -> dict[str, int]:
        """Tells sets of images apart, as far as their numbers do."""
        selected = np.asarray(self.selected, dtype=np.int64)
        return {"images": self.num_images, "of": len(self.dataset), "selected": zlib.crc32(selected.tobytes())}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {"best": self.best, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore a state_dict; a best that was measured on other images does not count."""
        if state["best"] is not None and not is_best(state["best"]):
            raise ValueError("its best is not a loss, a step and an average")
        if {key: value for key, value in state.items() if key != "best"} == self._identity:
            self.best = state["best"]
        elif state["best"]:
            logger.log(f"validation on other images than before: {BEST_FILE} starts afresh")


class Validation(HeldOutImages):
    """Loss and bits/dim of a diffusion model on held-out images.

    Logs `val_loss`, `val_bpd` and its standard error over the images `val_bpd_se`, and the same of each average with
    `_ema_LABEL` after val_loss and val_bpd.
    """

    def __init__(self, diffusion: Any, dataset: Any, **kwargs: Any) -> None:
        super().__init__(diffusion, dataset, **kwargs)
        count = min(EVALUATIONS, diffusion.num_timesteps)
        offsets = self.rng.random(self.num_images)
        self.bound_t, self.weights = stratified_timesteps(diffusion.num_timesteps, count, offsets)

    def measure(
        self, model: Any, batch: th.Tensor, model_kwargs: dict[str, th.Tensor], numbers: Sequence[int]
    ) -> Sequence[th.Tensor]:
        """The loss and bits/dim [N] of each image."""
        draw = self.noise_of(numbers)
        losses = self.losses(model, batch, model_kwargs, numbers, draw(batch))
        bound = self.diffusion.calc_bpd_loop(
            model, batch, clip_denoised=True, model_kwargs=model_kwargs, noise_fn=draw,
            timesteps=th.from_numpy(self.bound_t[numbers]).to(batch.device),
            weights=distributed.to_device(th.from_numpy(self.weights[numbers]), batch.device),
        )  # fmt: skip
        return losses["loss"], bound["total_bpd"]

    def log(self, steps: int, tables: Mapping[str, np.ndarray]) -> None:
        losses = {label: float(table[:, 0].mean()) for label, table in tables.items()}
        bounds = {label: BoundSummary(table[:, 1], {}) for label, table in tables.items()}
        for label, bound in bounds.items():
            suffix = f"_ema_{label}" if label else ""
            logger.logkv(f"val_loss{suffix}", losses[label])
            logger.logkv(f"val_bpd{suffix}", bound.mean)
            if self.num_images > 1:
                logger.logkv(f"val_bpd{suffix}_se", bound.standard_error)
        loss_text = with_averages({label: f"{loss:.4g}" for label, loss in losses.items()})
        bound_text = with_averages({label: _plus_minus(bound) for label, bound in bounds.items()})
        logger.log(f"validation after {steps} steps: loss {loss_text}, bits/dim {bound_text}")


def _or_infinity(loss: float) -> float:
    """A loss that is not a number is worse than any other."""
    return math.inf if math.isnan(loss) else loss


def _plus_minus(bound: BoundSummary) -> str:
    return f"{bound.mean:.3f}" + (f" +- {bound.standard_error:.3f}" if len(bound.total_bpd) > 1 else "")


def with_averages(texts: Mapping[str, str]) -> str:
    """The model's text, and in brackets the averages'."""
    averages = ", ".join(f"EMA {label}: {text}" for label, text in texts.items() if label)
    return texts[""] + (f" ({averages})" if averages else "")
