"""Evaluations as processes: what they may be given, how they are doing, cancelling them; reports side by side."""

import json
import os
import subprocess
import time

import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.evaluation.report import Metric, Report
from improved_diffusion.service import evaluations as module
from improved_diffusion.service.commands import CONSOLE_FILE, Process, _state_of
from improved_diffusion.service.evaluations import EVALUATION_FILE, OFFERED, Evaluations

GIVEN = {"samples": "digits", "reference": "real"}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "data" / "real").mkdir(parents=True)
    folder = tmp_path / "runs" / "digits"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples.json").write_text(json.dumps({"image_size": 16}))
    (folder / "config.json").write_text("{}")
    (folder / "log.txt").write_text("")
    return tmp_path / "runs", tmp_path / "data"


@pytest.fixture
def evaluations(places):
    return Evaluations(*places, features="inception")


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    while _state_of(process.pid)[0] != "S":
        time.sleep(0.01)
    yield Process(process.pid, _state_of(process.pid)[1])
    process.kill()
    process.wait()


def begun(evaluations, name, process, console=""):
    folder = f"{evaluations.root.path}/{name}"
    os.makedirs(folder)
    record = {"process": {"pid": process.pid, "started": process.started}, "options": {}}
    for file, text in ((EVALUATION_FILE, json.dumps(record)), (CONSOLE_FILE, console)):
        with open(f"{folder}/{file}", "w") as f:
            f.write(text)
    return folder


def report(**metrics):
    about = {"count": 50, "images": "x", "features_sha256": "1"}
    return Report(**{name: Metric(*values) for name, values in metrics.items()}, samples=about, reference=about)


# Options


def test_a_command_is_made_of_names(evaluations, places):
    words = evaluations.check({**GIVEN, "held_out": "real", "steps": "", "resize": "8"})
    runs, data = map(os.path.realpath, places)
    assert words[:2] == ["evaluate", "--features=inception"]
    assert set(words[2:]) == {f"--samples={runs}/digits", f"--reference={data}/real", f"--held_out={data}/real",
                              "--resize=8"}  # fmt: skip


def test_real_images_take_the_size_of_the_samples(evaluations):
    assert "--resize=16" in evaluations.check(GIVEN)


def test_the_operator_alone_trusts_a_network(places):
    trusting = Evaluations(*places, features="f.pt2", trust_features=True)
    assert "--trust_features=True" in trusting.check(GIVEN)
    assert "--trust_features=True" not in Evaluations(*places, features="f.pt2").check(GIVEN)
    for name in ("features", "logits", "trust_features", "out_dir", "classifier_path", "guide_path"):
        assert name not in OFFERED
        with pytest.raises(UserError, match=f"--{name} cannot be given"):
            trusting.check({**GIVEN, name: "x"})
    with pytest.raises(UserError, match="--features"):
        Evaluations(*places).check(GIVEN)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"reference": ""}, "--reference"), ({"samples": ""}, "--samples"), ({"model_path": "digits"}, "--samples"),
     ({"sampler": "no"}, "--sampler"), ({"nosuch": 3}, "nosuch"), ({"num_samples": "many"}, "--num_samples")],
)  # fmt: skip
def test_a_mistake_is_told_at_once(evaluations, wrong, named):
    with pytest.raises(UserError, match=named):
        evaluations.check({**GIVEN, **wrong})


@pytest.mark.parametrize("option", ["samples", "reference", "held_out", "train_dir"])
@pytest.mark.parametrize("name", ["..", "../data/../..", "/etc", "away", "a\0", "gs://x/y"])
def test_no_path_leads_out_of_the_roots(evaluations, tmp_path, option, name):
    for root in (evaluations.root, evaluations.data_root):
        os.symlink(tmp_path, f"{root.path}/away")
    with pytest.raises(UserError, match=f"--{option}"):
        evaluations.check({**GIVEN, option: name})


# Processes


def test_one_that_runs_shows_its_last_line_and_is_cancelled(evaluations, sleeper):
    folder = begun(evaluations, "first", sleeper, "reading\nfeatures: 40%\n")
    assert evaluations.started() == evaluations.running() == ["first"]
    assert evaluations.progress("first") == module.Progress("running", "features: 40%")
    with pytest.raises(UserError, match="first is being evaluated"):
        evaluations.start("second", GIVEN)
    evaluations.cancel("first")
    assert not sleeper.is_running() and not os.path.exists(folder)
    with pytest.raises(UserError):
        evaluations.cancel("first")


def test_one_that_failed_says_why_and_its_name_is_free(evaluations, monkeypatch):
    begun(evaluations, "first", Process(1, "never"), "loading\nerror: --num_samples 3: too few\n")
    assert evaluations.progress("first") == module.Progress("failed", "--num_samples 3: too few")
    words = []
    monkeypatch.setattr(module, "begin", lambda *given: words.append(given))
    evaluations.start("first", GIVEN)
    assert f"--out_dir={evaluations.root.path}/first" in words[0][0]


def test_one_with_a_report_is_finished_and_kept(evaluations):
    folder = begun(evaluations, "first", Process(1, "never"))
    report(fid=(1.0,)).save(folder)
    assert evaluations.progress("first").state == "finished"
    with pytest.raises(UserError, match="exists already"):
        evaluations.start("first", GIVEN)
    with pytest.raises(UserError, match="not running"):
        evaluations.cancel("first")


@pytest.mark.parametrize("name", ["..", "/tmp", "digits/..", "no", ""])
def test_only_evaluations_are_cancelled_and_only_reports_are_read(evaluations, name):
    for call in (evaluations.cancel, evaluations.progress, evaluations.report, evaluations.pictures):
        with pytest.raises(UserError):
            call(name)


# Reports


def test_samples_models_and_reports_are_found_by_name(evaluations):
    report(fid=(1.0,)).save(f"{evaluations.root.path}/digits/report")
    assert evaluations.samples() == evaluations.models() == ["digits"]
    assert evaluations.reports() == ["digits/report"]
    Image.new("L", (4, 4)).save(f"{evaluations.root.path}/digits/report/report_samples.png")
    assert [text for _, text in evaluations.pictures("digits/report")] == ["samples"]


def test_a_link_is_no_report(evaluations, tmp_path):
    report(fid=(1.0,)).save(tmp_path / "secret")
    os.makedirs(f"{evaluations.root.path}/linked")
    os.symlink(tmp_path / "secret" / "report.json", f"{evaluations.root.path}/linked/report.json")
    with pytest.raises(UserError):
        evaluations.report("linked")


def test_reports_side_by_side_say_which_is_better(evaluations):
    report(fid=(3.0,), precision=(0.5, 0.01), recall=(0.5, 0.1)).save(f"{evaluations.root.path}/one")
    report(fid=(2.0,), precision=(0.6, 0.01), recall=(0.6, 0.1)).save(f"{evaluations.root.path}/two")
    text = evaluations.compare(["one", "two"])
    assert "| FID | 3.0000 | **2.0000** |" in text
    assert "**0.6000 ± 0.0100**" in text and "| 0.6000 ± 0.1000 |" in text
    with pytest.raises(UserError, match="at most"):
        evaluations.compare(["one"] * 7)
