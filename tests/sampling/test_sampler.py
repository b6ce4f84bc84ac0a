"""From options to samples: every rule, grid and guidance from the command line."""

import json
import math

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion
from PIL import Image
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, pixels, python, run, write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.loading import load_classifier, load_model
from improved_diffusion.config.sampling import SAMPLERS
from improved_diffusion.config.settings import ImageModel, ImageSampling
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling import guided
from improved_diffusion.sampling.noise import SeededNoise
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.sampling.solvers import RULES, DPMSolverPP, Heun, sample_loop
from improved_diffusion.sampling.timestep_grids import NAMES, timestep_grid
from improved_diffusion.schedules import zero_terminal_snr
from improved_diffusion.utils.images import to_uint8

SAMPLE = ["--num_samples", "4", "--batch_size", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sampling")


@pytest.fixture(scope="module")
def animals(place):
    return write_images(place / "animals", 12)


def train(place, animals, name, *flags, script="image_train", model=TINY_IMAGE):
    call(
        script, *model, "--data_dir", animals, "--batch_size", "4", "--max_steps", "2", "--lr", "1e-2", "--out_dir",
        place / name, *flags, cwd=place,
    ).succeed()  # fmt: skip
    return place / name / "model000002.pt"


@pytest.fixture(scope="module")
def model(place, animals):
    """Of two classes, which it has also seen hidden."""
    return train(place, animals, "model", "--class_cond", "--label_drop", "0.3")


@pytest.fixture(scope="module")
def sighted(place, animals):
    """Of two classes, never hidden."""
    return train(place, animals, "sighted", "--class_cond")


@pytest.fixture(scope="module")
def unconditional(place, animals):
    return train(place, animals, "unconditional")


@pytest.fixture(scope="module")
def classifier(place, animals, unconditional):
    flags = ["--classifier_width", "32", "--classifier_depth", "1", "--channel_mult", "1,1", "--num_workers", "0"]
    return train(
        place, animals, "classifier", "--model_path", unconditional, script="classifier_train", model=flags
    )  # fmt: skip


def sample(model, folder, *flags, script="image_sample"):
    """(samples uint8 [N, H, W, C], labels or None, what the command printed)."""
    result = call(script, "--model_path", model, *SAMPLE, "--out_dir", folder, *flags, cwd=folder.parent).succeed()
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as data:
        return data["arr_0"], data.get("arr_1"), result.out


def refused(model, *flags, script="image_sample", cwd):
    """The one message on stderr of a command that fails."""
    result = call(script, "--model_path", model, *SAMPLE, *flags, cwd=cwd)
    assert result.code == 1 and result.err.startswith("error: ") and "Traceback" not in result.err
    return result.err


# Rules and grids


@pytest.mark.parametrize("name", RULES)
def test_every_rule_draws(name, model, tmp_path):
    samples, labels, out = sample(model, tmp_path / "out", "--sampler", name, "--steps", "5")
    assert samples.shape == (4, 8, 8, 3) and samples.std() > 5 and labels.shape == (4,)
    assert f"{name}, 5 steps, {RULES[name]().evaluations(5)} evaluations" in out
    again, _, _ = sample(model, tmp_path / "again", "--sampler", name, "--steps", "5", "--batch_size", "1")
    assert np.abs(samples.astype(int) - again).max() <= 1  # batches of other sizes round differently


@pytest.mark.parametrize("grid", [*NAMES, "0,3.5,12,19", "sigma:9,4,1,0.5"])
@pytest.mark.parametrize("name", ["ancestral", "unipc"])
def test_every_grid_draws(grid, name, model, tmp_path):
    steps = [] if "," in grid else ["--steps", "4"]
    samples, _, out = sample(model, tmp_path / "out", "--sampler", name, "--timestep_grid", grid, *steps)
    assert samples.std() > 5 and f"{name}, 4 steps, 4 evaluations" in out


def test_the_names_in_the_options_are_those_of_the_rules():
    assert set(SAMPLERS) == {"auto", *RULES}


@pytest.mark.parametrize(
    "flags,same_as",
    [
        (["--steps", "10"], ["--timestep_respacing", "10"]),
        (["--sampler", "ancestral"], []),
        (["--sampler", "ddim", "--steps", "10"], ["--use_ddim", "--timestep_respacing", "ddim10"]),
        (["--sampler", "ddim", "--ddim_eta", "0.5"], ["--use_ddim", "True", "--ddim_eta", "0.5"]),
    ],
)
def test_the_published_flags_say_the_same_to_the_last_bit(flags, same_as, model, tmp_path):
    ours, theirs = sample(model, tmp_path / "ours", *flags)[0], sample(model, tmp_path / "theirs", *same_as)[0]
    assert (ours == theirs).all()


def test_a_published_checkpoint_has_every_rule_as_well(model, tmp_path):
    """A plain state dict without a description, given the flags that leave no trace in it."""
    path = tmp_path / "published.pt"
    th.save({name: value.clone() for name, value in th.load(model, weights_only=True).items()}, path)
    flags = ["--diffusion_steps", "20", "--noise_schedule", "cosine", "--image_size", "8", "--num_heads", "1",
             "--attention_resolutions", "4", "--classes", "0,1"]  # fmt: skip
    steps = ["--sampler", "unipc", "--steps", "5"]
    expected, _, _ = sample(model, tmp_path / "described", *steps, "--classes", "0,1")
    assert (sample(path, tmp_path / "plain", *steps, *flags)[0] == expected).all()
    assert "--guide_path" in refused(path, *steps, *flags, "--guidance_scale", "2", cwd=tmp_path)


def test_sampling_from_python_as_the_readme_has_it(model):
    loaded = load_model(ImageModel.of({}), (), str(model))
    few = loaded.diffusion.respaced(timestep_grid("logsnr", 15, loaded.diffusion.base_alphas_cumprod))
    x = sample_loop(DPMSolverPP(), few, loaded.model, (2, 3, 8, 8), model_kwargs={"y": th.tensor([0, 1])})
    assert x.shape == (2, 3, 8, 8) and x.abs().max() <= 1.001


def test_print_steps_shows_them_and_draws_nothing(model, tmp_path):
    result = call(
        "image_sample", "--model_path", model, "--sampler", "heun", "--steps", "4", "--print_steps", cwd=tmp_path
    ).succeed()
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0", "1", "2", "3", "4"] and lines[-1].endswith("image")
    assert list(tmp_path.iterdir()) == []


def test_renoising_from_python_is_that_of_the_command_and_shows_its_steps(model, tmp_path):
    loaded = idf.load(model)
    for options, evaluations in ((dict(seed=3), 4), (dict(steps=2, guidance_scale=2, dynamic_threshold=0.9), 2)):
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        samples, labels, out = sample(model, tmp_path / "-".join(options), "--sampler", "renoise", *flags)
        images = loaded.sample(4, sampler="renoise", batch_size=4, progress=False, **options)
        assert (images.array == samples).all() and (images.labels == labels).all()
        assert f"renoise, {evaluations} steps, {evaluations} evaluations" in out and "grid: coarse" in out
        steps = list(loaded.sample_steps(4, sampler="renoise", **options))
        assert [(step.index, step.steps) for step in steps] == [(i, evaluations) for i in range(evaluations)]


def sampler_of(T=1000, image_size=32, **options):
    return build_sampler(ImageSampling.of({"image_size": image_size, **options}), make_diffusion(T))


def test_a_rule_made_for_few_steps_takes_few_unless_told():
    assert sampler_of(sampler="unipc").steps == 20
    assert sampler_of(sampler="unipc", T=7).steps == 7
    assert sampler_of(sampler="renoise").steps == 4 and sampler_of(sampler="renoise", T=3).steps == 3
    assert sampler_of(sampler="renoise", timestep_grid="sigma:40,2").steps == 2
    assert sampler_of().steps == sampler_of(sampler="ddim").steps == 1000
    assert sampler_of(timestep_grid="0,7.5,12").steps == 3
    assert sampler_of(sampler="heun", steps=10).evaluations == 19


@pytest.mark.parametrize("name, few, many", [
    ("ancestral", "uniform", "uniform"), ("ddim", "ddim", "ddim"), ("renoise", "coarse", "coarse"),
    ("plms", "coarse", "logsnr"), ("dpmpp_2m_sde", "coarse", "logsnr"), ("heun", "coarse", "karras"),
])  # fmt: skip
def test_few_steps_have_a_grid_of_their_own_but_in_published_samplers(name, few, many):
    for steps, grid in ((1, few), (6, few), (7, many), (20, many)):
        chosen = sampler_of(sampler=name, steps=steps)
        named = sampler_of(sampler=name, steps=steps, timestep_grid=grid)
        assert chosen.grid == grid and chosen.diffusion.timestep_map == named.diffusion.timestep_map


def test_a_model_that_starts_from_pure_noise_is_started_there():
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 1000))
    diffusion = SpacedDiffusion(
        range(1000), betas=betas, model_mean_type=ModelMeanType.VELOCITY, model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )  # fmt: skip
    for options in (
        dict(sampler="unipc"),
        dict(sampler="ddim", steps=30),
        dict(steps=7),
        dict(sampler="heun", steps=1),
        dict(sampler="renoise", steps=4),
    ):
        sampler = build_sampler(ImageSampling.of({"image_size": 32, **options}), diffusion)
        assert sampler.diffusion.timestep_map[-1] == 999 and sampler.diffusion.alphas_cumprod[-1] == 0
        assert sampler.steps == options.get("steps", 20)


