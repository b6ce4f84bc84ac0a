"""Subsets of the timesteps."""

import numpy as np
import pytest
import torch as th
from helpers import golden_json, make_diffusion, stand_in_network

from improved_diffusion.config import UserError
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from improved_diffusion.respace import SpacedDiffusion, space_timesteps

ROWS = golden_json("respacing")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['num_timesteps']}:{row['section_counts']}")
def test_timesteps_are_the_published_ones(row):
    kept = space_timesteps(row["num_timesteps"], row["section_counts"])
    assert isinstance(kept, set)
    assert sorted(kept) == row["timesteps"]


@pytest.mark.parametrize("T", range(1, 26))
def test_every_count_keeps_so_many_steps(T):
    for count in range(1, T + 1):
        kept = space_timesteps(T, [count])
        assert len(kept) == count and min(kept) == 0 and max(kept) == (T - 1 if count > 1 else 0)
        assert kept == space_timesteps(T, str(count))


@pytest.mark.parametrize("T", [1, 2, 7, 100])
def test_ddim_takes_the_first_stride_that_keeps_exactly_n(T):
    for stride in range(1, max(T, 2)):
        steps = range(0, T, stride)
        kept = space_timesteps(T, f"ddim{len(steps)}")
        assert len(kept) == len(steps)
        found = sorted(kept)[1] if len(kept) > 1 else 1
        assert found <= stride and kept == set(range(0, T, found))


@pytest.mark.parametrize(
    "T, counts, culprits",
    [
        (10, [11], ["section 1 of 1", "10", "11"]),
        (10, "3,6", ["section 2 of 2", "holds 5", "6"]),
        (11, "6,6", ["section 2 of 2", "holds 5", "6"]),
        (10, "5,0", ["section 2 of 2", "0"]),
        (1000, "ddim300", ["300", "1000", "ddim334", "or 300"]),
        (1000, "ddim0", ["0", "1000"]),
        (1000, "ddim", ["ddim50"]),
        (1000, "many", ["many", "250"]),
        (1000, "10,x", ["10,x"]),
    ],
)
def test_impossible_counts_are_named(T, counts, culprits):
    with pytest.raises(UserError) as error:
        space_timesteps(T, counts)
    for culprit in ("--timestep_respacing", *culprits):
        assert culprit in str(error.value)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_kept_steps_keep_their_alpha_bar(schedule):
    kept = space_timesteps(100, "7,5,3")
    whole, spaced = make_diffusion(100, schedule=schedule), make_diffusion(100, kept, schedule)
    assert spaced.num_timesteps == 15
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[sorted(kept)], rtol=1e-10)


def test_all_steps_keep_their_betas():
    betas = get_named_beta_schedule("linear", 50)
    np.testing.assert_allclose(make_diffusion(50, schedule="linear").betas, betas, rtol=1e-10)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_network_sees_the_original_timesteps(rescale):
    diffusion = make_diffusion(40, [3, 8, 39], rescale=rescale)
    assert diffusion.timestep_map == [3, 8, 39]
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    diffusion.p_mean_variance(model, th.zeros(3, 1, 2, 2), th.tensor([2, 0, 1]))
    diffusion.training_losses(model, th.zeros(3, 1, 2, 2), th.tensor([2, 0, 1]))
    expected = th.tensor([39.0, 3.0, 8.0]) * 1000 / 40 if rescale else th.tensor([39, 3, 8])
    for t in seen:
        th.testing.assert_close(t, expected)


@pytest.mark.parametrize("use", [[], [-1, 3], [3, 40]])
def test_steps_that_the_process_lacks_are_an_error(use):
    with pytest.raises(ValueError, match=r"subset of 0\.\.39"):
        make_diffusion(40, use)


VARIANCES = list(ModelVarType)


@pytest.mark.parametrize("var", VARIANCES, ids=lambda v: v.name)
@pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
@pytest.mark.parametrize("T", [1, 5])
def test_every_count_trains_samples_and_evaluates(T, mean, var):
    model = stand_in_network(var in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE))
    x = th.rand(2, 1, 4, 4) * 2 - 1
    for count in range(1, T + 1):
        kept = space_timesteps(T, [count])
        for loss in (LossType.RESCALED_MSE, LossType.KL):
            diffusion = make_diffusion(T, kept, mean=mean, var=var, loss=loss)
            losses = diffusion.training_losses(model, x, th.tensor([0, count - 1]))
            assert all(th.isfinite(value).all() and value.shape == (2,) for value in losses.values())
        assert th.isfinite(diffusion.p_sample_loop(model, x.shape, device="cpu")).all()
        assert th.isfinite(diffusion.ddim_sample_loop(model, x.shape, device="cpu", eta=0.5)).all()
        bound = diffusion.calc_bpd_loop(model, x)
        assert bound["vb"].shape == (2, count) and th.isfinite(bound["total_bpd"]).all()


def test_a_network_of_x_before_takes_only_the_steps_that_it_knows():
    diffusion = make_diffusion(20, mean=ModelMeanType.PREVIOUS_X)
    np.testing.assert_array_equal(diffusion.respaced(range(20)).betas, diffusion.betas)
    with pytest.raises(ValueError, match="cannot take other steps"):
        diffusion.respaced([0, 10, 19])


def test_respacing_keeps_the_class():
    class Mine(SpacedDiffusion):
        pass

    diffusion = make_diffusion(20)
    mine = Mine(range(20), betas=diffusion.base_betas, **diffusion.base_kwargs).respaced([0, 7.5, 19])
    assert type(mine) is Mine and mine.timestep_map == [0, 7.5, 19]


def test_a_wrapped_model_is_not_wrapped_again():
    diffusion = make_diffusion(20, [0, 10])
    wrapped = diffusion._wrap_model(lambda x, t: t)
    assert diffusion._wrap_model(wrapped) is wrapped
    assert wrapped(None, th.tensor([1, 0])).tolist() == [10, 0]
