"""Progressive distillation against closed forms, its stages, and what a run leaves and resumes."""

import copy
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gaussian_world import MU, GaussianWorld, S
from helpers import make_diffusion
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import contents, write_images
from train_helpers import assert_sets_equal, load, make_loop, small_diffusion, small_model

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.cli.main import dispatch
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageDistillation, ImageModel
from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.sampling.guidance import ClassifierFreeGuidance
from improved_diffusion.sampling.timestep_grids import timestep_grid
from improved_diffusion.training.distillation.progressive import Progressive, levels_of
from improved_diffusion.training.distillation.teacher import Teacher
from improved_diffusion.training.flops import training_flops
from improved_diffusion.training.step import Unfinished
from improved_diffusion.utils import files

KINDS = {"eps": ModelMeanType.EPSILON, "v": ModelMeanType.VELOCITY, "x0": ModelMeanType.START_X}
QUICK = dict(method="progressive", num_workers=0, batch_size=4, max_steps=4, save_interval=100, dropout=0.1)


def progressive(teacher="v", student="v", T=64, steps=8, to=2, schedule="cosine", made=None, **options):
    """The method for a student of `student`, and a teacher that is given or predicts `teacher`."""
    settings = ImageDistillation.of({
        "image_size": 8, "diffusion_steps": T, "noise_schedule": schedule, "method": "progressive", "steps": steps,
        "to": to, "max_steps": 40, "predict_v": student == "v", "predict_xstart": student == "x0",
        "rescale_timesteps": False, **options,
    })  # fmt: skip
    made = made or Teacher(settings, {"teacher_prediction": teacher})
    return Progressive(settings, build_diffusion(settings.diffusion), made)


def gaussian_teacher(kind, T, steps, to, schedule):
    """The exact network of Gaussian pixels as a teacher, and its diffusion on its own levels."""
    base = GaussianWorld(T, schedule=schedule).diffusion.base_alphas_cumprod
    levels = levels_of(steps, to, base, "trailing")
    world = GaussianWorld(T, len(levels), schedule, KINDS[kind], ModelVarType.FIXED_SMALL, ",".join(map(str, levels)))
    return SimpleNamespace(prediction=kind, guided=world.model, diffusion=world.diffusion), world


def constant(said):
    """A network that says the same of every x."""
    return lambda x, t: said


def steps_of_ddim(diffusion, model, x, start, count, **kwargs):
    """x after some steps of DDIM, from level `start` of a diffusion."""
    for t in range(start, start - count, -1):
        x = diffusion.ddim_sample(model, x, th.full((len(x),), t), **kwargs)["sample"]
    return x


# Levels, stages, learning rate


