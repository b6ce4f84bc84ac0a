"""The optimizer."""

from __future__ import annotations

from inspect import unwrap

import torch as th


class AdamW(th.optim.AdamW):
    """torch's AdamW without the decorators for optimizers that are compiled.

    They import torch's compiler, which takes seconds, for an optimizer that is not compiled too.
    """

    add_param_group = unwrap(th.optim.AdamW.add_param_group)
    load_state_dict = unwrap(th.optim.AdamW.load_state_dict)
    state_dict = unwrap(th.optim.AdamW.state_dict)
    step = th.no_grad()(unwrap(th.optim.AdamW.step))
    zero_grad = unwrap(th.optim.AdamW.zero_grad)
