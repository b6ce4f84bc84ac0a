"""Reports: what they say, in which order they are written, and what tells that two cannot be compared."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from script_helpers import contents

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import report
from improved_diffusion.evaluation.comparison import comparison, write_comparison
from improved_diffusion.evaluation.metrics.scores import METRICS
from improved_diffusion.evaluation.report import Metric, Neighbours, Pictures, Report
from improved_diffusion.utils import files, images
from improved_diffusion.utils.figures import png_of


def made(**more):
    """A report on 50 samples with two metrics."""
    return Report.from_dict(content(**more))


def content(**more):
    """The same, as in report.json."""
    about = {"images": "/data/a", "count": 50, "image_size": "8x8", "channels": 3, "features_sha256": "01"}
    return {
        "samples": {**about, "made_by": None},
        "reference": {**about, "images": "/data/b", "count": 12000, "pixels_sha256": "02"},
        "train": None,
        "held_out": None,
        "metrics": {"fid": {"value": 12.34567}, "kid": {"value": -0.00012, "error": 0.00345}},
        "real": None,
        "missing": {"sfid": "the network gives no spatial features"},
        "warnings": [],
        "pictures": {"neighbours": False, "distances": False},
        "asked": {},
        "versions": {"improved_diffusion": "0.1"},
        **more,
    }


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


# One report


def test_every_metric_is_explained():
    assert set(report.EXPLAINED) == set(METRICS)


def test_numbers_have_their_errors_and_the_kid_is_in_thousandths():
    assert report.number("fid", Metric(12.34567)) == "12.3457"
    assert report.number("recall", Metric(0.5, 0.05)) == "0.5000 ± 0.0500"
    assert report.number("kid", Metric(-0.00012, 0.00345)) == "-0.1200 ± 3.4500"
    assert report.title("kid") == "KID x 1000" and report.title("copies") == "copy score"


def test_the_text_says_what_was_measured_and_what_was_not():
    text = made(warnings=["only 50 samples"]).markdown()
    assert "50 samples, /data/a,\nagainst 12,000 real images, /data/b." in text
    assert "| metric | 50 samples |  |" in rows(text)
    assert any(row.startswith("| FID | 12.3457 | ") for row in rows(text))
    assert any(row.startswith("| KID x 1000 | -0.1200 ± 3.4500 | ") for row in rows(text))
    assert "No sFID: the network gives no spatial features." in text and "**Warning:** only 50 samples." in text
    assert "| count | 50 | 12000 |" in rows(text) and "| pixels_sha256 |  | 02 |" in rows(text)
    assert "Not known: there is no samples.json beside them." in text and text.endswith("\nimproved_diffusion 0.1\n")
    assert "(report_samples.png)" in text and "report_neighbours" not in text and "report_distances" not in text


def test_the_text_has_a_column_of_what_real_images_get():
    text = made(
        real={"count": 1200, "metrics": {"fid": {"value": 3.0}}}, pictures={"neighbours": True, "distances": True}
    ).markdown()
    assert "| metric | 50 samples | 1,200 held-out real images |  |" in rows(text)
    assert any(row.startswith("| FID | 12.3457 | 3.0000 | ") for row in rows(text))
    assert any(row.startswith("| KID x 1000 | -0.1200 ± 3.4500 |  | ") for row in rows(text))
    assert len({row.count("|") for row in rows(text)[:4]}) == 1
    assert "(report_neighbours.png)" in text and "(report_distances.png)" in text


def test_the_text_names_training_images_and_statistics_without_a_count():
    text = made(reference={"images": "/b.npz"}, train={"count": 1234, "images": "/t"}).markdown()
    assert "against statistics of real images, /b.npz." in text and "Training images: 1,234, /t." in text


def test_how_samples_were_made_stands_in_one_order():
    made_by = {"b": 1, "a": 2, "seed": 3, "model_path": "/x|y", "steps": 4, "classes": None}
    found = rows(made(samples={**content()["samples"], "made_by": made_by}).markdown())[-6:]
    assert found == [
        "| model_path | /x\\|y |",
        "| steps | 4 |",
        "| seed | 3 |",
        "| classes |  |",
        "| a | 2 |",
        "| b | 1 |",
    ]


def test_a_row_of_the_picture_is_a_sample_and_its_neighbours():
    near = Neighbours(noise(3, 8, 8, 1), noise(3 * 5, 8, 8, 1).reshape(3, 5, 8, 8, 1))
    picture = near.picture()
    assert picture.shape == (2 + 3 * 50, 52 + report.GAP + 2 + 5 * 50, 1)
    for row in range(3):
        line = picture[2 + 50 * row :: 6][:8]  # enlarged six times
        np.testing.assert_array_equal(line[:, 2:50:6], near.samples[row])
        for k in range(5):
            left = 52 + report.GAP + 2 + 50 * k
            np.testing.assert_array_equal(line[:, left : left + 48 : 6], near.train[row, k])


def with_pictures(count=4, channels=3, neighbours=None, distances=None, **more):
    shown = {"neighbours": neighbours is not None, "distances": distances is not None}
    return replace(made(pictures=shown, **more), pictures=Pictures(noise(count, 8, 8, channels), neighbours, distances))


def test_a_plot_that_cannot_be_drawn_is_left_out_and_the_report_says_why(tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("no matplotlib")

    monkeypatch.setattr(report, "png_of", fail)
    with_pictures(distances=(np.ones(4), np.ones(4))).save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"\((\w+\.png)\)", text) == ["report_samples.png"]
    assert "No report_distances.png: no matplotlib." in text.splitlines()
    assert Report.read(str(tmp_path)).shown["distances"] is False
    assert not (tmp_path / "report_distances.png").exists()


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    near = Neighbours(noise(1, 8, 8, 3), noise(1, 2, 8, 8, 3))
    full = with_pictures(neighbours=near, distances=(np.ones(4), np.ones(4)))
    path = full.save(tmp_path)
    names = {"report_samples.png", "report_neighbours.png", "report_distances.png", "report.md", "report.json"}
    assert {each.name for each in tmp_path.iterdir()} == names and path == str(tmp_path / "report.md")
    assert json.loads((tmp_path / "report.json").read_text()) == full.to_dict()
    assert (tmp_path / "report.md").read_text() == full.markdown()

    # An attempt that fails at the last file leaves what was there.
    before, plain = contents(tmp_path), files._write_file

    def fail(path, data, durable):
        if "report.json" in path.name:
            raise OSError(28, "No space left on device")
        plain(path, data, durable)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*report\.json: No space left"):
        patch.setattr(files, "_write_file", fail)
        with_pictures(warnings=["another"]).save(tmp_path)
    assert contents(tmp_path) == before
    # One without some of the pictures removes those of the report before.
    with_pictures().save(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"report_samples.png", "report.md", "report.json"}


def test_numbers_are_attributes_with_their_errors():
    found = made()
    assert found.fid.value == float(found.fid) == 12.34567 and found.fid.error is None
    assert (found.kid.value, found.kid.error) == (-0.00012, 0.00345) and str(found.kid) == "-0.0001 ± 0.0034"
    assert found.sfid is None and list(found.metrics) == ["fid", "kid"] and "sfid" in found.missing
    assert found.to_dict() == content()


def test_a_notebook_shows_the_text_without_pictures_that_are_not_there():
    assert "| FID | 12.3457 |" in made()._repr_markdown_() and ".png" not in made()._repr_markdown_()


@pytest.mark.parametrize("value", [
    "x\n\n# FID: 0.0001\n", "# FID: 0.0001", "~~~", "<script>alert(1)</script>", "a](http://x) <script>",
    "\u202ex\u2028# FID", "x\r# FID", "x" * 10**6, "<img src=x onerror=alert(1)>", "&lt;script&gt;",
    "![x](http://a/b.png)", "a | b", "\x1b[2K`x`", ["# a\n", 1],
])  # fmt: skip
def test_what_comes_from_files_is_one_line_of_plain_text(value):
    plain = made(samples={**content()["samples"], "made_by": {"model_path": "x"}}).markdown()
    about = {**content()["samples"], "made_by": {"model_path": value}}
    text = made(samples=about).markdown()
    assert len(text.splitlines()) == len(plain.splitlines())
    assert "<script" not in text and "[x]" not in text and "\x1b" not in text and "\n# FID" not in text
    text = str(value)
    named = {**content()["reference"], "name": text, "images": text}
    other = made(
        samples={**about, "images": text, text: 1}, reference=named, train=named, warnings=[text],
        missing={"sfid": text}, versions={text: text},
    )  # fmt: skip
    for shown in (other.markdown(), comparison([other, made()], [text, "b"])):
        assert "<script" not in shown and "<img" not in shown and "[x]" not in shown and "\n# FID" not in shown
        assert "](http://x)" not in shown.replace("\\](", "") and "\n~~~" not in shown and len(shown) < 50_000
        assert all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize(
    ("samples", "held_out"),
    [
        (np.linspace(1, 2, 50), np.linspace(1.5, 3, 60)),
        (np.zeros(50), np.zeros(60)),
        (np.zeros(50), np.linspace(1, 2, 60)),
        (np.full(40, 9.0), np.linspace(1, 2, 60_000)),
    ],
)
def test_any_distances_can_be_drawn(samples, held_out):
    assert images.decode_png(png_of(report.plot_distances, samples, held_out)).shape == (400, 700, 4)


# Several


def test_reading_takes_the_file_or_its_folder(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(content()))
    for path in (tmp_path, tmp_path / "report.json"):
        assert Report.read(str(path)) == made()


MEANS = {name: {"value": 0.125, "error": None} for name in ("loss", "floor", "excess")}
LOSS = {"target": "v", "images": 12, "memorised": ["it *knows*"], "levels": [{"timesteps": [0, 9], "v": MEANS}]}


def test_the_loss_by_noise_level_is_read_and_shown(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(content(loss=LOSS)))
    text = Report.read(str(tmp_path)).markdown()
    assert "| 0 to 9 | 0.125 | 0.125 | 0.125 |" in text and r"it \*knows\*." in text and "on 12 training images" in text
    assert "training images, and its floor" not in made().markdown()  # also of a report from before there was one


WRONG = [
    {"metrics": {"fid": {}}}, {"metrics": {"fid": {"value": "12"}}}, {"metrics": {"fid": {"value": None}}},
    {"metrics": {"fid": {"value": float("nan")}}}, {"metrics": {"fid": {"value": 10**400}}},
    {"metrics": {"fid": {"value": True}}}, {"metrics": {"fid": {"value": 1, "error": "x"}}}, {"metrics": []},
    {"metrics": {"fid": 3}}, {"samples": []}, {"samples": None}, {"samples": {"images": "a"}},
    {"samples": {"count": 5}}, {"samples": {"images": "a", "count": "5"}}, {"samples": {"images": 3, "count": 5}},
    {"samples": {"images": "a", "count": -5}}, {"samples": {"images": "a", "count": 5, "made_by": [1]}},
    {"samples": {"images": "a", "count": 5, "made_by": {"steps": {"a": 1}}}},
    {"samples": {"images": "a", "count": 5, "x": {"a": 1}}}, {"samples": {"images": "a", "count": 10**30}},
    {"reference": {}}, {"reference": {"images": "a", "count": 1.5}}, {"train": [1]}, {"train": {"images": "t"}},
    {"real": 3}, {"real": {"count": "4", "metrics": {}}}, {"missing": {"other": "x"}}, {"missing": {"fid": 3}},
    {"warnings": [3]}, {"warnings": None}, {"versions": {"torch": 2}}, {"versions": []}, {"pictures": 3},
    {"asked": 3}, {"loss": 3}, {"loss": {"levels": []}}, {"loss": {**LOSS, "target": []}},
    {"loss": {**LOSS, "images": "x"}}, {"loss": {**LOSS, "memorised": [3]}}, {"loss": {**LOSS, "levels": [3]}},
    {"loss": {**LOSS, "levels": [{"timesteps": [0, "x"], "v": MEANS}]}},
    {"loss": {**LOSS, "levels": [{"timesteps": [0, 9], "v": {**MEANS, "floor": {"value": "1", "error": None}}}]}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", [
    b"", b"3", b"null", b"\xff\xfe", b"[" * 200_000, b"{}",
    *(json.dumps({**content(), **changed}).encode() for changed in WRONG),
])  # fmt: skip
def test_what_is_no_report_is_named(wrong, tmp_path):
    (tmp_path / "report.json").write_bytes(wrong)
    with pytest.raises(UserError, match=r"report\.json is not a report of the evaluate command, or is damaged"):
        Report.read(str(tmp_path))


def test_reports_of_one_measurement_differ_in_what_differs():
    first = made(samples={**content()["samples"], "made_by": {"steps": 10, "seed": 0}})
    second = made(samples={**content()["samples"], "made_by": {"steps": 20, "seed": 0, "churn": 3}}, metrics={
        "fid": {"value": 5.0}, "recall": {"value": 0.25, "error": 0.01},
    })  # fmt: skip
    assert comparison([first, second], ["a", "b"]) == (
        "| | a | b |\n"
        "|---|---|---|\n"
        "| FID | 12.3457 | 5.0000 |\n"
        "| KID x 1000 | -0.1200 ± 3.4500 |  |\n"
        "| recall |  | 0.2500 ± 0.0100 |\n"
        "| steps | 10 | 20 |\n"
        "| churn |  | 3 |\n"
    )


@pytest.mark.parametrize(
    ("part", "key", "what"),
    [
        ("samples", "features_sha256", "different features"),
        ("samples", "feature_size", "images resized differently for the features"),
        ("samples", "count", "different numbers of samples, on which FID depends"),
        ("samples", "logits_sha256", "inception scores of different classifiers"),
        ("samples", "lossy_files", "some lossily compressed files and some that are not"),
        ("reference", "pixels_sha256", "different references"),
    ],
)
def test_reports_of_other_measurements_are_told_apart(part, key, what):
    other = made(**{part: {**content()[part], key: 77 if key == "count" else "77"}})
    text = comparison([made(), made(), other], ["a", "b", "c"])
    assert text.startswith(f"Warning: the reports are of {what}: their numbers cannot be compared.\n")
    assert text.count("Warning") == 1 and f"| {part}: {key} | " in text


def test_statistics_are_told_apart_by_their_files():
    reports = [made(reference={"images": "/r.npz", "file_sha256": name}) for name in ("a", "b")]
    assert "different references" in comparison(reports, ["a", "b"])
    assert "Warning" not in comparison([reports[0], reports[0]], ["a", "b"])


def test_pictures_of_several_sizes_and_channels_stand_side_by_side(tmp_path):
    reports = []
    for name, shape in (("a", (4, 8, 8, 1)), ("b", (11, 8, 8, 3))):
        (tmp_path / name).mkdir()
        with_pictures(shape[0], shape[3]).save(tmp_path / name)
        reports.append(Report.read(str(tmp_path / name)))
    folders = [str(tmp_path / name) for name in "ab"]
    path = write_comparison(str(tmp_path / "new/both"), reports, ["a", "b"], folders)
    assert path == str(tmp_path / "new/both/compare.md")
    picture = images.decode_png((tmp_path / "new/both/compare.png").read_bytes())
    left, right = (images.decode_png((tmp_path / name / "report_samples.png").read_bytes()) for name in "ab")
    for array, x in ((left, 8), (right, 8 + right.shape[1] + 8)):
        shown = picture[8 : 8 + array.shape[0], x : x + array.shape[1]]
        np.testing.assert_array_equal(shown, np.broadcast_to(array, shown.shape))
    (tmp_path / "a/report_samples.png").unlink()
    write_comparison(str(tmp_path / "text"), reports, ["a", "b"], folders)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["compare.md"]


def two_reports(tmp_path):
    """(reports, names, folders) of two reports with pictures."""
    for name in "ab":
        (tmp_path / name).mkdir()
        with_pictures(4, 3).save(tmp_path / name)
    folders = [str(tmp_path / name) for name in "ab"]
    return [Report.read(folder) for folder in folders], ["a", "b"], folders


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_of_any_channels_stands_beside_an_rgb_one(tmp_path, channels):
    reports, names, folders = two_reports(tmp_path)
    array = np.full((40, 30, channels), 100, np.uint8)
    if channels in (2, 4):
        array[..., -1] = 255
        array[:, 15:, -1] = 0
    (tmp_path / "b/report_samples.png").write_bytes(images.encode_png(array))
    write_comparison(str(tmp_path / "both"), reports, names, folders)
    picture = images.decode_png((tmp_path / "both/compare.png").read_bytes())
    x = picture.shape[1] - images.decode_png((tmp_path / "a/report_samples.png").read_bytes()).shape[1] - 8
    assert picture.shape[-1] == 3 and (picture[8:48, x : x + 15] == 100).all()
    assert (picture[8:48, x + 15 : x + 30] == (255 if channels in (2, 4) else 100)).all()


@pytest.mark.parametrize("shape", [(1, 10**4, 1), (10**4, 1, 1)], ids=["wide", "tall"])
def test_pictures_that_are_too_large_side_by_side_are_named(tmp_path, shape, monkeypatch):
    monkeypatch.setattr("improved_diffusion.evaluation.comparison.MAX_IMAGE_PIXELS", 10**5)
    reports, names, folders = two_reports(tmp_path)
    (tmp_path / "b/report_samples.png").write_bytes(images.encode_png(np.zeros(shape, np.uint8)))
    with pytest.raises(UserError, match=r"b/report_samples\.png is .*too large"):
        write_comparison(str(tmp_path / "both"), reports, names, folders)


@pytest.mark.parametrize("mode", ["I;16", "1", "too many pixels"])
def test_a_picture_that_no_report_has_is_named(tmp_path, mode, monkeypatch):
    reports, names, folders = two_reports(tmp_path)
    picture = Image.new("L" if mode == "too many pixels" else mode, (300, 300))
    picture.save(tmp_path / "b/report_samples.png")
    if mode == "too many pixels":
        (tmp_path / "a/report_samples.png").write_bytes(images.encode_png(np.zeros((8, 8, 3), np.uint8)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"b/report_samples\.png is damaged"):
        write_comparison(str(tmp_path / "both"), reports, names, folders)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("__x__", r"\_\_x\_\_"),
        ("_y_", r"\_y\_"),
        ("a _b_ c", r"a \_b\_ c"),
        ("val_loss_q0", "val_loss_q0"),
        ("ema_0.9999_010000.pt", "ema_0.9999_010000.pt"),
        ("https://evil.example/x", r"https\://evil.example/x"),
        ("www.evil.com", r"www\.evil.com"),
        ("WWW.evil.com", r"WWW\.evil.com"),
        ("C: a", "C: a"),
        ("[a](b) *c* `d` <e> ~f~ |", r"\[a\](b) \*c\* \`d\` &lt;e&gt; \~f\~ \|"),
    ],
)
def test_a_value_of_a_file_is_shown_without_markup(text, shown):
    assert report.escape(text) == shown
