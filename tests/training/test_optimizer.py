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


def test_parameters_of_several_types_begin_wait_and_go_on():
    used = [(0,), (0, 1, 2), (0, 1, 2, 3), (0, 2), (1, 3), (0, 1, 2, 3, 4)]  # by step
    params = [
        *parameters(),
        *(th.nn.Parameter(th.randn(2, dtype=kind)) for kind in (th.float32, th.float64, th.float32)),
    ]
    others, states = copy.deepcopy(params), []
    for each, kind in ((params, AdamW), (others, torchs_adamw)):
        opt = kind(each, **OPTIONS)
        for numbers in used:
            opt.zero_grad()
            sum(each[number].double().exp().sum() for number in numbers).backward()
            opt.step()
            states.append(copy.deepcopy(opt.state_dict()["state"]))
    assert all(map(th.equal, params, others))
    for ours, torchs in zip(states[: len(used)], states[len(used) :], strict=True):
        assert str(dict(sorted(ours.items()))) == str(dict(sorted(torchs.items())))
    assert [float(states[-1][number]["step"]) for number in range(5)] == [5, 4, 4, 3, 1]


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