@pytest.mark.parametrize("T, steps, to", [(1000, 64, 4), (1000, 8, 1), (4000, 256, 2), (1000, 96, 3), (20, 20, 5)])
def test_the_student_starts_from_the_levels_that_sampling_visits(T, steps, to):
    alpha_bar = GaussianWorld(T).diffusion.base_alphas_cumprod
    levels = levels_of(steps, to, alpha_bar, "trailing")
    np.testing.assert_allclose(levels[steps // to - 1 :: steps // to], timestep_grid("trailing", to, alpha_bar))
    assert len(levels) == steps and (np.diff(levels) > 0).all() and levels[0] >= 0 and levels[-1] == T - 1
    if T % to == 0:
        np.testing.assert_allclose((levels + 1) / T, np.arange(1, steps + 1) / steps)  # Salimans & Ho 2022, alg. 2


def test_more_steps_than_noise_levels_are_refused():
    with pytest.raises(UserError, match="--steps 128 are too many for a teacher with 64 noise levels"):
        progressive(steps=128)


@pytest.mark.parametrize("teacher, student, total, expected", [
    ("v", "v", 40, [(16, 0, 13), (8, 13, 27), (4, 27, 40)]),
    ("x0", "x0", 3, [(16, 0, 1), (8, 1, 2), (4, 2, 3)]),
    ("eps", "v", 10, [(16, 0, 6), (8, 6, 8), (4, 8, 10)]),
    ("v", "x0", 10, [(16, 0, 6), (8, 6, 8), (4, 8, 10)]),
])  # fmt: skip
def test_the_steps_are_halved_stage_by_stage(teacher, student, total, expected):
    ready = SimpleNamespace(prediction=teacher, guided=None)
    made = progressive(teacher, student, steps=32, to=4, max_steps=total, made=ready)
    assert made.stages == [(number, *stage) for number, stage in enumerate(expected)]
    assert made.restarts == [first for _, first, _ in expected[1:]]
    for number, (steps, first, end) in enumerate(expected):
        made.predecessor.teaches = number
        for step in (first, end - 1):
            made.at_step(step)
            assert made.stage.number == number and len(made.levels.t) == steps
        np.random.seed(0)
        t, weights = made.sample(300, th.device("cpu"))
        assert (weights == 1).all() and set(t.tolist()) == set(made.levels.t.astype(np.float32).tolist())


def test_the_learning_rate_falls_to_0_in_each_stage_and_the_optimizer_begins_anew(out_dir):
    made, teacher = trainable("v", steps=8, to=1, max_steps=12)
    loop = make_loop(
        model=copy.deepcopy(teacher.module).requires_grad_(True), diffusion=made, data=GaussianData(), lr=1.0,
        lr_schedule="linear", schedule_sampler=made, hooks=made.hooks(), max_steps=12, ema_sigma_rel="0.1",
        ema_warmup=True,
    )  # fmt: skip
    rates, moments, averages = [], [], []
    for step in range(12):
        before = [p.detach().clone() for p in loop.master_params]
        loop.run_step(*next(loop.data))
        loop._call_hooks()
        rates.append(loop.opt.param_groups[0]["lr"])
        moments.append(int(next(iter(loop.opt.state.values()))["step"]))
        share = loop.emas[0].share(step % 4)
        fresh = [old.lerp(new.detach(), share) for old, new in zip(before, loop.master_params)]
        averages.append(all(th.allclose(a, b) for a, b in zip(loop.emas[0].params, fresh)))
        loop.step += 1
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25] * 3)
    assert moments == [1, 2, 3, 4] * 3
    assert [step for step in range(12) if averages[step]] == [0, 4, 8]
    made, _ = trainable("v", steps=8, to=1, max_steps=12)
    rectified = make_loop(diffusion=made, optimizer="radam", lr_schedule="linear", max_steps=12).lr_schedule
    assert [rectified.at(step, 1.0) for step in range(4)] == [rectified.at(step, 1.0) for step in range(8, 12)]


