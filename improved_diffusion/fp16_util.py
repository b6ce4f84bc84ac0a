"""16-bit training: convolutions in float16 or bfloat16, one flat float32 master copy, and the loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch as th
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

INITIAL_LOG_LOSS_SCALE = 20.0
MIN_LOG_LOSS_SCALE = -20.0  # below, float16 cannot hold this model's gradients at all


def convert_module_to(module: nn.Module, dtype: th.dtype) -> None:
    """Turn the module's own parameters into `dtype` if it is a convolution; for `Module.apply`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.weight.data = module.weight.data.to(dtype)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 - the published name
    """Turn a convolution into float16."""
    convert_module_to(l, th.float16)


def convert_module_to_bf16(l: nn.Module) -> None:  # noqa: E741
    """Turn a convolution into bfloat16."""
    convert_module_to(l, th.bfloat16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Turn a convolution back into float32."""
    convert_module_to(l, th.float32)


def make_master_params(model_params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """One flat float32 copy of all parameters, for the optimizer: a list of a single parameter."""
    master = nn.Parameter(_flatten_dense_tensors([p.detach().float() for p in model_params]))
    return [master]


def model_grads_to_master_grads(model_params: Iterable[nn.Parameter], master_params: Sequence[nn.Parameter]) -> None:
    """Copy the model's gradients into the master copy's, as float32; a missing one counts as zero."""
    master_params[0].grad = _flatten_dense_tensors(
        [th.zeros_like(p, dtype=th.float32) if p.grad is None else p.grad.detach().float() for p in model_params]
    )


def master_params_to_model_params(model_params: Iterable[nn.Parameter], master_params: Sequence[th.Tensor]) -> None:
    """Copy the master parameters into the model's, in the model's types."""
    model_params = list(model_params)
    for param, master in zip(model_params, unflatten_master_params(model_params, master_params)):
        param.detach().copy_(master)


def unflatten_master_params(
    model_params: Iterable[nn.Parameter], master_params: Sequence[th.Tensor]
) -> Sequence[th.Tensor]:
    """Views of the flat master copy, one in the shape of each of the model's parameters."""
    return _unflatten_dense_tensors(master_params[0].detach(), tuple(model_params))


def zero_grad(model_params: Iterable[nn.Parameter]) -> None:
    """Set the gradients to zero in place; a missing one stays missing."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_()
            param.grad.zero_()


class LossScale:
    """float16's loss scale 2^lg, kept on the device: a good step adds `growth` to lg, an overflow subtracts 1.

    lg never falls below MIN_LOG_LOSS_SCALE.
    """

    def __init__(self, device: th.device | str, growth: float, lg: float = INITIAL_LOG_LOSS_SCALE):
        self.growth = growth
        has_float64 = th.device(device).type in ("cpu", "cuda")  # MPS and some XPUs have none
        self.lg = th.tensor(lg, dtype=th.float64 if has_float64 else th.float32, device=device)

    @property
    def scale(self) -> th.Tensor:
        """What the loss is multiplied by: float32, no dimensions."""
        return th.exp2(self.lg).float()

    def update(self, overflow: th.Tensor) -> None:
        """Adjust after a step; `overflow` is 1 where a gradient was not finite, else 0."""
        self.lg += th.where(overflow.bool(), th.full_like(self.lg, -1.0), self.growth)
        self.lg.clamp_(min=MIN_LOG_LOSS_SCALE)

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint keeps."""
        return {"lg": self.lg.cpu().double()}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.lg.copy_(state["lg"])
