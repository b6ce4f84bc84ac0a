"""The file of latents: what is refused."""

import io

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.editing.latents import read_latents, write_latents


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


def array_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros((3, 8, 8), np.float32))
    return buffer.getvalue()


WHOLE = array_file(np.ones((3, 8, 8), np.float32))


@pytest.mark.parametrize(
    "part",
    [
        b"", b"junk", npz(), npz()[:100], b"PK\3\4junk", b"PK\5\6" + bytes(18), WHOLE[:-1], WHOLE[:20],
        array_file(np.zeros((8, 8), np.float32)), array_file(np.zeros((3, 8, 8))), array_file(np.array([{}])),
        array_file(np.full((3, 8, 8), np.nan, np.float32)), WHOLE.replace(b"(3, 8, 8)", b"(3, '8',)"),
        WHOLE.replace(b"(3, 8, 8)", b"(9**9, 8)"), WHOLE.replace(b"'<f4'", b"'|S0'"),
        WHOLE.replace(b"'descr'", b"b'desc'"),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_part_is_made_again(tmp_path, part):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/000000.npy").write_bytes(part)
    (tmp_path / "latents/000001.npy").write_bytes(WHOLE)
    made = []

    def invert(numbers):
        made.extend(numbers)
        return np.stack([np.full((3, 8, 8), number, np.float32) for number in numbers])

    found = write_latents(
        invert, out_dir=str(tmp_path), count=3, shape=(3, 8, 8), batch_size=2, labels=None, step_options={}, model="a"
    )
    assert made == [0, 2] and found[:, 0, 0, 0].tolist() == [0, 1, 2]