def test_large_images_start_at_more_noise():
    for size, sigma in ((32, 80), (256, 320)):
        last = sampler_of(sampler="dpmpp_2m", image_size=size).diffusion.alphas_cumprod[-1]
        assert 1 / last - 1 == pytest.approx(sigma**2, rel=1e-6)


def test_churn_reaches_the_rule_and_its_path():
    sampler = sampler_of(sampler="heun", steps=10, churn=4, churn_noise=1.01)
    rises = sum(b > a for a, b in zip(sampler.path, sampler.path[1:]))
    assert rises == 10 and sampler.steps == 10 and sampler.evaluations == 19
    rule = sampler.make_rule()
    assert isinstance(rule, Heun) and rule.noise_scale == 1.01
    assert rule is not sampler.make_rule()  # which keep state


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--sampler", "dpm++"], ["unknown --sampler 'dpm++'", *RULES]),
        (["--sampler", "unipc", "--timestep_grid", "karas"], ["--timestep_grid 'karas'", *NAMES]),
        (["--steps", "21"], ["--steps 21", "20 noise levels", "1 to 20"]),
        (["--steps", "-1"], ["--steps -1", "negative"]),
        (
            ["--steps", "5", "--timestep_respacing", "5"],
            ["--timestep_respacing 5", "checkpoint", "--steps 5"],
        ),
        (["--use_ddim", "--sampler", "plms"], ["--use_ddim", "--sampler plms"]),
        (["--churn", "3"], ["--churn 3", "euler or heun"]),
        (["--sampler", "heun", "--churn", "3", "--timestep_respacing", "5"], ["--churn 3", "--steps"]),
        (["--ddim_eta", "1"], ["--ddim_eta 1", "--sampler ddim"]),
        (["--use_ddim", "--ddim_eta", "2"], ["--ddim_eta 2", "at most 1"]),
        (["--churn_noise", "1.1"], ["--churn_noise 1.1", "--churn"]),
        (["--classifier_scale", "3"], ["--classifier_scale 3", "--classifier_path"]),
        (["--guidance_interval", "0.3,5"], ["--guidance_interval 0.3,5", "--guidance_scale"]),
        (["--guidance_scale", "2", "--guidance_interval", "1e6,1e7"], ["--guidance_interval 1e6,1e7", "outside"]),
        (["--dynamic_threshold", "99.5"], ["--dynamic_threshold 99.5", "at most 1"]),
        (["--guidance_interval", "5", "--guidance_scale", "2"], ["--guidance_interval '5'", "0.3,5"]),
        (["--guidance_interval", "5,2", "--guidance_scale", "2"], ["--guidance_interval 5,2", "lower"]),
    ],
)
def test_a_wrong_sampler_is_named_with_the_right_ones(flags, words, model, tmp_path):
    message = refused(model, *flags, cwd=tmp_path)
    assert all(word in message for word in words) and list(tmp_path.iterdir()) == []