# The target. Two steps of DDIM with exact predictions of x_0, of v or of the noise.


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, steps, to", [(64, 8, 2), (50, 12, 3)])
def test_one_step_by_the_target_ends_where_two_of_the_teacher_do(T, steps, to, kind, schedule):
    teacher, world = gaussian_teacher(kind, T, steps, to, schedule)
    made = progressive(T=T, steps=steps, to=to, schedule=schedule, made=teacher)
    student = make_diffusion(T, made.levels.t.tolist(), schedule, ModelMeanType.START_X)
    generator = th.Generator().manual_seed(0)
    for step in range(steps // 2):
        noise = th.randn(3, 1, 8, 8, generator=generator)
        x = world.x_mean[2 * step + 1] + world.x_variance[2 * step + 1] ** 0.5 * noise
        target = made.target(x, th.full((3,), step), {})
        one = steps_of_ddim(student, constant(target), x, step, 1)
        two = steps_of_ddim(world.diffusion, world.model, x, 2 * step + 1, 2)
        # The noise says little of x_0 where there is hardly any signal: rounding alone changes it.
        assert (one - two).abs().max() < (2e-4 if kind == "eps" else 1e-5)
    assert (target.abs() <= 1).all()


@pytest.mark.parametrize("student", ["v", "x0"])
def test_the_loss_is_the_error_of_x0_times_the_larger_of_the_snr_and_1(student):
    teacher, _ = gaussian_teacher(student, 64, 8, 2, "cosine")
    made = progressive(student, student, made=teacher)
    x = MU + S * th.randn(4, 1, 8, 8)
    noise, t = th.randn_like(x), th.from_numpy(made.levels.t).float()
    alpha_bar = made.diffusion.respaced(made.levels.t).alphas_cumprod
    alpha, sigma = (th.from_numpy(a**0.5).float().view(-1, 1, 1, 1) for a in (alpha_bar, 1 - alpha_bar))
    x_t = alpha * x + sigma * noise
    target = made.target(x_t, th.arange(4), {})
    right = target if student == "x0" else (alpha * x_t - target) / sigma
    terms = made.training_losses(lambda x, t: right + 0.1, x, t, noise=noise)
    error = 0.1**2 if student == "x0" else (0.1 * sigma.flatten()) ** 2
    weight = np.maximum(alpha_bar / (1 - alpha_bar), 1)
    th.testing.assert_close(terms["mse"], th.ones(4) * error, rtol=1e-3, atol=0)
    th.testing.assert_close(terms["loss"], terms["mse"] * th.from_numpy(weight).float())
    assert weight[0] > 1 == weight[-1]


def test_a_learned_variance_is_left_alone_and_microbatches_change_nothing():
    model = small_model()
    teacher = SimpleNamespace(prediction="v", guided=small_model(), diffusion=progressive().diffusion)
    made = progressive(made=teacher, learn_sigma=True)
    x, noise = th.rand(4, 3, 8, 8) * 2 - 1, th.randn(4, 3, 8, 8)
    t = th.from_numpy(made.levels.t).float()
    with th.no_grad():
        model.out.bias[:3] += 0.1
    whole = made.training_losses(model, x, t, noise=noise)["loss"]
    parts = [made.training_losses(model, x[i : i + 2], t[i : i + 2], noise=noise[i : i + 2])["loss"] for i in (0, 2)]
    th.testing.assert_close(th.cat(parts), whole)
    whole.mean().backward()
    assert model.out.weight.grad[:3].abs().max() > 0 and not model.out.weight.grad[3:].any()
    assert all(p.grad is None for p in teacher.guided.parameters())


def test_a_teacher_whose_predictions_are_not_finite_is_named():
    teacher, world = gaussian_teacher("v", 64, 8, 2, "cosine")
    teacher.guided = lambda x, t: world.model(x, t) * np.nan
    made = progressive(made=teacher, teacher="v")
    with pytest.raises(UserError, match="predicts numbers that are not finite"):
        made.training_losses(world.model, th.zeros(4, 1, 8, 8), th.from_numpy(made.levels.t).float())


def test_the_arithmetic_that_is_counted_is_the_students():
    made, plain = progressive(made=Teacher(None, {"teacher_prediction": "v"}), learn_sigma=True), small_diffusion()
    batch = th.zeros(2, 3, 8, 8)
    counts = [
        training_flops(small_model(), losses, batch, {}) for losses in (made.training_losses, plain.training_losses)
    ]
    assert counts[0] == counts[1] > 0


# Training on Gaussian pixels


class LinearModel(th.nn.Module):
    """Its output is a line in x, of its own at each of the levels t [N]."""

    def __init__(self, t, model, x):
        super().__init__()
        self.t = t
        low, high = (model(th.full_like(x, value), th.from_numpy(t).float())[:, :1, :1, :1] for value in (0.0, 1.0))
        self.slope, self.offset = th.nn.Parameter(high - low), th.nn.Parameter(low)

    def forward(self, x, timesteps):
        index = th.from_numpy(np.abs(np.subtract.outer(timesteps.numpy(), self.t)).argmin(1))
        return self.slope[index] * x + self.offset[index]


class GaussianData:
    """Batches of Gaussian pixels; batch k is a function of k."""

    def __init__(self, batch_size=4):
        self.batch_size, self.step = batch_size, 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        self.step += 1
        rng = np.random.default_rng(self.step)
        return th.from_numpy(rng.normal(MU, S, (self.batch_size, 1, 8, 8)).astype(np.float32)), {}


def trainable(kind, student="v", T=64, steps=8, to=2, max_steps=600):
    """The method with a teacher that is exact, and whose networks can be trained."""
    exact, world = gaussian_teacher(kind, T, steps, to, "cosine")
    levels = np.array(world.diffusion.timestep_map)
    network = LinearModel(levels, world.model, th.zeros(len(levels), 1, 8, 8)).requires_grad_(False)
    teacher = SimpleNamespace(prediction=kind, guided=network, module=network, diffusion=exact.diffusion, facts={})
    return progressive(student=student, T=T, steps=steps, to=to, made=teacher, max_steps=max_steps), teacher


@pytest.mark.parametrize("kind, student", [("v", "v"), ("x0", "x0"), ("eps", "v")])
def test_the_trained_student_of_2_steps_ends_where_8_steps_of_the_teacher_do(kind, student, out_dir):
    made, teacher = trainable(kind, student)
    expert = copy.deepcopy(teacher.module)
    model = copy.deepcopy(expert).requires_grad_(True)
    make_loop(
        model=model, diffusion=made, data=GaussianData(32), batch_size=32, lr=0.05, lr_schedule="linear",
        schedule_sampler=made, hooks=made.hooks(), max_steps=600, log_interval=1000, ema_rate="",
    ).run_loop()  # fmt: skip
    noise = th.randn(50, 1, 8, 8)
    few = made.diffusion.respaced(timestep_grid("trailing", 2, made.diffusion.base_alphas_cumprod))
    many = teacher.diffusion.ddim_sample_loop(expert, noise.shape, noise=noise)
    assert (few.ddim_sample_loop(model, noise.shape, noise=noise) - many).abs().max() < 1e-3
    with th.no_grad():
        untrained = few.ddim_sample_loop(expert, noise.shape, noise=noise)
    assert (untrained - many).abs().max() > 0.05


# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teachers of v and of the noise, with classes that were hidden now and then and without; images."""
    place = tmp_path_factory.mktemp("progressive")
    save_checkpoint(place / "v.pt", tiny_settings(predict_v=True))
    save_checkpoint(place / "eps.pt", tiny_settings())
    cats = dict(class_cond=True, num_classes=2, predict_v=True)
    save_checkpoint(place / "cats.pt", tiny_settings(ImageModel, **cats, label_drop=0.1), class_names=CLASSES)
    save_checkpoint(place / "seen.pt", tiny_settings(ImageModel, **cats), class_names=CLASSES)
    write_images(place / "photos", 8, size=(8, 8), classes=CLASSES)
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def test_from_a_teacher_to_a_student_of_few_steps(place, capsys):
    dispatch([
        "distill", "--teacher", "eps.pt", "--data_dir", "photos", "--method", "progressive", "--student_prediction",
        "v", "--steps", "8", "--to", "2", "--max_steps", "8", "--batch_size", "2", "--num_workers", "0", "--val_dir",
        "photos", "--val_interval", "3", "--sample_interval", "3", "--out_dir", "run",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "from 8 steps of ddim to (in training steps): 4 in 6, 2 in 2" in said
    for number, (steps, end) in enumerate([(4, 6), (2, 8)], start=1):
        assert f"stage {number} of 2 ends after {end} training steps: the student samples in {steps} steps" in said
    assert "energy distance in 2 steps of ddim" in said
    facts = checkpoint.load("run/ema_0.9993_000008.pt")[1]["distilled"]
    expected = dict(method="progressive", sampler="ddim", timestep_grid="trailing", steps=2, teacher_prediction="eps")
    assert {name: facts[name] for name in expected} == expected
    student = idf.load("run")
    few = student.sample(2, progress=False).array
    for options in (dict(sampler="ddim"), dict(use_ddim=True), dict(timestep_grid="9,19", sampler="ddim")):
        np.testing.assert_array_equal(student.sample(2, progress=False, **options).array, few)
    assert len(list(student.sample_steps(1, timestep_grid="logsnr"))) == 2  # not all of ddim's
    for options in (dict(sampler="dpmpp_2m", steps=2), dict(steps=4), dict(timestep_grid="ddim", steps=2)):
        assert (student.sample(2, progress=False, **options).array != few).any()
    dispatch(["sample", "--model_path", "run", "--num_samples", "2", "--out_dir", "drawn"])
    assert "ddim, 2 steps, 2 evaluations of the network for each image (timestep grid: trailing)" in (
        capsys.readouterr().out
    )


def resumed(folder, step):
    """A run that continues in its folder as it was after a step, without the teacher's name."""
    later = [f"*{number:06d}.*" for number in range(step + 1, 8)]
    shutil.copytree("whole", folder, ignore=shutil.ignore_patterns(*later))
    dispatch(["distill", "--resume", "auto", "--data_dir", "photos", "--out_dir", folder, "--num_workers", "0"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_is_exact_before_at_and_after_the_end_of_a_stage(precision, place):
    options = {**QUICK, "student_prediction": "v", "steps": 4, "to": 1, "max_steps": 8, "microbatch": 2,
               "precision": precision, "save_interval": 1}  # fmt: skip
    idf.distill("eps.pt", "photos", out_dir="whole", **options)
    for step in (1, 4, 5, 6):  # 2, 5, 6 and 7 steps are done; the first stage has 6
        if step == 5:
            os.remove("eps.pt")  # the teacher of the first stage is not needed in the others
        resumed(f"from{step}", step)
        assert_sets_equal(place / "whole", place / f"from{step}", 7)
    state = load("whole/opt000007.pt")["improved_diffusion"]["predecessor"]
    assert state["teaches"] == 1 and state["ends"] == [6, 8]
    names = checkpoint.load("whole/model000007.pt")[0].keys()
    assert state["weights"].keys() == names


def test_a_checkpoint_says_the_steps_of_its_stage(place):
    options = {**QUICK, "steps": 8, "to": 1, "max_steps": 6, "save_interval": 1, "val_dir": "photos"}
    student = idf.distill("v.pt", "photos", out_dir="run", val_interval=6, ema_sigma_rel="0.1", **options)
    found = [checkpoint.load(f"run/model{step:06d}.pt")[1]["distilled"] for step in range(6)]
    assert [facts["steps"] for facts in found] == [4, 4, 2, 2, 1, 1]  # after 1, 2, 3, 4, 5 and 6 training steps
    for name in ("ema_0.9993", "ema_sigma_rel0.1"):
        assert checkpoint.load(f"run/{name}_000002.pt")[1]["distilled"] == found[2]
    within = idf.load("run/ema_0.9993_000002.pt")
    np.testing.assert_array_equal(
        within.sample(2, progress=False).array,
        within.sample(2, progress=False, sampler="ddim", timestep_grid="trailing", steps=2).array,
    )
    assert checkpoint.load("run/best.pt")[1]["distilled"]["steps"] == 1 == len(list(student.sample_steps(1)))


def test_the_student_of_each_stage_is_kept(place):
    idf.distill("v.pt", "photos", out_dir="run", **{**QUICK, "steps": 8, "to": 1, "max_steps": 6, "save_interval": 100})
    files = sorted(path.name for path in (place / "run").glob("ema_*"))
    assert files == [f"ema_0.9993_{step:06d}.pt" for step in (0, 1, 3, 6)]  # of the first step, of stages, of the end
    steps = [checkpoint.load(f"run/{name}")[1]["distilled"]["steps"] for name in files]
    assert steps == [4, 4, 2, 1]
    whole = {name: load(f"run/{name}000006.pt") for name in ("model", "ema_0.9993_")}
    for path in (place / "run").glob("*000006.pt"):
        path.unlink()
    idf.distill("", "photos", out_dir="run", resume="auto", num_workers=0)
    for name, weights in whole.items():
        again = load(f"run/{name}000006.pt")
        assert all(th.equal(again[key], value) for key, value in weights.items())


def test_a_run_in_its_second_stage_can_be_tried_without_the_teacher(place, capsys):
    idf.distill("v.pt", "photos", out_dir="run", **{**QUICK, "steps": 4, "to": 1, "save_interval": 3})
    os.remove("v.pt")
    dispatch(["distill", "--resume", "run/model000003.pt", "--data_dir", "photos", "--num_workers", "0", "--dry_run"])
    said = capsys.readouterr().out
    assert "time per step" in said
    size = sum(os.path.getsize(f"run/{name}000003.pt") for name in ("model", "ema_0.9993_", "opt")) / 2**20
    assert float(re.search(r"checkpoints +(\S+) MiB each", said)[1]) == pytest.approx(size, rel=0.1)


def test_the_predecessor_is_the_student_at_the_end_of_its_stage(place):
    options = {**QUICK, "steps": 4, "to": 1, "max_steps": 4, "save_interval": 1}
    idf.distill("v.pt", "photos", out_dir="run", **options)
    kept = load("run/opt000003.pt")["improved_diffusion"]["predecessor"]["weights"]
    after_two_steps = load("run/model000001.pt")  # its number is that of its last step
    assert all(th.equal(kept[name], after_two_steps[name]) for name in kept)


def test_stages_cannot_be_moved_nor_continued_without_their_teacher(place):
    options = {**QUICK, "steps": 4, "to": 1, "save_interval": 1}
    idf.distill("v.pt", "photos", out_dir="run", **options)
    with pytest.raises(UserError, match=r"--max_steps 8 moves the ends of the stages: .* --max_steps 4"):
        idf.distill("v.pt", "photos", out_dir="run", resume="run/model000003.pt", max_steps=8, num_workers=0)
    os.makedirs("alone")
    shutil.copy("run/model000002.pt", "alone")
    before = contents(place)
    with pytest.raises(UserError, match="the teacher of stage 2, the student of stage 1, is not in the checkpoint"):
        idf.distill("v.pt", "photos", out_dir="new", resume_checkpoint="alone/model000002.pt", num_workers=0)
    assert contents(place) == before


def test_a_teacher_that_is_gone_is_missed_before_anything_is_written(place):
    idf.distill("v.pt", "photos", out_dir="run", **{**QUICK, "steps": 4, "to": 1, "save_interval": 1})
    os.remove("v.pt")
    before = contents(place)
    with pytest.raises(UserError, match=r"the teacher v\.pt does not exist: .* --teacher"):
        idf.distill("", "photos", out_dir="run", resume="run/model000000.pt", num_workers=0)
    assert contents(place) == before


def test_a_step_that_is_left_at_the_start_of_a_stage_leaves_the_averages_of_the_stage_before(out_dir):
    made, teacher = trainable("v", steps=8, to=2, max_steps=4)
    loop = make_loop(
        model=copy.deepcopy(teacher.module).requires_grad_(True), diffusion=made, data=GaussianData(), lr=0.1,
        microbatch=2, schedule_sampler=made, hooks=made.hooks(), max_steps=4, ema_rate="0.9",
    )  # fmt: skip
    for _ in range(2):
        loop.run_step(*next(loop.data))
        loop._call_hooks()
        loop.step += 1
    assert loop.absolute_step in made.restarts
    before = [p.clone() for p in loop.ema_params[0]]
    loop._is_stopped = lambda: True
    with pytest.raises(Unfinished):
        loop.run_step(*next(loop.data))
    assert all(map(th.equal, loop.ema_params[0], before)) and loop.opt.state
    loop._is_stopped = lambda: False
    loop.run_step(*next(loop.data))
    assert int(next(iter(loop.opt.state.values()))["step"]) == 1


@pytest.mark.parametrize("teacher, options, named", [
    ("v.pt", dict(steps=12, to=4), "--steps 12 is not --to 4 doubled once or several times"),
    ("v.pt", dict(steps=4, to=4), "--steps 4 is not --to 4 doubled once or several times"),
    ("v.pt", dict(steps=64, to=32), "--to 32: the teacher was trained with 20 noise levels"),
    ("v.pt", dict(steps=32, to=4), "--steps 32 are too many for a teacher with 20 noise levels"),
    ("v.pt", dict(steps=16, to=2, max_steps=2), "--max_steps 2 are too few for 3 stages"),
    ("v.pt", dict(lr_anneal_steps=8), "--lr_anneal_steps 8"),
    ("eps.pt", dict(student_prediction="teacher"), "Give --student_prediction v"),
    ("v.pt", dict(student_prediction="eps"), "Give --student_prediction v"),
    ("v.pt", dict(guidance_scale=2), "--guidance_scale 2.0: v.pt has no classes"),
    ("seen.pt", dict(guidance_scale=2), "--guidance_scale 2.0: seen.pt was never trained with its class hidden"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(teacher, options, named, place):
    before = contents(place)
    with pytest.raises(UserError) as refused:
        idf.distill(teacher, "photos", **{**QUICK, "out_dir": "new", "steps": 8, "to": 2, **options})
    assert named in str(refused.value)
    assert contents(place) == before


@pytest.mark.parametrize("sampler, student, asked, named", [
    ("ddim", "progressive", 8, ""),
    ("ddim", "progressive", 16, "a student for 8 steps, and may be no good at others: --steps 8 goes on from there"),
    ("renoise", "consistency", 8, "a student of consistency tuning, which has not learned the steps of ddim"),
])  # fmt: skip
def test_a_teacher_that_is_a_student_is_taken_at_its_own_steps(sampler, student, asked, named, place):
    facts = {"teacher": "v", "teacher_sha256": "00", "method": student, "sampler": sampler, "steps": 8}
    save_checkpoint(place / "student.pt", tiny_settings(predict_v=True), distilled=facts)
    idf.distill("student.pt", "photos", out_dir="run", **{**QUICK, "steps": asked, "to": 4, "max_steps": 2})
    log = (place / "run/log.txt").read_text()
    assert named in log and ("student.pt is a student" in log) == bool(named)


# Guidance


def test_a_guided_teacher_is_guided_in_the_first_stage_alone(place):
    settings = tiny_settings(ImageDistillation, teacher="cats.pt", method="progressive", steps=4, to=1, max_steps=4,
                             class_cond=True, num_classes=2, predict_v=True, guidance_scale=3)  # fmt: skip
    loaded = idf.load("cats.pt")
    facts = {"teacher_prediction": "v", "teacher_sha256": files.sha256("cats.pt")}
    method = Progressive(settings, build_diffusion(settings.diffusion), Teacher(settings, facts))
    model = ClassifierFreeGuidance(loaded.network.eval(), 3.0)
    few = method.diffusion.respaced(method.all_levels)
    x, kwargs = th.randn(2, 3, 8, 8), {"y": th.tensor([0, 1])}
    target = method.target(x, th.tensor([1, 1]), kwargs)
    two = steps_of_ddim(few, model, x, 3, 2, model_kwargs=kwargs)
    start, end = method.levels.angle[1], method.levels.angle[0]
    eps = (x - np.cos(start) * target) / np.sin(start)
    th.testing.assert_close((np.cos(end) * target + np.sin(end) * eps).float(), two, atol=1e-5, rtol=0)
    method.predecessor.teaches = 1
    method.at_step(2)
    angle = th.from_numpy(method.levels.middle_angle).float().expand(2)
    said = method.predict(x, th.full((2,), method.levels.middle[0]), angle, kwargs)
    alone = method.diffusion.respaced(method.levels.middle).p_mean_variance(
        loaded.network, x, th.zeros(2, dtype=th.long), model_kwargs=kwargs
    )
    th.testing.assert_close(said, alone["pred_xstart"], atol=1e-5, rtol=0)


def test_a_guided_student_of_classes_samples_with_one_evaluation_a_step(place):
    student = idf.distill("cats.pt", "photos", out_dir="run", steps=4, to=2, guidance_scale=2.0, **QUICK)
    assert checkpoint.load("run/model000004.pt")[1]["config"]["guidance_scale"] == 2.0
    assert len(list(student.sample_steps(1, classes=[1]))) == 2
