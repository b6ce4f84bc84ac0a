"""The optimizer is torch's AdamW."""

import copy
import functools

import torch as th

from improved_diffusion.training.optimizer import AdamW

OPTIONS = dict(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)


def parameters():
    th.manual_seed(0)
    return [th.nn.Parameter(th.randn(3, 4)), th.nn.Parameter(th.randn(5))]


def steps(kind, count, state=None):
    """The parameters and the optimizer after so many steps."""
    params = parameters()
    opt = kind(params, **OPTIONS)
    if state is not None:
        opt.load_state_dict(copy.deepcopy(state))  # it keeps the tensors
    for step in range(count):
        sum((p * (step + 1)).sin().sum() for p in params).backward()
        opt.step()
        opt.zero_grad()
        assert all(p.grad is None for p in params)
    return params, opt


torchs_adamw = functools.partial(th.optim.AdamW, fused=True)


def test_its_steps_and_its_state_are_torchs_bit_for_bit():
    (ours, own), (theirs, torchs) = (steps(kind, 3) for kind in (AdamW, torchs_adamw))
    assert all(th.equal(one, other) for one, other in zip(ours, theirs))
    assert str(own.state_dict()) == str(torchs.state_dict())
    again, _ = steps(AdamW, 2, torchs.state_dict())
    expected, _ = steps(torchs_adamw, 2, torchs.state_dict())
    assert all(th.equal(one, other) for one, other in zip(again, expected))


def test_a_step_that_found_inf_changes_nothing():
    params, opt = steps(AdamW, 2)
    before = copy.deepcopy([params, opt.state_dict()])
    for p in params:
        p.grad = th.full_like(p, th.inf)
    for found_inf, changes in ((1.0, False), (0.0, True)):
        opt.found_inf = th.tensor(found_inf)
        opt.step()
        assert (str([params, opt.state_dict()]) != str(before)) == changes


def test_parameters_without_gradients_and_of_several_types():
    params = [*parameters(), th.nn.Parameter(th.randn(2, dtype=th.float64)), th.nn.Parameter(th.randn(2))]
    others = copy.deepcopy(params)
    for each, kind in ((params, AdamW), (others, torchs_adamw)):
        opt = kind(each, **OPTIONS)
        for _ in range(2):
            sum(p.double().exp().sum() for p in each[:3]).backward()
            opt.step()
        assert len(opt.state) == 3
    assert all(map(th.equal, params, others))


def test_it_keeps_hooks_closures_and_groups():
    params, opt = steps(AdamW, 0)
    seen = []
    opt.register_step_pre_hook(lambda *args: seen.append("before"))
    opt.register_step_post_hook(lambda *args: seen.append("after"))

    def closure():
        loss = params[0].sum()
        loss.backward()
        return loss

    assert opt.step(closure).requires_grad and seen == ["before", "after"]
    opt.add_param_group({"params": [th.nn.Parameter(th.ones(2))], "lr": 0.5})
    assert [group["lr"] for group in opt.param_groups] == [1e-2, 0.5] and isinstance(opt, th.optim.AdamW)