def test_thresholding_and_clipping_change_the_samples(model, tmp_path):
    flags = ["--sampler", "dpmpp_2m", "--steps", "5"]
    variants = {
        "clipped": [],
        "free": ["--clip_denoised", "False"],
        "thresholded": ["--dynamic_threshold", "0.9"],
    }
    samples = [sample(model, tmp_path / name, *flags, *more)[0].tobytes() for name, more in variants.items()]
    assert len(set(samples)) == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_network_in_16_bits_draws_nearly_the_same(precision, model, tmp_path):
    flags = ["--sampler", "dpmpp_2m", "--steps", "5"]
    full, _, _ = sample(model, tmp_path / "full", *flags)
    half, _, _ = sample(model, tmp_path / "half", *flags, "--precision", precision, "--memory_format", "channels_last")
    assert (full != half).any() and np.abs(full.astype(int) - half).mean() < 8


def test_float16_on_a_cpu_is_warned_of_once(model, tmp_path):
    guided._warn_of_slow_float16.cache_clear()
    flags = ["--sampler", "dpmpp_2m", "--steps", "2"]
    said = [sample(model, tmp_path / str(i), *flags, "--use_fp16", "True")[2].count("float16 is") for i in range(2)]
    assert said == [1, 0]


# What a folder of samples was made from


