"""The tab that trains: its form is the command's options, and it shows what is new."""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.config.presets import PRESETS
from improved_diffusion.config.recipes import AUTO, RECIPES
from improved_diffusion.config.settings import ImageTraining, path_options
from improved_diffusion.logs.run_folder import Claims
from improved_diffusion.service.trainings import OFFERED, Status, Trainings
from improved_diffusion.web import train
from improved_diffusion.web.form import groups
from improved_diffusion.web.live import culprit, log_view, mistake


def build(make):
    """Build a part of the page. Gradio makes an event loop, and leaves it open, where none is running."""

    async def made():
        with gr.Blocks(), gr.Tabs(), gr.Tab("Train") as tab:
            return make(tab)

    return asyncio.get_event_loop().run_until_complete(made())


@pytest.fixture
def built(tmp_path):
    """The tab's two halves, built as in the page."""
    (tmp_path / "data" / "digits").mkdir(parents=True)
    Image.new("L", (8, 8), 7).save(tmp_path / "data" / "digits" / "a.png")
    trainings = Trainings(tmp_path / "runs", tmp_path / "data")

    def make(tab):
        form, view = train.RunForm(trainings), train.RunView(trainings)
        form.connect(tab, view)
        view.connect(tab)
        return SimpleNamespace(form=form, view=view, trainings=trainings)

    return build(make)


def test_each_option_has_one_control_with_the_help_of_the_command(built):
    controls = built.form.form.controls
    assert controls.keys() == OFFERED.keys()
    for name, control in controls.items():
        if name != "data_dir":
            assert control.info == ImageTraining.options()[name].metadata["help"]


def test_only_options_that_are_listed_hold_paths():
    assert OFFERED.keys() & path_options() == {*train._LISTED}


def test_the_groups_are_those_of_the_help(built):
    titles = [(group.__doc__ or "").partition(".")[0] for group in ImageTraining.groups().values()]
    found = groups(ImageTraining, OFFERED, {*train.FIRST, "data_dir"})
    assert [title for title in titles if title in found] == list(found)
    assert {name for names in found.values() for name in names} | {*train.FIRST, "data_dir"} == OFFERED.keys()


def test_an_empty_form_gives_nothing_but_what_was_chosen(built):
    form = built.form.form
    given = {control: control.value for control in form.controls.values()}
    given[form.controls["data_dir"]] = "digits"
    words = built.trainings.check({**form.options(given), "preset": AUTO})
    assert sorted(words) == sorted(["train", "--preset=auto", f"--data_dir={built.trainings.data_root.path}/digits"])


@pytest.mark.parametrize("preset", ["", AUTO, *RECIPES, "cifar10-hybrid"])
def test_an_empty_control_says_what_the_option_will_be(preset):
    for name in OFFERED:
        text = train.placeholder(name, preset)
        options = {**PRESETS, **RECIPES}[preset].options if preset not in ("", AUTO) else {}
        if name in options:
            assert text == f"preset: {options[name]}"
        elif preset == AUTO and name in RECIPES["small-32"].options:
            assert text == "chosen by auto"
    assert train.placeholder("batch_size", "small-32").startswith("preset: 16")


def test_a_mistake_stands_beside_its_option_and_opens_its_group(built):
    form = built.form.form
    shown = form.beside(UserError("--grad_clip -1 must not be <b>negative</b>"))
    assert "<b>" not in shown[form.controls["grad_clip"]].info and "negative" in shown[form.controls["grad_clip"]].info
    assert shown[form.places["grad_clip"]].open is True
    assert form.beside(UserError("the disk is full")) == {}
    assert {component.info for component in form.helps().values()} == {c.info for c in form.controls.values()}


def test_an_error_that_names_an_option_first_is_of_that_option():
    names = {"lr", "max_steps"}
    assert culprit(UserError("--lr_schedule linear needs an end: give --max_steps"), names) == "max_steps"
    assert culprit(UserError("--lr -1"), names) == "lr" and culprit(UserError("no"), names) is None


def test_a_wrong_form_starts_nothing(built):
    form = built.form.form
    given = {control: control.value for control in form.controls.values()}
    given |= {built.form.name: "", built.form.preset: AUTO, form.controls["lr"]: "fast"}
    for starts in (True, False):
        *_, last = built.form._submit(given, starts)
        assert "--data_dir" in last[built.form.message] and last[built.form.start].interactive
    given[form.controls["data_dir"]] = "../.."
    *_, last = built.form._submit(given, True)
    assert "--data_dir" in last[built.form.message] and built.trainings.names() == []


def test_only_what_is_new_is_sent(built):
    view, runs = built.view, built.trainings.root.path
    os.makedirs(f"{runs}/mine/previews")
    for name in ("log.txt", "progress.csv", "config.json", "progress.jsonl"):
        with open(f"{runs}/mine/{name}", "w") as f:
            f.write("{}" if name == "config.json" else "")
    with Claims() as claims:
        claims.claim([f"{runs}/mine"])
        shown = view._look(None, "loss", {})
        assert shown[view.runs].value == "mine" and "another program" in shown[view.state]
        assert not shown[view.stop].interactive and not shown[view.resume].interactive
        seen = shown[view.seen]
        assert view._look("mine", "loss", seen).keys() == {view.seen}
        with open(f"{runs}/mine/progress.jsonl", "a") as f:
            f.write(json.dumps({"step": 4, "loss": 0.5}) + "\n")
        Image.new("L", (8, 8)).save(f"{runs}/mine/previews/step_000004.png")
        shown = view._look("mine", "loss", seen)
    assert shown.keys() == {view.seen, view.state, view.stop, view.resume, view.column, view.curve, view.previews}
    assert "5 steps" in shown[view.state]
    assert shown[view.curve].value["data"] == [[4.0, 0.5]]
    assert [text for _, text in shown[view.previews]] == ["step 4"]


def test_the_menu_of_curves_opens_again_for_every_run_that_is_chosen(built):
    view, runs = built.view, built.trainings.root.path
    for name, column in (("first", "loss"), ("second", "val_loss")):
        os.makedirs(f"{runs}/{name}")
        for file, text in (("config.json", "{}"), ("log.txt", ""), ("progress.csv", "")):
            Path(runs, name, file).write_text(text)
        Path(runs, name, "progress.jsonl").write_text(json.dumps({"step": 4, column: 0.5}) + "\n")
    seen, column = {}, "loss"
    for name, columns in (("first", ["loss"]), ("second", ["val_loss"]), ("second", ["val_loss"])):
        shown = view._look_again(name, column, seen)
        menu, seen = shown[view.column], shown[view.seen]
        assert menu.interactive and [value for _, value in menu.choices] == columns
        column = columns[0] if menu.value is None else menu.value
        assert column in columns


@pytest.mark.parametrize("show", [mistake, log_view])
def test_what_comes_from_files_is_no_markup(show):
    assert "<script" not in show("<script>alert(1)</script>")


def test_a_status_says_what_is_known():
    text = train.describe(Status(name="x", state="failed", reason="no <space>", step=9, steps=20, loss=0.25))
    assert "failed" in text and "10 of 20 steps" in text and "loss 0.25" in text and "no &lt;space&gt;" in text
    assert "step" not in train.describe(Status(name="x", state="starting"))


def test_the_page_is_there_without_a_folder_of_images(tmp_path):
    places = SimpleNamespace(runs=str(tmp_path / "runs"), data_root=str(tmp_path / "none"))
    build(lambda tab: train.build_train(places))
