"""evaluate.py: a report on samples that were given or are drawn, references, sweeps, and reports side by side."""

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from feature_helpers import write_script
from script_helpers import TINY_IMAGE, call, contents, pixels, refused, run, write_images

from improved_diffusion import config
from improved_diffusion.evaluation.evaluator import Evaluator
from improved_diffusion.evaluation.metrics.scores import METRICS
from improved_diffusion.sampling.pipeline import SamplingPipeline
from improved_diffusion.utils import files

PICTURES = {"report_samples.png", "report_neighbours.png", "report_distances.png"}
FROM_FEATURES = {"fid", "kid", "precision", "recall", "density", "coverage"}


class Place:
    """Real images of 20x20 and of 8x8, held-out ones, samples, a network, and an unconditional model of 8x8."""

    def __init__(self, folder):
        self.folder = folder
        self.large = write_images(folder / "large", 60)
        self.real = write_images(folder / "real", 60, size=(8, 8))
        self.held_out = write_images(folder / "held_out", 50, size=(8, 8), seed=1)
        self.samples = write_images(folder / "fakes", 50, size=(8, 8), seed=2)
        self.features = write_script(folder / "features.pt", spatial=True, logits=True)
        self.run = folder / "run"
        args = ["--data_dir", self.large, "--batch_size", 4, "--max_steps", 1, "--ema_rate", "0.5,0.9999"]
        call("image_train", *TINY_IMAGE, *args, "--out_dir", self.run, cwd=folder).succeed()
        self.model = self.run / "model000000.pt"
        self.ema = self.run / "ema_0.9999_000000.pt"
        self.real_images = ["--reference", self.real, "--features", self.features]
        plain = write_script(folder / "plain.pt")
        self.drawing = ["--num_samples", 40, "--batch_size", 40, "--reference", self.large, "--features", plain]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("evaluate"))


def read(folder):
    return json.loads((folder / "report.json").read_text())


def evaluated(place, tmp_path, *args, name="report"):
    """The report on the samples, in a folder of its own."""
    flags = ["--samples", place.samples, *place.real_images, *args, "--out_dir", tmp_path / name]
    call("evaluate", *flags, cwd=tmp_path).succeed()
    return read(tmp_path / name)


def zipped(folder):
    """The folder as a zip."""
    return shutil.make_archive(str(folder.parent / f"{folder.name}_zipped"), "zip", folder)


def packed(folder, path):
    """The folder as an npz of images in the same order."""
    np.savez(path, np.stack([pixels(image) for image in sorted(folder.iterdir())]))
    return path


# Samples that are there


def test_a_report_lies_beside_the_samples(place, tmp_path):
    shutil.copytree(place.samples, tmp_path / "fakes")
    args = ["--samples", "fakes", *place.real_images, "--held_out", place.held_out]
    result = call("evaluate", *args, cwd=tmp_path).succeed()
    out = tmp_path / "fakes_report"
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "log.txt", *PICTURES}
    assert f"wrote {out / 'report.md'}" in result.out and "FID: " in result.out and result.err == ""
    report = read(out)
    assert list(report["metrics"]) == list(METRICS) and report["missing"] == {}
    assert report["samples"]["count"] == 50 and report["reference"]["count"] == report["train"]["count"] == 60
    text = (out / "report.md").read_text()
    assert "50 samples" in text and "Not known: there is no samples.json beside them." in text
    for name in PICTURES:
        assert f"]({name})" in text and pixels(out / name).ndim == 3


def test_what_is_not_given_is_not_measured_and_said(place, tmp_path):
    report = evaluated(place, tmp_path)
    assert set(report["metrics"]) == set(METRICS) - {"copies"}
    assert report["missing"] == {
        "copies": "there are no held-out images to compare the distances with: give --held_out"
    }
    assert not (tmp_path / "report/report_distances.png").exists()
    plain = ["--features", place.folder / "plain.pt", "--out_dir", "plain"]
    args = ["--samples", place.samples, "--reference", place.real, *plain]
    call("evaluate", *args, cwd=tmp_path).succeed()
    report = read(tmp_path / "plain")
    assert set(report["metrics"]) == FROM_FEATURES and set(report["missing"]) == {"sfid", "inception_score", "copies"}
    text = (tmp_path / "plain/report.md").read_text()
    assert "No sFID: the network gives no spatial features." in text and "give --logits" in text


