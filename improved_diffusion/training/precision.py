"""The parameters, their gradients and the loss scale in fp32, bf16 and fp16 training.

In 16-bit training the model computes with 16-bit parameters, and the optimizer keeps one flat float32 copy of them, the
master parameters. Gradients of microbatches and of ranks are added up there, in float32. In fp32 training the model's
parameters are the master parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch as th
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .. import distributed
from ..fp16_util import groups_of_a_kind, in_groups, unflatten_master_params

INITIAL_LOG_LOSS_SCALE = 20.0
MAX_LOG_LOSS_SCALE = 129.0  # beyond, float32 cannot hold it, and every step lowers it
MIN_LOG_LOSS_SCALE = -20.0  # below, float16 cannot hold this model's gradients at all


def clear_gradients(params: Sequence[nn.Parameter]) -> None:
    """Drop the gradients."""
    for p in params:
        p.grad = None


class _Views:
    """Views of a flat vector in the parameters' shapes, kept until the vector lies elsewhere."""

    def __init__(self, params: Sequence[th.Tensor]):
        self._params, self._address = tuple(params), -1
        self._views: Sequence[th.Tensor] = ()

    def of(self, flat: th.Tensor) -> Sequence[th.Tensor]:
        if flat.data_ptr() != self._address:
            self._views = _unflatten_dense_tensors(flat.detach(), self._params)
            self._address = flat.data_ptr()
        return self._views


class MasterCopy:
    """The way from a model's gradients to the flat float32 master copy, and from its values back to the model.

    The flat gradient's memory and the views in the parameters' shapes are kept, so that each way is a call or two.
    """

    def __init__(self, model_params: Sequence[nn.Parameter]):
        self.model_params = model_params
        self._groups = groups_of_a_kind(model_params)
        self._values, self._gradient = _Views(model_params), _Views(model_params)
        self._memory: th.Tensor | None = None

    def collect_gradients(self, master: nn.Parameter) -> None:
        """Move the model's gradients into the master copy's, adding to what is there; a missing one is zero."""
        found = [p.grad for p in self.model_params]
        if all(grad is None for grad in found):
            return
        grads = [th.zeros_like(p) if grad is None else grad for p, grad in zip(self.model_params, found)]
        if master.grad is not None:
            in_groups(th._foreach_add_, self._groups, self._gradient.of(master.grad), grads)
        else:
            if self._memory is None or self._memory.shape != master.shape:
                self._memory = th.empty_like(master.detach())
            in_groups(th._foreach_copy_, self._groups, self._gradient.of(self._memory), grads)
            master.grad = self._memory
        clear_gradients(self.model_params)

    def update_model(self, master: nn.Parameter) -> None:
        """Copy the master copy's values into the model's parameters, in the model's types."""
        in_groups(th._foreach_copy_, self._groups, self.model_params, self._values.of(master))


def average_gradients(master_params: Sequence[nn.Parameter]) -> None:
    """Replace the flat float32 gradient by its mean over the ranks. Collective."""
    (master,) = master_params
    if distributed.get_world_size() > 1:
        if master.grad is None:
            master.grad = th.zeros_like(master)
        distributed.sum_over_ranks(master.grad).div_(distributed.get_world_size())


def backward(loss: th.Tensor) -> None:
    """Add the gradient of a loss to the parameters' `grad`; all of it is NaN where the loss is not finite.

    So a loss that is not finite is seen in the gradient, and all ranks skip the step.
    """
    value = loss.detach()
    # NaN - NaN and inf - inf are NaN. A product, as a gradient given to backward() makes it import sympy, in a second.
    (loss * (value - value + 1)).backward()


@th.no_grad()
def clip_gradients(params: Sequence[th.Tensor], largest: float) -> th.Tensor:
    """The norm of the gradient of all parameters (no dimensions), which becomes at most `largest`, unless that is 0.

    As torch.nn.utils.clip_grad_norm_, which would take each tensor's norm to its device by itself.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return th.zeros(())
    norm = th.linalg.vector_norm(th.stack(th._foreach_norm(grads)))
    if largest:
        th._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_where_finite(opt: th.optim.Optimizer, bad: th.Tensor) -> None:
    """opt.step(), unless `bad` (no dimensions, float32) is 1: then parameters and state stay as they are.

    Fused optimizers decide on the device, as torch.amp.GradScaler lets them. For others the host waits for `bad`.
    """
    if opt.defaults.get("fused"):
        opt.found_inf = bad  # type: ignore[attr-defined]
        opt.step()
    elif not bad:
        opt.step()


def state_dict_of(model: nn.Module, params: Sequence[th.Tensor], sixteen_bits: bool) -> dict[str, th.Tensor]:
    """The model's state dict with other parameters in place of its own, in float32.

    :param params: one for each parameter; in 16-bit training a single flat one.
    """
    if sixteen_bits:
        params = unflatten_master_params(list(model.parameters()), params)
    state_dict = model.state_dict()
    for (name, _), value in zip(model.named_parameters(), params):
        state_dict[name] = value.detach()
    return state_dict


def params_of(model: nn.Module, state_dict: Mapping[str, th.Tensor], sixteen_bits: bool) -> list[th.Tensor]:
    """The inverse of `state_dict_of`: float32 parameters on the model's device, flat in 16-bit training."""
    params = [state_dict[name].to(p.device).float() for name, p in model.named_parameters()]
    return [_flatten_dense_tensors(params)] if sixteen_bits else params


class LossScale:
    """float16's loss scale 2^lg, kept on the device: a good step adds `growth` to lg, an overflow subtracts 1.

    lg never falls below MIN_LOG_LOSS_SCALE.
    """

    def __init__(self, device: th.device | str, growth: float, lg: float = INITIAL_LOG_LOSS_SCALE):
        self.growth = growth
        self.lg = th.tensor(lg, dtype=distributed.sum_dtype(th.device(device)), device=device)

    @property
    def scale(self) -> th.Tensor:
        """What the loss is multiplied by: float32, no dimensions."""
        return th.exp2(self.lg).float()

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale can still be tried. Waits for the device."""
        return float(self.lg) > MIN_LOG_LOSS_SCALE

    def update(self, overflow: th.Tensor) -> None:
        """Adjust after a step; `overflow` is 1 where a gradient was not finite, else 0."""
        self.lg += th.where(overflow.bool(), th.full_like(self.lg, -1.0), self.growth)
        self.lg.clamp_(min=MIN_LOG_LOSS_SCALE)

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint keeps."""
        return {"lg": self.lg.cpu().double()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave; anything else raises ValueError."""
        if state["lg"].ndim or not MIN_LOG_LOSS_SCALE <= float(state["lg"]) <= MAX_LOG_LOSS_SCALE:
            raise ValueError(f"log2 of the loss scale is {state['lg'].tolist()}")
        self.lg.copy_(state["lg"])