def test_the_same_samples_asked_for_otherwise_go_on(model, tmp_path):
    out = tmp_path / "out"
    ways = [
        ["--use_ddim", "--timestep_respacing", "ddim10"],
        ["--sampler", "ddim", "--steps", "10"],
        ["--sampler", "ddim", "--steps", "10", "--timestep_grid", "ddim"],
    ]
    for way in ways:
        printed = sample(model, out, *way)[2]
    assert "4 of 4 samples are in" in printed
    for other in (["--steps", "10"], [*ways[1], "--ddim_eta", "0.5"], [*ways[1], "--timestep_grid", "trailing"]):
        message = refused(model, "--out_dir", out, *other, cwd=tmp_path)
        assert "holds samples " in message


def test_samples_that_are_no_numbers_are_an_error(model, tmp_path):
    state = th.load(model, weights_only=True)
    state["out.2.bias"].fill_(math.nan)
    th.save(state, tmp_path / "broken.pt")
    message = refused(tmp_path / "broken.pt", "--steps", "2", "--classes", "cat", cwd=tmp_path)
    assert "not finite" in message


# How samples come about


def test_the_steps_shown_are_predictions_without_those_that_add_noise(model, tmp_path):
    out = tmp_path / "out"
    flags = ["--sampler", "euler", "--steps", "6", "--churn", "3", "--save_steps", "100", "--batch_size", "3"]
    _, _, printed = sample(model, out, *flags)
    assert "6 steps to the first 3 samples" in printed
    with_one = tmp_path / "one"
    samples, _, _ = sample(model, with_one, "--sampler", "unipc", "--steps", "4", "--save_steps", "1")
    strip = pixels(with_one / "steps.png")
    np.testing.assert_array_equal(strip[2:50:6, 2:50:6], samples[0])


