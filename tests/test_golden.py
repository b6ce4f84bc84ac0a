"""The recipe of the golden numbers, golden/generate.py, makes what is stored."""

import importlib.util

import numpy as np
import pytest
from helpers import GOLDEN, assert_golden, golden

# The others are computed by tests of their own modules.
FAST = ["schedules", "losses", "resampler", "timestep_embedding", "image_pipeline"]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FAST)
def test_the_recipe_makes_the_stored_arrays(generate, name):
    stored = golden(name)
    found = generate.FILES[name](stored)
    assert found.keys() | generate.inputs_of(name, stored) == stored.keys()
    for key, value in found.items():
        assert_golden(value, stored[key])


def test_every_file_has_a_recipe_and_a_line_in_the_readme(generate):
    names = {path.stem for path in GOLDEN.glob("*.npz")}
    assert names == generate.FILES.keys()
    readme = (GOLDEN / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in GOLDEN.glob("*.npz"))


def test_an_array_that_is_missing_is_an_error(generate):
    with pytest.raises(ValueError, match="b"):
        generate.differences_from({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)}, set())
    assert generate.differences_from({"a": np.ones(2)}, {"a": np.zeros(2)}, set()) == {"a": 1.0}
