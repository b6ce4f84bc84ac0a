"""Settings: groups of options found by name, never changed."""

import dataclasses
import inspect
import json

import pytest

from improved_diffusion.config import Config, UserError, settings
from improved_diffusion.config.settings import (
    ClassifierTraining,
    ImageSampling,
    ImageTraining,
    Settings,
    SuperResTraining,
    merge_options,
)

KINDS = [kind for _, kind in inspect.getmembers(settings, inspect.isclass)
         if issubclass(kind, Settings) and kind is not Settings]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_made_of_frozen_groups_and_has_each_option_once(kind):
    made = kind.of({})
    for name, config in kind.groups().items():
        assert issubclass(config, Config) and getattr(made, name) == config()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, None)
    names = [f.name for config in kind.groups().values() for f in dataclasses.fields(config)]
    assert len(names) == len(set(names)) and set(names) == kind.options().keys() == made.values().keys()
    assert kind.__doc__ and all(config.__doc__ for config in kind.groups().values())
    json.dumps(made.values())


def test_options_are_given_and_read_by_name_and_checked():
    made = ImageSampling.of({"seed": "3", "image_size": "48x64", "use_ddim": "yes"})
    assert (made.run.seed, made.model.image_size, made.sampler.use_ddim) == (3, "48x64", True)
    assert made.values()["seed"] == 3 and made.values()["num_samples"] == 10000
    with pytest.raises(UserError, match="--seed -1"):
        ImageSampling.of({"seed": -1})
    with pytest.raises(UserError, match=r"'sead'.*seed"):
        ImageSampling.of({"sead": 3})


def test_replacing_gives_a_new_object():
    before = ImageSampling.of({"seed": 3, "steps": 5})
    after = before.replace(seed=4, sampler="ddim")
    assert (before.run.seed, before.sampler.sampler) == (3, "auto")
    assert (after.run.seed, after.sampler.sampler, after.sampler.steps) == (4, "ddim", 5)
    assert after.model is before.model and before.replace() == before
    with pytest.raises(UserError, match=r"'stepps'.*steps"):
        before.replace(stepps=3)
    with pytest.raises(UserError, match="--churn"):
        before.replace(churn=3)


@pytest.mark.parametrize("kind, name, size", [
    (ImageTraining, "image", 64), (SuperResTraining, "super_res", 256), (ClassifierTraining, "classifier", 64),
])  # fmt: skip
def test_kinds_of_runs_are_told_apart_by_their_type(kind, name, size):
    made = kind.of({})
    assert made.model.kind == name and made.model.size == size


def test_later_sources_win_and_the_two_batch_sizes_replace_each_other():
    assert merge_options([{"lr": 1, "seed": 2}, {"lr": 3}]) == {"lr": 3, "seed": 2}
    assert merge_options([{"total_batch_size": 8}, {"batch_size": 2}]) == {"batch_size": 2}
    assert merge_options([{"batch_size": 2}, {"total_batch_size": 8}]) == {"total_batch_size": 8}
    both = {"batch_size": 2, "total_batch_size": 8}
    assert merge_options([{}, both]) == both  # given in one line: refused later, where they contradict each other
    assert merge_options([both, {}]) == {"total_batch_size": 8}