def test_save_steps_writes_a_strip_and_an_animation(model, tmp_path):
    out = tmp_path / "out"
    samples, _, _ = sample(model, out, "--sampler", "unipc", "--steps", "10", "--save_steps", "5")
    strip = pixels(out / "steps.png")
    side, border = 8 * 6, 2  # enlarged to 48 pixels
    assert strip.shape == (4 * (side + border) + border, 5 * (side + border) + border, 3)
    last = strip[border : border + side : 6, -side - border : -border : 6]
    np.testing.assert_array_equal(last, samples[0])  # the last prediction is the sample
    with Image.open(out / "steps.gif") as gif:
        assert gif.n_frames >= 5


# Guidance


def test_guided_by_the_hidden_class(model, tmp_path):
    flags = ["--sampler", "dpmpp_2m", "--steps", "5", "--classes", "cat,dog"]
    plain, labels, _ = sample(model, tmp_path / "plain", *flags)
    one, _, _ = sample(model, tmp_path / "one", *flags, "--guidance_scale", "1")
    assert (plain == one).all() and labels.tolist() == [0, 1, 0, 1]
    others = {
        "guided": ["--guidance_scale", "8"],
        "interval": ["--guidance_scale", "8", "--guidance_interval", "0.3,2"],
        "rescaled": ["--guidance_scale", "8", "--guidance_rescale", "0.7"],
        "hidden": ["--guidance_scale", "0"],
    }
    samples = [plain, *(sample(model, tmp_path / name, *flags, *more)[0] for name, more in others.items())]
    assert len({array.tobytes() for array in samples}) == 5


def test_guided_by_other_checkpoints(model, sighted, unconditional, tmp_path):
    """By a weaker one with classes or without; the samples depend on which."""
    flags = ["--sampler", "heun", "--steps", "4", "--guidance_scale", "3", "--classes", "cat"]
    samples = [sample(sighted, tmp_path / "plain", *flags[:4], *flags[6:])[0]]
    for name, path in (("weaker", model), ("unconditional", unconditional)):
        drawn, _, out = sample(sighted, tmp_path / name, *flags, "--guide_path", path)
        assert f"guided by {path}" in out
        samples.append(drawn)
    assert len({array.tobytes() for array in samples}) == 3
    message = refused(sighted, *flags, "--guide_path", model, "--out_dir", tmp_path / "unconditional", cwd=tmp_path)
    assert "holds samples " in message


def test_guided_by_a_classifier(unconditional, classifier, tmp_path):
    """Which gives a model without classes some."""
    flags = ["--sampler", "ddim", "--steps", "5"]
    plain, labels, _ = sample(unconditional, tmp_path / "plain", *flags)
    assert labels is None
    flags += ["--classifier_path", classifier, "--classes", "dog,cat"]
    guided, labels, out = sample(unconditional, tmp_path / "guided", *flags, "--classifier_scale", "5")
    assert labels.tolist() == [1, 0, 1, 0] and (guided != plain).any() and f"classifier {classifier}" in out
    assert (tmp_path / "guided" / "samples" / "dog_000000.png").exists()


@pytest.mark.parametrize("name,method", [("ancestral", "p_sample_loop"), ("ddim", "ddim_sample_loop")])
def test_published_guidance_gives_what_the_published_loop_gives_with_a_cond_fn(
    name, method, unconditional, classifier, tmp_path
):
    flags = ["--sampler", name, "--timestep_respacing", "5", "--classes", "dog,cat", "--classifier_path", classifier]
    flags += ["--classifier_scale", "3", "--classifier_guidance", "published"]
    samples, labels, out = sample(unconditional, tmp_path / "out", *flags)
    assert f"{classifier}, scale 3.0 (--classifier_guidance published)" in out
    settings = ImageSampling.of({"model_path": str(unconditional), "timestep_respacing": "5"})
    loaded = load_model(settings, {"timestep_respacing"}, str(unconditional))
    network = load_classifier(str(classifier)).classifier

    def cond_fn(x, t, y):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = th.log_softmax(network(x, t), dim=-1)[range(len(x)), y]
            return th.autograd.grad(chosen.sum(), x)[0] * 3.0

    expected = getattr(loaded.diffusion, method)(
        lambda x, t, y: loaded.model(x, t), (4, 3, 8, 8), device="cpu", cond_fn=cond_fn,
        model_kwargs={"y": th.from_numpy(labels)}, noise_fn=SeededNoise(0, range(4)),
    )  # fmt: skip
    assert labels.tolist() == [1, 0, 1, 0] and (samples == to_uint8(expected)).all()
    from_python = idf.load(unconditional).sample(
        4, classes=["dog", "cat"], sampler=name, timestep_respacing="5", classifier_path=str(classifier),
        classifier_scale=3, classifier_guidance="published", progress=False,
    )  # fmt: skip
    assert (from_python.array == samples).all()


