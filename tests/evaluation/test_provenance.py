"""How samples were made, by what lies beside them, and where their report goes."""

import json

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import provenance
from improved_diffusion.utils import files

REQUEST = {"model_path": "/runs/a/ema_0.99_000100.pt", "sampler": "heun", "steps": 10, "seed": 3}


@pytest.mark.parametrize("name", ["samples_50x8x8x3.npz", "samples"])
def test_what_image_sample_wrote_is_described_beside_it(name, tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(REQUEST))
    assert provenance.made_by(str(tmp_path / name)) == {**REQUEST, "average": "0.99", "evaluations": 19}


@pytest.mark.parametrize("name", ["mine.npz", "samples.zip", "samples_old.npz", "fakes"])
def test_other_files_beside_a_description_are_not_what_it_is_of(name, tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(REQUEST))
    assert provenance.made_by(str(tmp_path / name)) is None


DAMAGED = [
    "", "{", "3", "[1]", "null", '"x"', "[" * 200_000, '{"a":' * 200_000, '{"steps": NaN}', '{"steps": 1e999}',
    '{"steps": {"a": 1}}', '{"steps": [[1]]}', '{"model_path": "\\ud800"}', '{"steps": 1, "steps": 2}',
    '{"steps": ' + "9" * 10_000 + "}", b"\xff\xfe",
]  # fmt: skip


@pytest.mark.parametrize("wrong", DAMAGED, ids=range(len(DAMAGED)))
def test_a_description_that_is_damaged_is_named(wrong, tmp_path):
    assert provenance.made_by(str(tmp_path / "samples")) is None
    (tmp_path / "samples.json").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    with pytest.raises(UserError, match=r"samples\.json is damaged: remove it, if the report need not say"):
        provenance.made_by(str(tmp_path / "samples"))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"model_path": "a/ema_0.9999_000100.pt"}, {"average": "0.9999"}),
        ({"model_path": "a/ema_posthoc_0.15_000100.pt"}, {"average": "posthoc_0.15"}),
        ({"model_path": "a/model000100.pt"}, {"average": "none: the model itself"}),
        ({"model_path": "a/mine.pt"}, {}),
        ({"sampler": "ddim", "steps": 25}, {"evaluations": 25}),
        ({"sampler": "plms", "steps": 25}, {"evaluations": 26}),
        ({"sampler": "another", "steps": 25}, {}),
        ({"sampler": "ddim", "steps": "25"}, {}),
        ({"sampler": "ddim", "steps": True}, {}),
        ({"sampler": ["ddim"], "steps": 25}, {}),
        ({"model_path": None}, {}),
        ({}, {}),
    ],
)
def test_what_a_request_implies(request_, expected):
    assert provenance.implied_by(request_) == expected


# Where reports go


def test_a_report_goes_beside_the_samples(tmp_path):
    (tmp_path / "v1.5").mkdir()
    for path, expected in (("v1.5", "v1.5_report"), ("v1.5/", "v1.5_report"), ("a.npz", "a_report"),
                           ("v1.5/a.zip", "v1.5/a_report")):  # fmt: skip
        assert provenance.report_folder(f"{tmp_path}/{path}") == f"{tmp_path}/{expected}"


def test_samples_behind_a_url_are_reported_here(monkeypatch):
    monkeypatch.setattr(files, "is_dir", lambda path: not path.endswith(".npz"))
    for path in ("gs://bucket/a/samples/", "gs://bucket/a/samples.npz"):
        assert provenance.report_folder(path) == "runs/samples_report"
    beside = {"gs://bucket/a/samples.json": json.dumps(REQUEST).encode()}
    monkeypatch.setattr(files, "exists", beside.__contains__)
    monkeypatch.setattr(files, "read_bytes", lambda path, limit: beside[path])
    assert provenance.made_by("gs://bucket/a/samples/")["average"] == "0.99"
