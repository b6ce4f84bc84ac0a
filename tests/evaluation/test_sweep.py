"""A sweep's table, its plot, and the checkpoints that --ema names."""

import json

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import sweep
from improved_diffusion.evaluation.report import Metric, Report
from improved_diffusion.utils import images


def row(fid, evaluations=None, kid=None, **chosen):
    metrics = {"fid": Metric(fid), **({"kid": Metric(kid, 0.001)} if kid is not None else {})}
    folder = "_".join(f"{name}{value}" for name, value in chosen.items())
    return sweep.Row(chosen, evaluations, folder, metrics)


def curves(axes):
    """Label -> the points of each line."""
    handles, labels = axes.get_legend_handles_labels()
    return {label: [tuple(point) for point in bar[0].get_xydata()] for bar, label in zip(handles, labels)}


def test_the_table_has_a_row_for_each_combination(tmp_path):
    rows = [row(3.0, 5, 0.002, sampler="ddim", steps="5"), row(2.5, 9, sampler="heun", steps="5")]
    samples = {"count": 50, "features": "f.pt", "made_by": {"model_path": "/m.pt"}}
    last = Report(samples=samples, reference={"images": "/real"}, warnings=("few",))
    path = sweep.write_table(str(tmp_path), rows, last)
    text = (tmp_path / "sweep.md").read_text()
    assert path == str(tmp_path / "sweep.md") and text.startswith("# Sweep\n\n50 samples a row, from /m.pt ")
    assert "against /real, in the features f.pt." in text and "**Warning:** few." in text
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| sampler | steps | evaluations | FID | KID x 1000 |",
        "|---|---|---|---|---|",
        "| ddim | 5 | 5 | 3.0000 | 2.0000 ± 1.0000 |",
        "| heun | 5 | 9 | 2.5000 |  |",
    ]
    assert "- [samplerheun_steps5](samplerheun_steps5/report.md)" in text and "(sweep.png)" in text
    assert json.loads((tmp_path / "sweep.json").read_text()) == [row.to_dict() for row in rows]
    assert rows[0].to_dict()["metrics"]["kid"] == {"value": 0.002, "error": 0.001}
    assert images.decode_png((tmp_path / "sweep.png").read_bytes()).shape[:2] == (340, 920)


def test_a_plot_that_cannot_be_drawn_is_left_out_and_the_table_says_why(tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("no matplotlib")

    last = Report(samples={"count": 50, "features": "f.pt"}, reference={"images": "/real"})
    sweep.write_table(str(tmp_path), [row(3.0, 5, steps="5")], last)
    monkeypatch.setattr(sweep, "save_figure", fail)
    sweep.write_table(str(tmp_path), [row(3.0, 5, steps="5"), row(2.0, 9, steps="9")], last)
    text = (tmp_path / "sweep.md").read_text()
    assert "(sweep.png)" not in text and "No sweep.png: no matplotlib." in text.splitlines()
    assert not (tmp_path / "sweep.png").exists()


def test_steps_are_drawn_as_evaluations_with_a_line_for_each_other_value():
    rows = [
        row(steps * scale, steps * scale, 0.001 * steps, sampler=sampler, steps=str(steps))
        for sampler, scale in (("ddim", 1), ("heun", 2), ("plms", 3))
        for steps in (20, 5)
    ]
    fid, kid = sweep.figure_of(rows).axes
    assert (fid.get_title(), kid.get_title()) == ("FID: lower is better", "KID x 1000: lower is better")
    assert fid.get_xlabel() == "evaluations of the network"
    assert curves(fid) == {
        "sampler ddim": [(5, 5), (20, 20)],
        "sampler heun": [(10, 10), (40, 40)],
        "sampler plms": [(15, 15), (60, 60)],
    }
    np.testing.assert_allclose(curves(kid)["sampler heun"], [(10, 5), (40, 20)])
    assert fid.get_legend() is not None and kid.get_legend() is None


def test_numbers_lie_where_they_are_and_names_side_by_side():
    rows = [row(float(scale), 10, guidance_scale=scale, steps="10") for scale in ("1.5", "4", "2")]
    (axes,) = sweep.figure_of(rows).axes
    assert axes.get_xlabel() == "guidance_scale" and axes.get_legend() is None
    (line,) = axes.get_lines()[:1]
    assert line.get_xdata().tolist() == [1.5, 2, 4] and line.get_ydata().tolist() == [1.5, 2, 4]
    rows = [row(fid, 10, sampler=sampler) for fid, sampler in ((3.0, "heun"), (2.0, "ddim"))]
    (axes,) = sweep.figure_of(rows).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["heun", "ddim"]
    assert axes.get_lines()[0].get_ydata().tolist() == [3, 2]


def test_a_metric_that_some_rows_lack_is_drawn_for_the_others():
    rows = [row(1.0, 2, steps="2"), row(2.0, 4, 0.001, steps="4"), row(3.0, 6, 0.002, steps="6")]
    fid, kid = sweep.figure_of(rows).axes
    assert fid.get_lines()[0].get_xdata().tolist() == [2, 4, 6] and kid.get_lines()[0].get_xdata().tolist() == [4, 6]


# Averages


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    for name in ("model000020.pt", "ema_0.9_000020.pt", "ema_0.99_000020.pt", "ema_0.5_000010.pt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", ["model000020.pt", "ema_0.9_000020.pt", "opt000020.pt"])
def test_an_average_is_that_of_the_models_step(model, checkpoints):
    for folder in ("", f"{checkpoints}/"):
        assert sweep.find_checkpoint(f"{folder}{model}", "0.99") == f"{folder or './'}ema_0.99_000020.pt"


def test_without_an_average_the_model_is_what_was_given():
    for ema in ("", "none"):
        assert sweep.find_checkpoint("anything.pt", ema) == "anything.pt"


@pytest.mark.parametrize(
    ("ema", "model", "message"),
    [
        ("0.5", "model000020.pt", r"--ema 0\.5: .*ema_0\.5_000020\.pt does not exist; that step has "
                                  r"ema_0\.99_000020\.pt, ema_0\.9_000020\.pt$"),
        ("0.9", "model000030.pt", r"that step has no EMA$"),
        ("0.9", "mine.pt", r"--ema 0\.9 needs a --model_path such as runs/NAME/model010000\.pt"),
        ("0.9", "", r"--ema 0\.9 needs a --model_path"),
    ],
)  # fmt: skip
def test_an_average_that_is_not_there_is_named_with_those_that_are(ema, model, message, checkpoints):
    with pytest.raises(UserError, match=message):
        sweep.find_checkpoint(model, ema)