def test_what_the_classifier_guides_is_chosen_by_an_option(unconditional, classifier, tmp_path):
    """classifier_sample.py guides as published, sample guides the prediction, unless the option says otherwise."""
    flags = ["--sampler", "ddim", "--steps", "4", "--classifier_path", classifier, "--classifier_scale", "9"]
    drawn, requests = {}, {}
    for script, chosen in (
        ("image_sample", ""), ("image_sample", "prediction"), ("image_sample", "published"), ("classifier_sample", ""),
        ("classifier_sample", "prediction"),
    ):  # fmt: skip
        folder = tmp_path / f"{script}_{chosen}"
        more = ["--classifier_guidance", chosen] if chosen else []
        drawn[script, chosen] = sample(unconditional, folder, *flags, *more, script=script)[0].tobytes()
        requests[script, chosen] = json.loads((folder / "samples.json").read_text())
    prediction, published = drawn["image_sample", ""], drawn["image_sample", "published"]
    assert prediction != published
    assert prediction == drawn["image_sample", "prediction"] == drawn["classifier_sample", "prediction"]
    assert published == drawn["classifier_sample", ""]
    named = {key: "published" in json.dumps(request) for key, request in requests.items()}
    assert named == {key: value == published for key, value in drawn.items()}
    folder = tmp_path / "image_sample_"
    message = refused(
        unconditional, *flags, "--classifier_guidance", "published", "--out_dir", folder, cwd=tmp_path
    )  # fmt: skip
    assert "classifier_guidance" in message


def test_published_guidance_of_edited_images(unconditional, classifier):
    """Where the way to the noise is needed, no classifier guides, whatever it moves."""
    images, mask = np.full((2, 8, 8, 3), 128, np.uint8), np.zeros((8, 8), bool)
    mask[:, 4:] = True
    options = dict(classes=["dog"], classifier_path=str(classifier), classifier_scale=9, steps=3, progress=False)
    drawn = [
        idf.load(unconditional).inpaint(images, mask, classifier_guidance=kind, **options).array
        for kind in ("prediction", "published")
    ]
    assert (drawn[0] != drawn[1]).any() and (drawn[1][:, :, :4] == 128).all()
    with pytest.raises(idf.UserError, match="classifier_path"):
        idf.load(unconditional).encode(images, classifier_path=str(classifier), classifier_guidance="published")


def test_published_guidance_acts_in_its_interval_and_with_the_hidden_class(model, classifier, tmp_path):
    flags = ["--steps", "4", "--classes", "cat,dog", "--classifier_path", classifier, "--classifier_scale", "9"]
    flags += ["--classifier_guidance", "published"]
    variants = {
        "everywhere": flags,
        "some": [*flags, "--guidance_interval", "0.3,2"],
        "all": [*flags, "--guidance_interval", "0,1e9"],
        "hidden": [*flags, "--guidance_scale", "3"],
        "none": [*flags, "--classifier_scale", "0"],
        "plain": flags[:4],
    }
    drawn = {name: sample(model, tmp_path / name, *each)[0].tobytes() for name, each in variants.items()}
    assert drawn["everywhere"] == drawn["all"] and drawn["none"] == drawn["plain"]
    assert len({drawn[name] for name in ("everywhere", "some", "hidden", "plain")}) == 4


