"""From a trained model to a student that samples in a few steps, and what is refused on the way."""

import os
import shutil

import numpy as np
import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import contents, write_images
from train_helpers import assert_sets_equal

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.cli.main import dispatch
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Distilling, ImageDistillation, ImageModel, SuperResModel
from improved_diffusion.logs import curves
from improved_diffusion.models.factories import create_model_and_diffusion
from improved_diffusion.sampling.guided import to_device
from improved_diffusion.training.distillation import teacher
from improved_diffusion.training.distillation.consistency import keep_stages, qs_of, stage_length_of
from improved_diffusion.training.distillation.teacher import chosen_prediction

# With few steps, RAdam would stand still.
QUICK = dict(num_workers=0, batch_size=4, max_steps=4, save_interval=100, dropout=0.1, optimizer="adamw", lr=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teachers with classes, with none and of super-resolution; images; a finished student of the first."""
    place = tmp_path_factory.mktemp("distill")
    save_checkpoint(place / "cats.pt", tiny_settings(ImageModel, class_cond=True, num_classes=2), class_names=CLASSES)
    save_checkpoint(place / "plain.pt", tiny_settings(ImageModel, predict_v=True))
    save_checkpoint(place / "other.pt", tiny_settings(ImageModel, class_cond=True, num_classes=2, num_heads=2),
                    class_names=CLASSES)  # fmt: skip
    cats = dict(class_cond=True, num_classes=2)
    save_checkpoint(place / "hidden.pt", tiny_settings(ImageModel, **cats, label_drop=0.1), class_names=CLASSES)
    save_checkpoint(place / "last.pt", tiny_settings(ImageModel, predict_v=True, zero_terminal_snr=True))
    save_checkpoint(place / "grey.pt", tiny_settings(ImageModel, channels=1))
    large = tiny_settings(SuperResModel, image_size=None, large_size=8, small_size=4)
    save_checkpoint(place / "large.pt", large)
    write_images(place / "photos", 8, size=(8, 8))
    idf.distill(place / "cats.pt", place / "photos", out_dir=str(place / "run"), **QUICK)
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def facts_of(path):
    return checkpoint.load(str(path))[1]["distilled"]


# The student


def test_what_help_calls_the_teachers_is_the_teachers(place):
    of_training = {"labels": "folder", "random_flip": True, "total_batch_size": 6}
    trained = {**tiny_settings(resize_mode="stretch", background="black", dropout=0.1).values(), **of_training}
    save_checkpoint(place / "told.pt", tiny_settings(), config=trained)
    student, _ = teacher.take_teacher(Distilling.of({"teacher": "told.pt", "student_prediction": "eps"}), frozenset())
    values = {**student.values(), "batch_size": student.train.total_batch_size}
    trained["batch_size"] = 6
    named = {name for name, text in Distilling.shown_defaults.items() if text == "the teacher's"}
    assert named >= {*of_training, "image_size", "num_channels", "noise_schedule", "resize_mode", "batch_size"}
    common = named & values.keys()
    assert common <= trained.keys() and {name: values[name] for name in common} == {n: trained[n] for n in common}


def test_the_student_starts_as_the_teacher_and_moves(made):
    start, end = (checkpoint.load(str(made / f"run/model00000{step}.pt"))[0] for step in (0, 4))
    teacher = checkpoint.load(str(made / "cats.pt"))[0]
    assert start.keys() == teacher.keys() == end.keys()
    assert max((start[name] - teacher[name]).abs().max() for name in teacher) < 2e-3  # after one step
    moved = [name for name in teacher if not th.equal(end[name], teacher[name])]
    assert len(moved) > len(teacher) // 2


def test_the_student_says_whose_it_is_and_samples_in_few_steps(place, capsys):
    facts = facts_of("run/ema_0.9993_000004.pt")
    expected = dict(method="consistency", sampler="renoise", steps=4, teacher_prediction="eps")
    assert {name: facts[name] for name in expected} == expected and len(facts["teacher_sha256"]) == 64
    student = idf.load("run")
    few = student.sample(2, classes=[0, 1], progress=False)
    same = student.sample(2, classes=[0, 1], sampler="renoise", steps=4, progress=False)
    np.testing.assert_array_equal(few.array, same.array)
    assert len(list(student.sample_steps(1, classes=[0], timestep_grid="trailing"))) == 4
    assert len(list(student.sample_steps(1, classes=[0], timestep_grid="sigma:5,0.5"))) == 2
    for options in (dict(steps=2), dict(sampler="ddim", steps=4), dict(use_ddim=True, steps=4)):
        other = student.sample(2, classes=[0, 1], progress=False, **options)
        assert (other.array != few.array).any()
    dispatch(["sample", "--model_path", "run", "--num_samples", "2", "--classes", "cat,dog", "--out_dir", "drawn"])
    assert "renoise, 4 steps, 4 evaluations" in capsys.readouterr().out
    teacher = idf.load("cats.pt")
    assert len(list(teacher.sample_steps(1))) == 20


def test_its_weights_load_in_the_published_code(made):
    published, _ = create_model_and_diffusion(
        8, True, True, False, 32, 1, 1, -1, "4", 0.0, 20, "cosine", "", False, False, True, True, False, True,
        num_classes=2, channel_mult="1,1",
    )  # fmt: skip
    published.load_state_dict(th.load(made / "run/model000004.pt", weights_only=True))


@pytest.mark.parametrize("teacher, option, predicts", [
    ("eps", "auto", "v"), ("v", "auto", "v"), ("x0", "auto", "x0"),
    ("eps", "teacher", "eps"), ("v", "teacher", "v"), ("eps", "x0", "x0"), ("v", "eps", "eps"),
])  # fmt: skip
def test_one_step_is_not_left_to_a_student_that_predicts_the_noise(teacher, option, predicts):
    assert chosen_prediction(option, teacher) == predicts


def test_the_same_command_continues(place):
    idf.distill("cats.pt", "photos", out_dir="run", resume="auto", student_prediction="auto", **QUICK)
    diffusion = idf.load("run").settings.diffusion
    assert diffusion.predict_v and not diffusion.predict_xstart


@pytest.mark.parametrize("prediction, flags", [("v", (True, False)), ("x0", (False, True)), ("eps", (False, False))])
def test_a_student_may_predict_something_else(place, prediction, flags):
    teacher = idf.load("plain.pt")
    student = idf.distill(teacher, "photos", out_dir="new", student_prediction=prediction, to=1, **QUICK)
    diffusion = student.settings.diffusion
    assert (diffusion.predict_v, diffusion.predict_xstart) == flags
    assert facts_of("new/model000004.pt")["teacher_prediction"] == "v"
    assert len(list(student.sample_steps(1))) == 1


def test_a_student_of_super_resolution(place, monkeypatch):
    drawn = []
    monkeypatch.setattr("improved_diffusion.training.run.write_curves", lambda *given: drawn.append(given[2]))
    student = idf.distill("large.pt", "photos", out_dir="new", val_dir="photos", val_interval=2, sample_interval=2,
                          to=2, **QUICK)  # fmt: skip
    assert student.is_super_resolution and os.path.exists("new/best.pt")
    assert drawn == [curves.DISTILLATION_PANELS]
    assert sorted(os.listdir("new/previews"))[0] == "step_000002.png"
    small = np.zeros((1, 4, 4, 3), np.uint8)
    few, same = (
        student.upscale(small, progress=False, **options) for options in ({}, dict(sampler="renoise", steps=2))
    )
    np.testing.assert_array_equal(few.array, same.array)


def test_a_student_of_a_guided_teacher(place):
    student = idf.distill("hidden.pt", "photos", out_dir="new", guidance_scale=2, **QUICK)
    assert len(list(student.sample_steps(1, classes="cat"))) == 4
    resumed = idf.distill("hidden.pt", "photos", out_dir="new", resume="auto", max_steps=5, num_workers=0)
    assert resumed.step == 5
    with pytest.raises(UserError, match=r"a teacher guided at --guidance_scale 2\.0, and needs no guidance"):
        student.sample(1, guidance_scale=3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [
    dict(guidance_scale=2), dict(method="progressive", steps=4, to=2, student_prediction="v"),
])  # fmt: skip
def test_a_teacher_computes_in_the_precision_that_auto_means(place, monkeypatch, options, precision):
    made = []
    monkeypatch.setattr("improved_diffusion.distributed.computes_bf16", lambda device: precision == "bf16")
    monkeypatch.setattr(teacher, "to_device", lambda *given: made.append(given[1]) or to_device(*given))
    idf.distill("hidden.pt", "photos", out_dir="new", precision="auto", **{**QUICK, **options, "max_steps": 2})
    assert made == [precision] == [checkpoint.load("new/model000002.pt")[1]["config"]["precision"]]


@pytest.mark.parametrize("method", [{}, dict(method="progressive", steps=4, to=2)])
def test_a_student_starts_from_other_weights_of_its_form(place, method):
    save_checkpoint(place / "moved.pt", tiny_settings(predict_v=True), steps=1, images=np.zeros((2, 8, 8, 3), np.uint8))
    idf.distill("plain.pt", "photos", out_dir="new", init_checkpoint="moved.pt", **{**QUICK, **method, "lr": 1e-6})
    start = checkpoint.load("new/model000000.pt")[0]
    nearer, other = (checkpoint.load(name)[0] for name in ("moved.pt", "plain.pt"))
    assert max((start[name] - nearer[name]).abs().max() for name in start) < 1e-5
    assert max((start[name] - other[name]).abs().max() for name in start) > 1e-3


def test_a_teacher_that_knows_a_part_of_its_timesteps_is_warned_of(place):
    save_checkpoint(place / "part.pt", tiny_settings(timestep_respacing="5"))
    student = idf.distill("part.pt", "photos", out_dir="new", **QUICK)
    assert "part.pt was trained with --timestep_respacing 5" in (place / "new/log.txt").read_text()
    assert len(list(student.sample_steps(1))) == 4


# Resuming


def test_resuming_is_exact(place):
    options = {**QUICK, "microbatch": 2, "val_dir": "photos", "val_interval": 2, "save_interval": 2}
    idf.distill("cats.pt", "photos", out_dir="whole", **options)
    shutil.copytree("whole", "parts")
    for name in os.listdir("parts"):
        if name.endswith(("000004.pt", "000004.json")):
            os.remove(os.path.join("parts", name))
    dispatch(["distill", "--resume", "auto", "--data_dir", "photos", "--out_dir", "parts"])
    assert_sets_equal(place / "whole", place / "parts", 4)
    assert facts_of("parts/model000004.pt") == facts_of("whole/model000004.pt")


def test_a_run_goes_on_with_its_own_teacher_wherever_that_is_now(place):
    os.rename("cats.pt", "moved.pt")
    idf.distill("moved.pt", "photos", out_dir="run", resume="auto", max_steps=5, num_workers=0)
    assert facts_of("run/model000005.pt") == facts_of("run/model000004.pt")


@pytest.mark.parametrize("asked, expected", [
    (dict(), [0, 1, 2, 3]),
    (dict(max_steps=12), [0, 1, 2, 3]),
    (dict(max_steps=12, max_q=32), [0, 1, 2, 3, 4]),
    (dict(max_steps=12, q_steps=0), [0, 3, 6, 9]),
    (dict(max_steps=12, q_steps=2), [0, 2, 4, 6]),
])  # fmt: skip
@pytest.mark.parametrize("of_lr", [False, True])
def test_more_steps_prolong_the_last_stage(place, asked, expected, of_lr):
    given = dict(max_steps=0, lr_anneal_steps=4) if of_lr else dict(max_steps=4)
    began = ImageDistillation.of({**tiny_settings().values(), "max_q": 16, **given})
    metadata = {"config": began.values(), "distilled": {"teacher_prediction": "eps"}}
    settings = keep_stages(began.replace(**asked), frozenset(asked), metadata)
    again = keep_stages(
        settings.replace(max_steps=20), frozenset({"max_steps"}), {**metadata, "config": settings.values()}
    )
    for each in (settings, again) if asked.get("q_steps") != 0 else (settings,):
        assert stage_length_of(each, "eps") == expected[1]
        assert len(qs_of(each, "eps")) == len(expected)


def test_a_finished_run_goes_on_where_its_stages_were(place):
    idf.distill("cats.pt", "photos", out_dir="run", resume="auto", max_steps=20, num_workers=0)
    log = (place / "run/log.txt").read_text()
    assert "q (in training steps): 1 in 1, 2 in 1, 4 in 1, 8 in 1\n" in log  # of the first start, for fewer than all
    assert "q (in training steps): 1 in 1, 2 in 1, 4 in 1, 8 in 1, 16 in 16\n" in log
    assert checkpoint.load("run/model000020.pt")[1]["config"]["q_steps"] == 1


# What is refused


@pytest.mark.parametrize("options, named", [
    (dict(teacher=""), "--teacher is missing"),
    (dict(teacher="none.pt"), "--teacher none.pt does not exist"),
    (dict(image_size=16), "--image_size 16 contradicts cats.pt"),
    (dict(channels=1), "--channels 1 contradicts cats.pt"),
    (dict(num_classes=3), "--num_classes 3 contradicts cats.pt"),
    (dict(class_cond=False), "--class_cond False contradicts cats.pt"),
    (dict(noise_schedule="linear"), "--noise_schedule linear contradicts cats.pt"),
    (dict(diffusion_steps=1000), "--diffusion_steps 1000 contradicts cats.pt"),
    (dict(predict_v=True), "--predict_v True contradicts cats.pt"),
    (dict(large_size=64), "--large_size is not for cats.pt, which is an image model"),
    (dict(teacher="large.pt", image_size=8), "--image_size is not for large.pt, which is a super-resolution model"),
    (dict(guidance_scale=2, label_drop=0.1), "--guidance_scale 2.0: cats.pt was never trained with its class hidden"),
    (dict(teacher="plain.pt", guidance_scale=2), "--guidance_scale 2.0: plain.pt has no classes"),
    (dict(teacher="hidden.pt", guidance_scale=2, max_q=4), "--max_q 4 is too small for --guidance_scale 2.0"),
    (dict(to=21), "--to 21: the teacher was trained with 20 noise levels"),
    (dict(timestep_respacing="5"), "--timestep_respacing 5 is not for distillation"),
    (dict(out_dir="run", resume="auto", timestep_respacing="5"), "--timestep_respacing 5 is not for distillation"),
    (dict(teacher="grey.pt"), "the model has --channels 1: convert the images to grey or, for a new model"),
    (dict(teacher="plain.pt", label_drop=0.1), "the model has none: leave it out or, for a new model"),
    (dict(init_checkpoint="plain.pt"), "--init_checkpoint plain.pt does not fit the model"),
    (dict(teacher="plain.pt", init_checkpoint="large.pt"), "--init_checkpoint large.pt does not fit the model"),
    (dict(teacher="last.pt", student_prediction="eps"), "--student_prediction eps, for last.pt: --zero_terminal_snr"),
    (dict(schedule_sampler="loss-second-moment"), "--schedule_sampler loss-second-moment"),
    (dict(max_steps=0, lr_schedule="constant"), "--max_steps 0"),
    (dict(max_q=12), "--max_q 12"),
    (dict(steps=3), "--steps is for --method progressive, not consistency: leave it out or, for a student of 3 steps"),
    (dict(method="progressive", steps=8, max_q=8), "--max_q is for --method consistency, not progressive"),
    (dict(loss_floor=True), "--loss_floor"),
    (dict(out_dir="run"), "run holds checkpoints of an earlier run"),
    (dict(out_dir="run", resume="auto", teacher="other.pt"), "--teacher other.pt is not the teacher of"),
    (dict(out_dir="run", resume="auto", student_prediction="eps"), "--student_prediction eps contradicts"),
    (dict(out_dir="run", resume="auto", to=2), "--to 2 contradicts"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(options, named, place):
    before = contents(place)
    asked = {"teacher": "cats.pt", "out_dir": "new", "max_steps": 4, "num_workers": 0, **options}
    with pytest.raises(UserError) as refused:
        idf.distill(asked.pop("teacher"), "photos", **asked)
    assert named in str(refused.value)
    assert contents(place) == before


def test_images_of_other_classes_are_refused(place):
    for name in os.listdir("photos"):
        if name.startswith("cat"):
            os.rename(f"photos/{name}", f"photos/owl{name[3:]}")
    with pytest.raises(UserError, match=r"photos has the classes \['dog', 'owl'\] but cats.pt has"):
        idf.distill("cats.pt", "photos", out_dir="new", **QUICK)


def test_a_student_is_not_trained_on_by_train_nor_a_plain_run_by_distill(place):
    with pytest.raises(UserError, match="improved-diffusion distill continues it"):
        idf.train("photos", resume="run", max_steps=6, num_workers=0)
    tiny = dict(image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1", diffusion_steps=20,
                noise_schedule="cosine", num_workers=0, max_steps=1, batch_size=2)  # fmt: skip
    idf.train("photos", out_dir="plain", **tiny)
    with pytest.raises(UserError, match="is not from a distillation: give"):
        idf.distill("cats.pt", "photos", resume="plain", max_steps=6, num_workers=0)


def test_a_damaged_description_of_a_student_is_refused(place):
    state_dict, metadata = checkpoint.load("run/model000004.pt")
    unknown = {**metadata, "distilled": {**metadata["distilled"], "sampler": "shuffle"}}
    checkpoint.save_state_dict(state_dict, "newer.pt", unknown)
    with pytest.raises(UserError, match="as its file says, the model is for 4 steps of shuffle: unknown --sampler"):
        idf.load("newer.pt").sample(1)
    for damage in ({"steps": 0}, {"steps": "4"}, {"sampler": 3}, {"method": None}):
        broken = {**metadata, "distilled": {**metadata["distilled"], **damage}}
        checkpoint.save_state_dict(state_dict, "broken.pt", broken)
        with pytest.raises(UserError, match=r"broken\.pt holds a damaged description"):
            idf.load("broken.pt")
