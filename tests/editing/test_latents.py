"""The file of latents: what is refused."""

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.editing.latents import read_latents


@pytest.mark.parametrize("arrays, message", [
    ({}, "has no arr_0"),
    ({"arr_0": np.zeros((2, 3, 8, 8))}, "arr_0 of float64"),
    ({"arr_0": np.zeros((3, 8, 8), np.float32)}, r"arr_0 of float32 \(3, 8, 8\)"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.float32), "arr_1": np.zeros(3, int)}, "arr_1 of int64.*: expected 2 integers"),
    ({"arr_0": np.array([{}])}, "holds Python objects, which could run code"),
    ({"arr_0": np.full((2, 3, 8, 8), np.nan, np.float32)}, "not finite"),
    ({"arr_0": np.full((2, 3, 8, 8), np.inf, np.float32)}, "not finite"),
    *(
        ({"arr_0": np.zeros((2, 3, 8, 8), np.float32), "way": np.array(way)}, "does not say by which steps")
        for way in ("{", "[]", "[" * 10**5, '{"steps": NaN}', '{"steps": "3"}', '{"seed": 3}', '{"sampler": "x"}', "3")
    ),
])  # fmt: skip
def test_damaged_and_hostile_latents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "latents.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_latents(str(tmp_path / "latents.npz"))


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "latents.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(UserError, match="is not a readable npz"):
        read_latents(str(tmp_path / "latents.npz"))