def test_published_guidance_needs_a_published_sampler_and_a_classifier(unconditional, classifier, tmp_path):
    for script, flags in (("image_sample", ["--classifier_guidance", "published"]), ("classifier_sample", [])):
        message = refused(unconditional, *flags, script=script, cwd=tmp_path)
        assert "--classifier_path" in message
        message = refused(
            unconditional, *flags, "--classifier_path", classifier, "--sampler", "dpmpp_2m", script=script, cwd=tmp_path
        )
        words = ("dpmpp_2m", "ancestral", "ddim", "--classifier_guidance prediction")
        assert all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []


def test_guided_by_a_classifier_and_by_the_hidden_class(model, classifier, tmp_path):
    flags = ["--steps", "4", "--classifier_path", classifier]
    one, _, _ = sample(model, tmp_path / "one", *flags)
    both, _, _ = sample(model, tmp_path / "both", *flags, "--guidance_scale", "4")
    assert (one != both).any()


def test_a_model_that_cannot_be_guided_says_how_to_train_one(sighted, unconditional, tmp_path):
    for path in (sighted, unconditional):
        message = refused(path, "--guidance_scale", "2", cwd=tmp_path)
        assert str(path) in message and "--label_drop 0.1" in message and "--guide_path" in message
    message = refused(sighted, "--guide_path", sighted, cwd=tmp_path)
    assert "--guidance_scale 1" in message


def test_guides_of_other_classes_are_refused(model, place, tmp_path):
    others = write_images(place / "others", 12, classes=("xis", "yak", "zoe"))
    named = train(place, others, "named", "--class_cond")
    message = refused(model, "--guide_path", named, "--guidance_scale", "2", cwd=tmp_path)
    assert "3 classes xis, yak, zoe" in message and "2 classes cat, dog" in message
    two = write_images(place / "two", 12, classes=("xis", "yak"))
    renamed = train(place, two, "renamed", "--class_cond")
    message = refused(model, "--guide_path", renamed, "--guidance_scale", "2", cwd=tmp_path)
    assert "classes xis, yak" in message


def test_an_older_guide_predicts_what_it_was_trained_to(model, place, animals, tmp_path):
    """Its description says nothing of options that came later."""
    velocity = train(place, animals, "velocity_guided", "--class_cond", "--predict_v")
    state, metadata = checkpoint.load(str(model))
    for name in ("predict_v", "zero_terminal_snr", "schedule_shift"):
        del metadata["config"][name]
    older = tmp_path / "older.pt"
    th.save(checkpoint.describe(state, metadata), older)
    message = refused(velocity, "--guide_path", older, "--guidance_scale", "2", cwd=tmp_path)
    assert "predict_v False" in message and "True" in message


def test_networks_that_do_not_fit_are_refused(model, classifier, animals, place, tmp_path):
    other = train(place, animals, "other", "--diffusion_steps", "30")
    message = refused(model, "--guide_path", other, "--guidance_scale", "2", cwd=tmp_path)
    assert "diffusion_steps 30" in message and "20" in message
    message = refused(other, "--classifier_path", classifier, cwd=tmp_path)
    assert "diffusion_steps 20" in message and f"--model_path {other}" in message
    message = refused(model, "--classifier_path", other, cwd=tmp_path)
    assert "not a classifier" in message
    message = refused(other, "--guide_path", model, "--guidance_scale", "2", "--classes", "cat", cwd=tmp_path)
    assert "diffusion_steps" in message or "classes" in message


def test_labels_that_are_dropped_need_classes(animals, tmp_path):
    result = call(
        "image_train", *TINY_IMAGE, "--data_dir", animals, "--label_drop", "0.1", "--out_dir", "run", cwd=tmp_path
    )
    assert result.code == 1 and "--label_drop 0.1" in result.err and "--class_cond True" in result.err