def test_a_second_run_writes_the_same_bytes(place, tmp_path):
    evaluated(place, tmp_path, "--held_out", place.held_out)
    before = contents(tmp_path / "report")
    evaluated(place, tmp_path, "--held_out", place.held_out)
    assert contents(tmp_path / "report") == before


def test_two_ranks_write_the_bytes_of_one(place, tmp_path):
    args = ["--samples", place.samples, *place.real_images, "--held_out", place.held_out, "--feature_batch", 7]
    call("evaluate", *args, "--out_dir", "one", cwd=tmp_path).succeed()
    run("mpiexec", 2, "evaluate", *args, "--out_dir", "two", cwd=tmp_path, figures=True).succeed()
    two = contents(tmp_path / "two")
    assert two.pop("log-rank001.txt") and two == contents(tmp_path / "one")


def test_a_set_is_like_itself(place, tmp_path):
    args = ["--samples", place.real, *place.real_images, "--out_dir", "out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    metrics = read(tmp_path / "out")["metrics"]
    assert metrics["fid"]["value"] == pytest.approx(0, abs=1e-6) and metrics["kid"]["value"] < 0
    assert metrics["precision"]["value"] == metrics["recall"]["value"] == metrics["coverage"]["value"] == 1


@pytest.mark.parametrize("form", ["npz", "zip"])
def test_samples_and_references_have_three_forms(form, place, tmp_path):
    if form == "npz":
        samples, real = packed(place.samples, tmp_path / "s.npz"), packed(place.real, tmp_path / "r.npz")
    else:
        samples, real = zipped(place.samples), zipped(place.real)
    flags = ["--samples", samples, "--reference", real, "--features", place.features, "--out_dir", "out"]
    call("evaluate", "score", *flags, cwd=tmp_path).succeed()
    report, expected = read(tmp_path / "out"), evaluated(place, tmp_path)
    assert report["metrics"] == expected["metrics"]
    assert report["samples"]["pixels_sha256"] == expected["samples"]["pixels_sha256"]


def test_as_many_samples_as_asked_are_evaluated(place, tmp_path):
    report = evaluated(place, tmp_path, "--num_samples", 41)
    assert report["samples"]["count"] == 41


def test_grey_images_can_be_treated_as_rgb(place, tmp_path):
    grey = write_images(tmp_path / "grey", 50, size=(8, 8), channels=1)
    args = ["--samples", grey, *place.real_images, "--colour", "True", "--out_dir", "out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    assert read(tmp_path / "out")["samples"]["channels"] == 3


def test_images_of_another_size_are_resized(place, tmp_path):
    args = ["--samples", place.samples, "--reference", place.large, "--features", place.features, "--resize", 8]
    call("evaluate", *args, "--out_dir", "out", cwd=tmp_path).succeed()
    report = read(tmp_path / "out")
    assert report["samples"]["image_size"] == report["reference"]["image_size"] == "8x8"
    assert report["samples"]["prepared"] == "as they are"
    assert report["reference"]["prepared"] == "resized and centre-cropped"


def test_how_samples_were_made_is_reported(place, tmp_path):
    args = ["--model_path", place.ema, "--num_samples", 40, "--batch_size", 40, "--sampler", "heun", "--steps", 2]
    call("image_sample", *args, "--out_dir", "drawn", cwd=tmp_path).succeed()
    call("evaluate", "--samples", "drawn/samples", *place.real_images, cwd=tmp_path).succeed()
    made_by = read(tmp_path / "drawn/samples_report")["samples"]["made_by"]
    assert made_by["average"] == "0.9999" and made_by["evaluations"] == 3 and made_by["sampler"] == "heun"
    text = (tmp_path / "drawn/samples_report/report.md").read_text()
    assert "| average | 0.9999 |" in text and f"| model_path | {place.ema} |" in text


# Copies


def test_copies_are_found(place, tmp_path):
    args = ["--samples", place.real, *place.real_images, "--train_dir", place.real, "--held_out", place.held_out]
    call("evaluate", *args, "--out_dir", "out", cwd=tmp_path).succeed()
    report = read(tmp_path / "out")
    assert report["metrics"]["copies"]["value"] == 1
    assert report["real"]["metrics"]["fid"]["value"] > 10 * report["metrics"]["fid"]["value"]
    assert " held-out real images |" in (tmp_path / "out/report.md").read_text()
    # What real images get is what they would get as samples.
    args = ["--samples", place.held_out, *place.real_images, "--out_dir", "held_out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    assert read(tmp_path / "held_out")["metrics"] == report["real"]["metrics"]


def test_copies_are_shown_beside_what_they_copy(place, tmp_path):
    mixed = shutil.copytree(place.samples, tmp_path / "mixed")
    for i, path in enumerate(sorted(place.real.iterdir())[20:32]):
        shutil.copy(path, mixed / f"{'az'[i % 2]}_copy_{path.name}")  # first and last of the samples
    args = ["--samples", mixed, *place.real_images, "--held_out", place.held_out, "--out_dir", "out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    copies = read(tmp_path / "out")["metrics"]["copies"]
    assert copies["value"] == pytest.approx(0.5 + 0.5 * 12 / 62, abs=3 * copies["error"])
    # Each sample, enlarged to 48 pixels with a border of 2, then a gap of 16 and its neighbours.
    picture = pixels(tmp_path / "out/report_neighbours.png")
    for row in range(10):
        rows = picture[2 + 50 * row : 50 + 50 * row]
        np.testing.assert_array_equal(rows[:, 2:50], rows[:, 52 + 16 + 2 : 52 + 16 + 50])
        assert (rows[:, 2:50] != rows[:, 52 + 16 + 52 : 52 + 16 + 100]).any()


def test_samples_like_held_out_images_are_no_copies(place, tmp_path):
    report = evaluated(place, tmp_path, "--held_out", place.held_out)
    copies = report["metrics"]["copies"]
    assert abs(copies["value"] - 0.5) < 3 * copies["error"] and 0 < copies["error"] < 0.1


def test_the_reference_may_be_what_was_held_out(place, tmp_path):
    args = ["--samples", place.samples, "--reference", place.held_out, "--features", place.features]
    call("evaluate", *args, "--held_out", place.held_out, "--train_dir", place.real, "--out_dir", "a", cwd=tmp_path)
    report = read(tmp_path / "a")
    assert report["held_out"] == report["reference"] and report["real"] is None and "copies" in report["metrics"]


# Samples that are drawn first


def test_a_model_draws_what_image_sample_draws_and_its_reference_is_prepared_alike(place, tmp_path):
    drawing = ["--model_path", place.model, "--num_samples", 40, "--batch_size", 40, "--steps", 2, "--seed", 3]
    real_images = ["--reference", place.large, "--features", place.features]
    call("evaluate", *drawing, *real_images, "--out_dir", "evaluated", cwd=tmp_path).succeed()
    call("image_sample", *drawing, "--out_dir", "drawn", cwd=tmp_path).succeed()
    drawn, there = contents(tmp_path / "drawn"), contents(tmp_path / "evaluated")
    drawn.pop(".samples.lock", None)
    assert len(drawn) == 43 and {name: there.get(name) for name in drawn} == drawn
    report = read(tmp_path / "evaluated")
    assert report["samples"]["made_by"]["average"] == "none: the model itself"
    assert report["samples"]["made_by"]["evaluations"] == 2
    # The real images, of 20x20, as training saw them.
    call("evaluate", "--samples", "evaluated/samples", *real_images, "--resize", 8, "--out_dir", "given", cwd=tmp_path)
    assert read(tmp_path / "given")["reference"] == report["reference"]
    assert read(tmp_path / "given")["metrics"] == report["metrics"]
    # A second run draws nothing again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluated/samples").iterdir()}
    again = call("evaluate", *drawing, *real_images, "--out_dir", "evaluated", cwd=tmp_path).succeed()
    assert f"40 of 40 samples are in {tmp_path / 'evaluated/samples'} already" in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluated/samples").iterdir()} == times
    assert contents(tmp_path / "evaluated") == there


def test_the_report_has_the_loss_on_the_training_images_where_it_is_asked_for(place, tmp_path):
    args = ["--model_path", place.model, "--steps", 2, *place.drawing, "--train_dir", place.large, "--out_dir"]
    call("evaluate", *args, "with", "--loss_floor", "True", cwd=tmp_path).succeed()
    loss = read(tmp_path / "with")["loss"]
    assert loss["images"] == 60 and loss["diffusion_steps"] == 20 and len(loss["levels"]) == 20
    assert all(level["epsilon"]["excess"]["value"] > 0 for level in loss["levels"])
    text = (tmp_path / "with/report.md").read_text()
    assert "on 60 training images" in text and "](report_loss.png)" in text
    assert (tmp_path / "with/report_loss.png").stat().st_size > 10_000
    call("evaluate", *args, "with", cwd=tmp_path).succeed()
    assert "loss" not in read(tmp_path / "with") and not (tmp_path / "with/report_loss.png").exists()


def test_the_loss_needs_a_model_and_its_training_images(place, tmp_path):
    model, floor = ["--model_path", place.model, *place.drawing], ["--loss_floor", "True"]
    refused(call("evaluate", *model, *floor, cwd=tmp_path), "--loss_floor", "--train_dir")
    given = ["--samples", place.samples, *place.real_images, "--train_dir", place.real]
    refused(call("evaluate", *given, *floor, cwd=tmp_path), "--loss_floor", "--model_path")
    refused(call("evaluate", "sweep", *model, "--train_dir", place.large, *floor, cwd=tmp_path), "--loss_floor")
    assert not list(tmp_path.iterdir())


def test_samples_go_into_a_folder_of_their_settings_unless_told(place, tmp_path):
    args = ["--model_path", place.ema, "--steps", 2, *place.drawing]
    call("evaluate", *args, "--sampler", "ddim", cwd=tmp_path).succeed()
    assert read(tmp_path / "runs/run_ema_0.9999_000000_ddim_2steps_seed0")["samples"]["count"] == 40


# References


def test_a_written_reference_stands_for_its_images(place, tmp_path):
    args = ["--images", place.real, "--features", place.features]
    result = call("evaluate", "reference", *args, "--name", "Noise", "--out", "new/ref.npz", cwd=tmp_path).succeed()
    assert "wrote new/ref.npz: Noise, 60 images of 8x8" in result.out
    args = ["--samples", place.samples, "--reference", "new/ref.npz", "--features", place.features]
    call("evaluate", *args, "--out_dir", "out", cwd=tmp_path).succeed()
    report, expected = read(tmp_path / "out"), evaluated(place, tmp_path)
    of_file = {
        "name": "Noise",
        "file": str(tmp_path / "new/ref.npz"),
        "file_sha256": files.sha256(tmp_path / "new/ref.npz"),
    }
    assert report["reference"] == {**expected["reference"], **of_file}
    assert set(report["metrics"]) == set(expected["metrics"])
    for name, metric in expected["metrics"].items():
        assert report["metrics"][name] == pytest.approx(metric, rel=1e-9)
    assert "against 60 real images, Noise." in (tmp_path / "out/report.md").read_text()
    assert report["missing"]["copies"].startswith("there are no training images")
    # With images besides, copies can be looked for.
    args += ["--train_dir", place.real, "--held_out", place.held_out, "--out_dir", "out"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    both = evaluated(place, tmp_path, "--held_out", place.held_out)
    assert read(tmp_path / "out")["metrics"]["copies"] == both["metrics"]["copies"]


def test_statistics_with_some_images_give_every_metric(place, tmp_path):
    """Such as those of OpenAI's ADM: the FID is of the statistics, what compares images of the images."""
    call("evaluate", "reference", "--images", place.held_out, "--features", place.features, "--out", "ref.npz",
         cwd=tmp_path).succeed()  # fmt: skip
    with np.load(tmp_path / "ref.npz") as arrays:
        real = [pixels(path) for path in sorted(place.real.iterdir())]
        np.savez(tmp_path / "both.npz", mu=arrays["mu"], sigma=arrays["sigma"], arr_0=np.stack(real))
    args = ["--samples", place.samples, "--reference", "both.npz", "--features", place.features, "--out_dir", "out"]
    result = call("evaluate", *args, cwd=tmp_path).succeed()
    found, of_images = read(tmp_path / "out")["metrics"], evaluated(place, tmp_path)["metrics"]
    args[3] = place.held_out
    call("evaluate", *args, cwd=tmp_path).succeed()
    of_statistics = read(tmp_path / "out")["metrics"]
    assert found["fid"] == pytest.approx(of_statistics["fid"], rel=1e-9)
    for name in ("kid", "precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(of_images[name], rel=1e-9)
    assert "warning: the statistics of the reference do not say which network" in result.out


def test_published_statistics_give_a_fid_and_a_warning(place, tmp_path):
    call("evaluate", "reference", "--images", place.real, "--features", place.features, "--out", "ref.npz",
         cwd=tmp_path).succeed()  # fmt: skip
    with np.load(tmp_path / "ref.npz") as ref:
        np.savez(tmp_path / "published.npz", mu=ref["mu"], sigma=ref["sigma"])
    args = ["--samples", place.samples, "--reference", "published.npz", "--features", place.features]
    result = call("evaluate", *args, "--out_dir", "out", cwd=tmp_path).succeed()
    report = read(tmp_path / "out")
    expected = evaluated(place, tmp_path)["metrics"]
    assert set(report["metrics"]) == {"fid", "inception_score"}
    assert report["metrics"]["fid"]["value"] == pytest.approx(expected["fid"]["value"], rel=1e-9)
    for name in ("kid", "precision", "recall", "density", "coverage"):
        assert report["missing"][name] == "the reference has statistics only: it needs images or their features"
    assert report["missing"]["sfid"] == "the reference has no spatial features"
    assert "warning: the statistics of the reference do not say which network" in result.out
    assert (
        "**Warning:** the statistics of the reference do not say which network"
        in (tmp_path / "out/report.md").read_text()
    )
    assert f"against statistics of real images, {tmp_path / 'published.npz'}." in (
        (tmp_path / "out/report.md").read_text()
    )


# Sweeps


def sweep(place, tmp_path, *args, model=None):
    flags = ["--model_path", model or place.ema, *place.drawing, "--out_dir", "out", *args]
    return call("evaluate", "sweep", *flags, cwd=tmp_path)


def draw_no_plots(monkeypatch):
    """The slowest part of a sweep."""
    monkeypatch.setattr("improved_diffusion.evaluation.sweep.save_figure", lambda path, *figure: None)


def counted(monkeypatch):
    """How often samples are drawn and evaluated from here on."""
    calls = []
    for owner, name in ((SamplingPipeline, "write"), (Evaluator, "evaluate")):
        plain = getattr(owner, name)

        def noted(self, *args, plain=plain, name=name):
            calls.append(name)
            return plain(self, *args)

        monkeypatch.setattr(owner, name, noted)
    return calls


def test_a_sweep_reports_every_combination_and_goes_on_where_it_stopped(place, tmp_path, monkeypatch):
    settings = ["--steps", "2,4", "--sampler=ddim,heun"]
    result = sweep(place, tmp_path, *settings).succeed()
    out = tmp_path / "out"
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["chosen"] for row in rows] == [
        {"sampler": sampler, "steps": steps} for sampler in ("ddim", "heun") for steps in ("2", "4")
    ]
    assert [row["evaluations"] for row in rows] == [2, 4, 3, 7]
    table = (out / "sweep.md").read_text()
    assert pixels(out / "sweep.png").ndim == 3 and f"wrote {out / 'sweep.md'}" in result.out
    for row in rows:
        report = read(out / row["folder"])
        assert row["folder"] == f"sampler{row['chosen']['sampler']}_steps{row['chosen']['steps']}"
        assert report["metrics"] == row["metrics"] and report["samples"]["count"] == 40
        assert {name: str(report["samples"]["made_by"][name]) for name in row["chosen"]} == row["chosen"]
        cells = [*row["chosen"].values(), str(row["evaluations"]), f"{row['metrics']['fid']['value']:.4f}"]
        assert f"| {' | '.join(cells)} |" in table and f"]({row['folder']}/report.md)" in table

    # The same again makes nothing again.
    before = contents(out)
    draw_no_plots(monkeypatch)
    calls = counted(monkeypatch)
    again = sweep(place, tmp_path, *settings).succeed()
    assert calls == [] and again.out.count("has the report already") == 4 and contents(out) == before

    # A report that is damaged is made again, and so is what a longer list adds; samples are kept.
    (out / "samplerddim_steps2/report.json").write_text("{")
    (out / "samplerheun_steps4/samples/000007.png").unlink()
    (out / "samplerheun_steps4/report.json").unlink()
    sweep(place, tmp_path, *settings).succeed()
    assert calls == ["write", "evaluate"] * 2 and contents(out) == before


@pytest.fixture
def without_plots(monkeypatch):
    draw_no_plots(monkeypatch)


def test_a_sweep_for_other_samples_or_another_reference_evaluates_again(place, tmp_path, monkeypatch, without_plots):
    sweep(place, tmp_path, "--steps", "2,3").succeed()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("steps*/samples/*")}
    assert len(times) == 80
    calls = counted(monkeypatch)
    sweep(place, tmp_path, "--steps", "2,3", "--num_samples", 42).succeed()
    assert calls == ["write", "evaluate"] * 2
    rows = json.loads((tmp_path / "out/sweep.json").read_text())
    for row in rows:
        assert read(tmp_path / "out" / row["folder"])["samples"]["count"] == 42
    result = sweep(place, tmp_path, "--steps", "2,3", "--num_samples", 42, "--reference", place.real).succeed()
    assert calls == ["write", "evaluate"] * 4 and "42 of 42 samples are in" in result.out
    assert read(tmp_path / "out/steps2")["reference"]["images"] == str(place.real)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # the first samples were drawn once


def test_two_ranks_sweep_as_one_does(place, tmp_path, without_plots):
    settings = ["--steps", "2,3", "--batch_size", 20, "--feature_batch", 20]  # so that both have work
    sweep(place, tmp_path, *settings).succeed()
    shutil.copytree(tmp_path / "out", tmp_path / "two/out")
    shutil.rmtree(tmp_path / "two/out/steps3")
    flags = ["--model_path", place.ema, *place.drawing, *settings, "--out_dir", tmp_path / "two/out"]
    result = run("mpiexec", 2, "evaluate", "sweep", *flags, cwd=tmp_path).succeed()
    assert result.out.count("has the report already") == 1
    one, two = (json.loads((folder / "out/sweep.json").read_text()) for folder in (tmp_path, tmp_path / "two"))
    assert two == one


def test_a_sweep_of_averages_finds_them_beside_the_model(place, tmp_path, without_plots):
    sweep(place, tmp_path, "--ema", "0.5,0.9999", "--steps", 2, "--out_dir", "", model=place.model).succeed()
    for average in ("0.5", "0.9999"):
        folder = tmp_path / f"runs/run_model000000_sweep_seed0/ema{average}_steps2"
        made_by = read(folder)["samples"]["made_by"]
        assert made_by["average"] == average and made_by["model_path"] == str(place.run / f"ema_{average}_000000.pt")


# Reports side by side


def test_reports_are_compared(place, tmp_path):
    first = evaluated(place, tmp_path, name="first")
    args = ["--samples", place.held_out, *place.real_images, "--out_dir", tmp_path / "second"]
    call("evaluate", *args, cwd=tmp_path).succeed()
    before = contents(tmp_path)
    result = call("evaluate", "compare", "first", "second/report.json", cwd=tmp_path).succeed()
    assert contents(tmp_path) == before  # no more than printed
    lines = result.out.splitlines()
    assert lines[0] == "| | first | second |"
    second = read(tmp_path / "second")
    assert f"| FID | {first['metrics']['fid']['value']:.4f} | {second['metrics']['fid']['value']:.4f} |" in lines
    assert f"| samples: images | {place.samples} | {place.held_out} |" in lines
    assert not any("| reference: " in line for line in lines) and "Warning" not in result.out
    # Folders of one name go by their paths.
    shutil.copytree(tmp_path / "second", tmp_path / "new/first")
    result = call("evaluate", "compare", "first", "new/first", cwd=tmp_path).succeed()
    assert result.out.startswith("| | first | new/first |\n")
    # With a folder, the text and the pictures side by side.
    result = call("evaluate", "compare", "first", "second", "--out_dir", "both", cwd=tmp_path).succeed()
    assert "wrote both/compare.md" in result.out
    text = (tmp_path / "both/compare.md").read_text()
    assert "| | first | second |" in text and "](compare.png)" in text
    left = pixels(tmp_path / "first/report_samples.png")
    np.testing.assert_array_equal(pixels(tmp_path / "both/compare.png")[8:, 8:][: len(left), : left.shape[1]], left)


def test_reports_that_cannot_be_compared_say_so(place, tmp_path):
    evaluated(place, tmp_path, name="a")
    other = write_script(tmp_path / "other.pt", seed=5)
    args = ["--samples", place.samples, "--reference", place.held_out, "--features", other, "--num_samples", 45]
    call("evaluate", *args, "--out_dir", "b", cwd=tmp_path).succeed()
    out = call("evaluate", "compare", "a,b", cwd=tmp_path).succeed().out
    for what in ("features", "numbers of samples, on which FID depends", "references"):
        assert f"Warning: the reports are of different {what}: their numbers cannot be compared." in out
    assert "| samples: count | 50 | 45 |" in out and "| samples: features | features.pt | other.pt |" in out
    assert "| inception score |" in out  # which only one has


# Help


def test_help_lists_the_commands(tmp_path):
    out = call("evaluate", "--help", cwd=tmp_path).succeed().out
    for name in ("score", "reference", "sweep", "compare"):
        assert f"  {name}" in out
    assert "usage: evaluate.py COMMAND [--flag value ...]" in out


@pytest.mark.parametrize("name, groups", [
    ("score", [config.EvaluationConfig, config.FeaturesConfig, config.SampleConfig, config.GuidanceConfig]),
    ("reference", [config.ReferenceConfig, config.FeaturesConfig]),
    ("sweep", [config.EvaluationConfig, config.SweepConfig, config.SamplerConfig, config.RunConfig]),
    ("compare", [config.CompareConfig]),
])  # fmt: skip
def test_help_of_each_command_has_its_flags(name, groups, tmp_path):
    out = call("evaluate", name, "--help-all", cwd=tmp_path, env={"COLUMNS": "1000"}).succeed().out
    assert f"usage: evaluate.py {name} [--flag value ...]" in out
    for f in (f for group in groups for f in fields(group)):
        assert f"--{f.name} " in out and f.metadata["help"] in " ".join(out.split())
