"""16-bit training: convolutions in float16 or bfloat16, and one flat float32 master copy of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch as th
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


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
    values = unflatten_master_params(model_params, master_params)
    in_groups(th._foreach_copy_, groups_of_a_kind(model_params), model_params, values)


def groups_of_a_kind(params: Iterable[th.Tensor]) -> list[list[int]]:
    """The numbers of the parameters, in groups of one type and memory layout."""
    groups: dict[Any, list[int]] = {}
    for number, p in enumerate(params):
        groups.setdefault((p.dtype, p.is_contiguous()), []).append(number)
    return list(groups.values())


@th.no_grad()
def in_groups(
    call: Callable[..., Any], groups: Iterable[Sequence[int]], targets: Sequence[th.Tensor],
    sources: Sequence[th.Tensor],
) -> None:  # fmt: skip
    """A torch._foreach function of two lists, called once for each group of their items: it is slow for a mixture."""
    for group in groups:
        call([targets[i] for i in group], [sources[i] for i in group])


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