def test_super_resolution_has_every_rule_too(place, animals, tmp_path):
    upsampler = train(place, animals, "upsampler", script="super_res_train", model=TINY_SUPER_RES)
    flags = ["--base_samples", animals, "--sampler", "unipc", "--steps", "4", "--save_steps", "3"]
    samples, _, out = sample(upsampler, tmp_path / "out", *flags, script="super_res_sample")
    assert samples.shape == (4, 16, 16, 3) and "unipc, 4 steps" in out
    assert (tmp_path / "out" / "steps.gif").exists()
    flags = ["--base_samples", animals, "--sampler", "renoise", "--steps", "2"]
    samples, _, out = sample(upsampler, tmp_path / "renoise", *flags, script="super_res_sample")
    assert samples.shape == (4, 16, 16, 3) and "renoise, 2 steps, 2 evaluations" in out


# What training stores


def test_what_the_network_predicts_and_its_schedule_are_stored(place, animals, tmp_path):
    flags = ["--predict_v", "--zero_terminal_snr", "--schedule_shift", "0.5", "--noise_schedule", "sigmoid",
             "--min_snr_gamma", "5"]  # fmt: skip
    path = train(place, animals, "velocity", *flags)
    result = call("image_sample", "--model_path", path, "--print_steps", cwd=tmp_path).succeed()
    assert result.out.splitlines()[1].split()[3:5] == ["0", "inf"]  # alpha_bar and sigma of pure noise
    for name in ("ancestral", "dpmpp_3m", "heun", "renoise"):
        samples, _, _ = sample(path, tmp_path / name, "--sampler", name, "--steps", "5", "--timestep_grid", "trailing")
        assert samples.std() > 5
    message = refused(path, "--predict_v", "False", cwd=tmp_path)
    assert "--predict_v False contradicts" in message


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--zero_terminal_snr"], ["--zero_terminal_snr", "--predict_v True"]),
        (["--predict_v", "--predict_xstart"], ["--predict_v", "--predict_xstart"]),
        (["--min_snr_gamma", "5", "--use_kl"], ["--min_snr_gamma", "--use_kl"]),
        (["--min_snr_gamma", "-1"], ["--min_snr_gamma -1"]),
        (["--schedule_shift", "0"], ["--schedule_shift 0"]),
        (["--label_drop", "1"], ["--label_drop 1"]),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, words, animals, tmp_path):
    result = call("image_train", *TINY_IMAGE, "--data_dir", animals, *flags, "--out_dir", "run", cwd=tmp_path)
    assert result.code == 1 and all(word in result.err for word in words) and not (tmp_path / "run").exists()


def test_two_ranks_draw_what_one_does(model, tmp_path):
    flags = ["--model_path", model, "--num_samples", "5", "--batch_size", "2", "--sampler", "dpmpp_2m_sde", "--steps",
             "4", "--guidance_scale", "2", "--save_steps", "3"]  # fmt: skip
    run("mpiexec", 2, "image_sample", *flags, "--out_dir", "two", cwd=tmp_path).succeed()
    call("image_sample", *flags, "--out_dir", "one", cwd=tmp_path).succeed()
    for name in ("samples_5x8x8x3.npz", "steps.png"):
        one, two = (
            pixels(tmp_path / folder / name) if name.endswith("png") else np.load(tmp_path / folder / name)["arr_0"]
            for folder in ("one", "two")
        )
        assert np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.slow
def test_a_compiled_network_draws_the_same(model, tmp_path):
    flags = ["--model_path", model, *SAMPLE, "--sampler", "dpmpp_2m", "--steps", "5"]
    call("image_sample", *flags, "--out_dir", "plain", cwd=tmp_path).succeed()
    python("image_sample", *flags, "--out_dir", "compiled", "--compile", cwd=tmp_path, timeout=600).succeed()
    plain, compiled = (np.load(tmp_path / name / "samples_4x8x8x3.npz")["arr_0"] for name in ("plain", "compiled"))
    assert np.abs(plain.astype(int) - compiled).max() <= 1
