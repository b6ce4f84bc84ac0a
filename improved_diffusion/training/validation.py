"""Loss and bits/dim on held-out images while a model trains, and the best model so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th

from .. import distributed
from ..bound import BoundSummary, stratified_timesteps
from ..config import UserError
from ..data.low_res import downsample
from ..logs import logger
from ..sampling.noise import SeededNoise

EVALUATIONS = 8  # of the network for each image's bits/dim; a loss takes one more
SEED = 20210218  # of the timesteps and the noise: no option, so that the numbers of different runs can be compared
BEST_FILE = "best.pt"


class Score(NamedTuple):
    """What a set of parameters achieves; the loss and the bound are means over the images."""

    loss: float
    bound: BoundSummary


class Validation:
    """A hook for TrainLoop: evaluates the model and each moving average on the same images, timesteps and noise.

    Logs `val_loss`, `val_bpd` and its standard error over the images `val_bpd_se`, and the same of each average with
    `_ema_LABEL` behind val_loss and val_bpd. The average of least loss so far (the model where there are none) is kept
    as best.pt.
    :param dataset: images as ImageDataset gives them.
    :param num_images: how many to evaluate, an even selection; all where there are not as many.
    :param batch_size: images in one forward pass. Changes memory and nothing else, like the number of ranks.
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
            logger.log(f"--val_images {num_images}: validation uses all {len(dataset)} images that there are")
        self.diffusion, self.dataset, self.batch_size, self.small_size = diffusion, dataset, batch_size, small_size
        n = self.num_images = min(num_images, len(dataset))
        self.selected = np.arange(n) * len(dataset) // n
        rng = np.random.default_rng(SEED)
        # Image i's timestep lies in a stratum of its own, of n equal ones: all quarters of the loss have their share.
        self.loss_t = ((rng.permutation(n) + rng.random(n)) * diffusion.num_timesteps / n).astype(np.int64)
        count = min(EVALUATIONS, diffusion.num_timesteps)
        self.bound_t, self.weights = stratified_timesteps(diffusion.num_timesteps, count, rng.random(n))
        self.mine = range(distributed.get_rank(), n, distributed.get_world_size())
        self.best: dict[str, Any] | None = None
        for problem in distributed.all_gather_object(self._problem()):
            if problem:
                raise UserError(f"{problem} (an image for validation): repair it, or take it out")

    def _problem(self) -> str | None:
        """What is wrong with the first of this rank's images that cannot be used."""
        for i in self.mine:
            try:
                self.dataset[self.selected[i]]
            except UserError as error:
                return str(error)
        return None

    def __call__(self, loop: Any) -> None:
        """Evaluate, log, and keep the best. Collective."""
        scores = {"": self._score(loop, loop.master_params)}
        scores |= {ema.label: self._score(loop, ema.params) for ema in loop.emas}
        for label, score in scores.items():
            suffix = f"_ema_{label}" if label else ""
            logger.logkv(f"val_loss{suffix}", score.loss)
            logger.logkv(f"val_bpd{suffix}", score.bound.mean)
            if self.num_images > 1:
                logger.logkv(f"val_bpd{suffix}_se", score.bound.standard_error)
        steps = loop.absolute_step + 1
        losses = _with_averages({label: f"{score.loss:.4g}" for label, score in scores.items()})
        bounds = _with_averages({label: _plus_minus(score.bound) for label, score in scores.items()})
        logger.log(f"validation after {steps} steps: loss {losses}, bits/dim {bounds}")
        self._keep_best(loop, steps, scores)

    def _score(self, loop: Any, params: Sequence[th.Tensor]) -> Score:
        mine = [self.mine[start : start + self.batch_size] for start in range(0, len(self.mine), self.batch_size)]
        with loop.using(params), th.no_grad():
            parts = [self._evaluate(loop, list(numbers)) for numbers in mine]
        gathered = distributed.all_gather_ragged(th.cat([th.zeros(0, 2, dtype=th.float64), *parts]))
        table = np.empty((self.num_images, 2))  # in the images' order, so that sums do not depend on the ranks
        for rank, part in enumerate(gathered):
            table[rank :: len(gathered)] = part.numpy()
        return Score(float(table[:, 0].mean()), BoundSummary(table[:, 1], {}))

    def _evaluate(self, loop: Any, numbers: list[int]) -> th.Tensor:
        """Loss and bits/dim of the images with these numbers: float64 [N, 2] on the CPU."""
        indices = self.selected[numbers]
        batch, kwargs = th.utils.data.default_collate([self.dataset[i] for i in indices])
        batch = batch.to(loop.device)
        kwargs = {key: value.to(loop.device) for key, value in kwargs.items()}
        if self.small_size is not None:
            kwargs["low_res"] = downsample(batch, self.small_size)
        draw = SeededNoise(SEED, indices)
        t, bound_t, weights = (
            th.from_numpy(array[numbers]).to(loop.device) for array in (self.loss_t, self.bound_t, self.weights)
        )
        losses = self.diffusion.training_losses(loop.model, batch, t, model_kwargs=kwargs, noise=draw(batch))
        bound = self.diffusion.calc_bpd_loop(
            loop.model, batch, clip_denoised=True, model_kwargs=kwargs, noise_fn=draw, timesteps=bound_t,
            weights=weights,
        )  # fmt: skip
        return th.stack([losses["loss"].double(), bound["total_bpd"]], dim=1).cpu()

    def _keep_best(self, loop: Any, steps: int, scores: dict[str, Score]) -> None:
        params = {ema.label: ema.params for ema in loop.emas} or {"": loop.master_params}
        label = min(params, key=lambda label: _or_infinity(scores[label].loss))
        loss = scores[label].loss
        if _or_infinity(loss) >= (self.best["val_loss"] if self.best else math.inf):
            return
        self.best = {"val_loss": loss, "step": steps, "ema": label}
        loop.write_model(BEST_FILE, params[label], {"best": self.best})

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {"best": self.best, "images": self.num_images, "of": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict; a best that is of other images is no measure for these."""
        if (state["images"], state["of"]) == (self.num_images, len(self.dataset)):
            self.best = state["best"]
        elif state["best"]:
            logger.log(f"validation on other images than before: {BEST_FILE} starts afresh")


def _or_infinity(loss: float) -> float:
    """A loss that is no number is the worst there is."""
    return math.inf if math.isnan(loss) else loss


def _plus_minus(bound: BoundSummary) -> str:
    return f"{bound.mean:.3f}" + (f" +- {bound.standard_error:.3f}" if len(bound.total_bpd) > 1 else "")


def _with_averages(texts: dict[str, str]) -> str:
    """The model's, and in brackets the averages'."""
    averages = ", ".join(f"EMA {label}: {text}" for label, text in texts.items() if label)
    return texts[""] + (f" ({averages})" if averages else "")
