"""The optimizer."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch as th


class AdamW(th.optim.AdamW):
    """torch's fused AdamW, with the same results and state bit for bit, whose step costs the host less.

    `found_inf`: where this tensor without dimensions is 1 instead of 0, a step changes nothing.

    Its methods are torch's without the decorators for optimizers that are compiled: these import torch's compiler,
    which takes seconds, for an optimizer that is not compiled too.
    """

    found_inf: th.Tensor | None = None

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    add_param_group = unwrap(th.optim.AdamW.add_param_group)
    load_state_dict = unwrap(th.optim.AdamW.load_state_dict)
    state_dict = unwrap(th.optim.AdamW.state_dict)
    zero_grad = unwrap(th.optim.AdamW.zero_grad)

    @th.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step on the parameters that have a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with th.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kinds: dict[Any, list[tuple[th.Tensor, th.Tensor]]] = {}
            for p in group["params"]:
                if (grad := p.grad) is not None:
                    kinds.setdefault((p.device, p.dtype), []).append((p, grad))
            if sum(map(len, kinds.values())) < len(group["params"]):
                self._separate_counts(group["params"])
            for pairs in kinds.values():
                self._step(group, *zip(*pairs))
        return loss

    def _separate_counts(self, params: list[th.Tensor]) -> None:
        """Where some of the parameters have no gradient and wait, the others' counts go on without theirs."""
        waiting = {id(self.state[p]["step"]) for p in params if p.grad is None and self.state.get(p)}
        for p in params:
            if p.grad is not None and (state := self.state.get(p)) and id(state["step"]) in waiting:
                state["step"] = state["step"].clone()

    def _step(self, group: dict[str, Any], params: tuple[th.Tensor, ...], grads: tuple[th.Tensor, ...]) -> None:
        """A step on parameters of one type on one device."""
        states = [self.state[p] for p in params]
        self._begin([(p, state) for p, state in zip(params, states) if not state])
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        found_inf = None if self.found_inf is None else self.found_inf.to(params[0].device)
        counts = list({id(step): step for step in steps}.values())
        th._foreach_add_(counts, 1 if found_inf is None else [1 - found_inf] * len(counts))
        th._fused_adamw_(
            params, grads, averages, squares, [], steps, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=False, found_inf=found_inf,
        )  # fmt: skip

    def _begin(self, fresh: list[tuple[th.Tensor, dict[str, th.Tensor]]]) -> None:
        """Fill the states of parameters before their first step. They share its count, so that it is added to once."""
        if fresh:
            count = th.zeros((), dtype=th.float32, device=fresh[0][0].device)
        for p, state in fresh:
            state["step"], state["exp_avg"], state["exp_avg_sq"] = count, th.zeros_like(p), th.zeros_like(p)
