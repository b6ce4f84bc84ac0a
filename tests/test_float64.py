"""No float64 reaches a device: not every one has it. The meta device stands in for an accelerator."""

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.sampling.solvers import NOISY, RULES, BothWays, Inpaint, sample_loop
from improved_diffusion.sampling.timestep_grids import repaint_path

SHAPE = (2, 1, 4, 4)


class NoFloat64(TorchDispatchMode):
    """Raises for an operation that makes a float64 tensor anywhere but on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, th.Tensor) and leaf.dtype == th.float64 and leaf.device.type != "cpu":
                raise AssertionError(f"{func} made a float64 tensor on {leaf.device}")
        return out


def network(learned):
    return lambda x, t: th.cat([x, x], dim=1) if learned else 0.5 * x


def test_the_stand_in_sees_float64():
    with NoFloat64():
        th.ones(2, dtype=th.float64)
        for make in (lambda: th.ones(2, dtype=th.float64, device="meta"), lambda: th.ones(2).double().to("meta")):
            with pytest.raises(AssertionError, match="float64"):
                make()


@pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
@pytest.mark.parametrize("var", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE], ids=lambda v: v.name)
@pytest.mark.parametrize("rescale", [False, True])
def test_training_and_the_bound(mean, var, rescale):
    learned = var == ModelVarType.LEARNED_RANGE
    x, t = th.zeros(SHAPE, device="meta"), th.zeros(2, dtype=th.int64, device="meta")
    for loss in (LossType.RESCALED_MSE, LossType.RESCALED_KL):
        diffusion = make_diffusion(6, mean=mean, var=var, loss=loss, rescale=rescale)
        with NoFloat64():
            assert diffusion.training_losses(network(learned), x, t)["loss"].device.type == "meta"
            assert diffusion.calc_bpd_loop(network(learned), x)["total_bpd"].dtype == th.float32


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kept", [range(6), [0, 2.5, 4, 5]])
def test_every_rule(name, kept):
    diffusion = make_diffusion(6, rescale=True).respaced(np.array(kept))
    image, count = th.zeros(SHAPE, device="meta"), len(kept)
    walks = [(RULES[name](), None), (Inpaint(RULES[name](), image, image), repaint_path(count, 2, 2))]
    if name not in NOISY:  # which cannot go both ways
        walks.append((BothWays(RULES[name]()), range(count)))
    with NoFloat64():
        for rule, path in walks:
            sample = sample_loop(rule, diffusion, network(False), SHAPE, device="meta", path=path)
            assert sample.device.type == "meta" and sample.dtype == th.float32
