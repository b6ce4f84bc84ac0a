"""The picture of a run's curves."""

import csv
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.logs import curves, logger

# fontTools and pyparsing, which matplotlib imports, warn about themselves on some versions of Python
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, sorted({key for row in rows for key in row}), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(n, every=10):
    """The rows of a run that has everything."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(n):
        loss = 0.03 + np.exp(-i / 50)
        row = {"step": i * every, "samples": i * every * 8, "mse": loss, "vb": loss * random.lognormal(-2, 1),
               "loss": 1.1 * loss, "grad_norm": random.gamma(2, 0.1), "grad_norm_clipped": 0.1, "lr": 1e-4,
               "lg_loss_scale": 20 + i / 1000, "images_per_second": 400 + random.normal(), "data_wait": 0.03,
               "skipped_steps": 0.0, "note": "text"}  # fmt: skip
        row.update({f"loss_q{q}": loss / (q + 1) for q in range(4)})
        if i % 20 == 19:
            row.update({"val_loss": loss, "val_loss_ema_0.9999": loss, "val_bpd": 4.0, "val_bpd_se": 0.1})
            row.update({f"{name}_q{q}": loss / (q + 1) for name in ("train_mse", "val_mse") for q in range(4)})
            row.update({"floor_q0": 1e-30, **{f"floor_q{q}": 0.01 / q for q in (1, 2, 3)}})
            row.update({"val_bpd_ema_0.9999": 3.5 + loss, "val_bpd_ema_0.9999_se": 0.2})
        rows.append(row)
    return rows


def panels(path):
    return {axes.get_title(loc="left"): axes for axes in curves.figure_of(path).axes}


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_run_with_everything_has_every_panel(tmp_path):
    shown = panels(write_csv(tmp_path / "progress.csv", run(100)))
    assert list(shown) == [panel.title for panel in curves.PANELS]
    assert labels(shown["Training loss"]) == ["loss", "mse", "vb"]
    assert labels(shown["Training loss by quarter of the timesteps"]) == [
        "q0 (least noise)", "q1", "q2", "q3 (most noise)"
    ]  # fmt: skip
    assert labels(shown["Validation loss"]) == labels(shown["Validation bound, ± standard error"])
    assert labels(shown["Validation loss"]) == ["model", "EMA 0.9999"]
    assert [axes.get_yscale() for axes in shown.values()] == ["log"] * 5 + ["linear", "log"] + ["linear"] * 5
    assert shown["Speed"].get_ylabel() == "images/s"
    assert len({axes.get_xlim() for axes in shown.values()}) == 1


def test_what_a_distillation_validates_is_called_what_it_is(tmp_path):
    path = write_csv(tmp_path / "progress.csv", run(100))
    shown = {axes.get_title(loc="left"): axes for axes in curves.figure_of(path, curves.DISTILLATION_PANELS).axes}
    assert shown.keys() - panels(path).keys() == {"Energy distance to held-out images"}
    assert shown["Energy distance to held-out images"].get_ylabel() == "energy distance"
    assert panels(path).keys() - shown.keys() == {"Validation loss"}


def test_floors_are_dashed_and_leave_the_scale_to_the_loss(tmp_path):
    axes = panels(write_csv(tmp_path / "progress.csv", run(100)))[
        "Squared error on training images by quarter, and its floor (dashed)"
    ]
    solid, dashed = ([line for line in axes.lines if line.get_linestyle() == style] for style in ("-", "--"))
    assert [line.get_color() for line in solid] == [line.get_color() for line in dashed] and len(dashed) == 4
    lowest = min(np.nanmin(line.get_ydata()) for line in solid)
    assert axes.get_ylim()[0] == pytest.approx(lowest / 10)


def test_panels_without_columns_are_left_out(tmp_path):
    rows = [{"step": i, "loss": 1.0 / (i + 1), "val_loss": "nan"} for i in range(5)]
    [(title, axes)] = panels(write_csv(tmp_path / "progress.csv", rows)).items()
    assert title == "Training loss" and axes.get_legend() is None


def test_the_png_holds_a_picture_that_is_not_white(tmp_path):
    write_csv(tmp_path / "progress.csv", run(100))
    curves.write_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 1200
    colored = (pixels.max(2) - pixels.min(2) > 60).mean(1)  # the share of each row of pixels
    for part in np.array_split(colored, 4):  # ten panels in three columns
        assert part.max() > 0.01


def test_losses_that_are_not_all_positive_have_a_linear_axis(tmp_path):
    rows = [{"step": i, "loss": 10.0**-i, "vb": -0.001 if i == 2 else 0.1} for i in range(4)]
    assert panels(write_csv(tmp_path / "progress.csv", rows))["Training loss"].get_yscale() == "linear"


def values(axes, line=0):
    return axes.lines[line].get_xydata()


def test_a_curve_breaks_at_nan_and_where_its_cells_stay_empty(tmp_path):
    rows = [{"step": i, "lr": float(i)} for i in range(40)]
    rows[5]["lr"] = "nan"
    rows[6]["lr"] = "inf"
    for i in range(20, 30):
        del rows[i]["lr"]
    drawn = values(panels(write_csv(tmp_path / "progress.csv", rows))["Learning rate"])
    xs = list(drawn[np.isfinite(drawn[:, 1])][:, 0])
    assert xs == [i for i in range(40) if i not in (5, 6) and not 20 <= i < 30]
    broken = np.flatnonzero(np.isnan(drawn[:, 1]))
    assert [drawn[i - 1, 0] for i in broken] == [4, 5, 19]


def test_values_that_are_seldom_logged_make_a_whole_curve_with_its_band(tmp_path):
    shown = panels(write_csv(tmp_path / "progress.csv", run(100)))
    axes = shown["Validation bound, ± standard error"]
    np.testing.assert_array_equal(values(axes), [[step, 4.0] for step in (190, 390, 590, 790, 990)])
    assert axes.lines[0].get_marker() == "o"
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(3.9), pytest.approx(4.1))
    assert len(axes.collections) == 2


def test_a_noisy_curve_is_pale_below_its_trend(tmp_path):
    random = np.random.default_rng(0)
    rows = [{"step": i, "loss": 0.1 * random.lognormal(0, 0.3)} for i in range(2000)]
    rows[1000]["loss"] = 1e3  # an outlier leaves the trend alone
    axes = panels(write_csv(tmp_path / "progress.csv", rows))["Training loss"]
    raw, trend = axes.lines
    assert raw.get_alpha() < 0.5 and len(raw.get_xydata()) == 2000 and len(trend.get_xydata()) <= 500
    smooth = values(axes, 1)[20:, 1]
    assert smooth.min() > 0.085 and smooth.max() < 0.115


def test_the_trend_follows_a_fast_fall_at_the_start(tmp_path):
    loss = np.exp(-np.arange(1000) / 3) + 0.01
    x, y = curves._running_median(np.arange(1000.0), loss)
    np.testing.assert_allclose(y, np.interp(x, np.arange(1000), loss), rtol=1e-6, atol=2e-3)


def test_the_trend_breaks_where_the_curve_does():
    y = np.ones(1000)
    y[501] = np.nan  # no multiple of the spacing of the places
    x, trend = curves._running_median(np.arange(1000.0), y)
    assert list(x[np.isnan(trend)]) == [501]


def test_rows_of_a_log_that_was_torn_or_written_twice_are_drawn_in_order(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_bytes(b"loss,step\r\n3,20\r\n2,10\r\n1,0\r\n7,\r\n0.5,\0\r\n9\r\n")
    drawn = values(panels(path)["Training loss"])
    np.testing.assert_array_equal(drawn, [[0, 1], [10, 2], [20, 3]])


def test_one_row_is_drawn(tmp_path):
    write_csv(tmp_path / "progress.csv", run(1))
    curves.write_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("text", ["", "loss,step\n", "step,samples\n1,2\n", "loss,samples\n1,2\n", "loss,step\n1,\n"])
def test_a_log_without_rows_to_draw_is_named(tmp_path, text):
    (tmp_path / "progress.csv").write_text(text)
    with pytest.raises(UserError, match=r"progress\.csv has no rows"):
        curves.write_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*progress\.csv: No such file"):
        curves.write_curves(tmp_path / "progress.csv", tmp_path / "curves.png")


def test_what_the_logger_writes_is_what_is_read(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv"])
    for row in ({"step": 0, "loss": 1.0}, {"step": 10, "loss": float("nan"), "val_loss": 2.0}):
        logger.logkvs(row)
        logger.dumpkvs()
    shown = panels(tmp_path / "progress.csv")
    assert list(values(shown["Validation loss"])[0]) == [10, 2]
    assert list(values(shown["Training loss"])[0]) == [0, 1]


def test_ten_thousand_rows_take_seconds(tmp_path):
    write_csv(tmp_path / "progress.csv", run(10_000))
    started = time.process_time()
    curves.write_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    assert time.process_time() - started < 10  # 1.5 here


def test_the_users_own_plots_are_left_alone(tmp_path):
    write_csv(tmp_path / "progress.csv", run(5))
    code = (
        "import sys, matplotlib\n"
        "before = str(list(dict.items(matplotlib.rcParams)))\n"
        "from improved_diffusion.logs import curves\n"
        f"curves.write_curves({str(tmp_path / 'progress.csv')!r}, {str(tmp_path / 'curves.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert str(list(dict.items(matplotlib.rcParams))) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
