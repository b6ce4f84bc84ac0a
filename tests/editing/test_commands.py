"""Editing images: against data whose best denoiser is known, and by every command from end to end."""

import argparse
import importlib.util
import json
import os
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch as th
from gaussian_world import MU, GaussianWorld, S
from helpers import ROOT, slope
from improved_diffusion.editing.commands import Job, Source
from PIL import Image
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, contents, pixels, run, write_images

from improved_diffusion.cli.parsing import Command, parse_command
from improved_diffusion.config import SAMPLERS, EditConfig, ImagesConfig, RunConfig, SamplerConfig, UserError
from improved_diffusion.data.given import GivenImages
from improved_diffusion.editing import commands
from improved_diffusion.editing.latents import read_latents
from improved_diffusion.gaussian_diffusion import ModelMeanType
from improved_diffusion.sampling.labels import Classes
from improved_diffusion.sampling.sampler import Sampler
from improved_diffusion.sampling.solvers import RULES
from improved_diffusion.utils import images

COMMANDS = ("encode", "decode", "interpolate", "inpaint", "variations")


def script():
    """scripts/image_edit.py as a module."""
    spec = importlib.util.spec_from_file_location("image_edit", ROOT / "scripts/image_edit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(name, *argv):
    return parse_command(script().COMMANDS, "Edit.", [name, *map(str, argv)])[1]


# Known answers: the pixels are independent and normal, and the network is exact


def gaussian_pictures(count):
    """uint8 [count, 16, 16, 1] of the world's data."""
    x = MU + S * th.randn(count, 1, 16, 16)
    return images.to_uint8(x)


def gaussian_job(name, world, rule, pictures, path=None, **options):
    sampler = Sampler(rule, "", world.diffusion, RULES[rule], path or world.path, False, None)
    settings = argparse.Namespace(channels=1, image_size=16, seed=0, **options)
    source = Source("--images", "", pictures=pictures)
    return Job(name, settings, world.model, commands.route(name, settings, sampler), source, None)


@pytest.mark.parametrize("rule, order", [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_inversion_follows_the_flow_from_the_image_at_the_rules_order(rule, order):
    pictures, counts, errors = gaussian_pictures(2), (25, 50, 100), []
    for count in counts:
        world = GaussianWorld(1000, count, grid="karras")
        job = gaussian_job("encode", world, rule, pictures)
        exact = world.flow(images.from_uint8(pictures), 0, -1)
        errors.append((job.invert([0, 1]) - exact).abs().mean().item())
    assert slope(np.log(counts), np.log(errors)) == pytest.approx(-order, abs=0.2)


def round_trip(world, rule, network=None):
    """The lowest PSNR in dB of images that went to their noise and back."""
    pictures = gaussian_pictures(4)
    job = gaussian_job("encode", world, rule, pictures)
    job.model = network or world.model
    job.source.latents = job.invert([0, 1, 2, 3]).numpy()
    return commands.psnr(commands._decode(job)([0, 1, 2, 3]), pictures).min()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("rule, steps, least", [("ddim", commands.ENCODING_STEPS, 45), ("heun", 50, 49)])
def test_an_image_comes_back_from_its_noise(rule, steps, least, schedule):
    """But for what 8 bits cut off, some 51 dB."""
    world = GaussianWorld(1000, steps, schedule, ModelMeanType.EPSILON, grid=commands.ENCODING_GRID)
    assert least < round_trip(world, rule) < 54


@pytest.mark.parametrize("grid, low, high", [(commands.ENCODING_GRID, 40, 54), ("uniform", 0, 20)])
def test_the_grid_of_encoding_forgives_the_error_of_a_network(grid, low, high):
    """On the published one its error at the last timestep, where nothing is left of the image, is what comes back."""
    world = GaussianWorld(1000, commands.ENCODING_STEPS, "cosine", ModelMeanType.EPSILON, grid=grid)

    def network(x, t):
        eps, log_variance = world.model(x, t).chunk(2, dim=1)
        return th.cat([eps + 2e-2 * th.sin(0.1 * t.float()).view(-1, 1, 1, 1), log_variance], dim=1)

    assert low < round_trip(world, "ddim", network) < high


def test_every_rule_is_known_to_draw_noise_or_not():
    world = GaussianWorld(100, 10)
    noise, ends = world.start(1), {}
    for rule in RULES:
        job = gaussian_job("decode", world, rule, gaussian_pictures(1))
        for seed in (0, 1):
            job.options.seed = seed
            *_, last = job.walk([0], noise=noise)
            ends[rule, seed] = last["sample"]
    assert {rule for rule in RULES if not th.equal(ends[rule, 0], ends[rule, 1])} == set(commands.NOISY)
    assert set(commands.INVERTIBLE) < set(RULES) == set(SAMPLERS) - {"auto"}


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8, 1.0])
def test_variations_are_draws_from_the_images_given_the_noisy_one(strength):
    world, pictures = GaussianWorld(100, 20), gaussian_pictures(200)
    job = gaussian_job("variations", world, "ancestral", pictures, strength=strength)
    for out in job.walk(range(200), noise=job.pictures(range(200))):
        x = out["sample"]
    k = job.sampler.path[1]
    alpha_bar, gain = world.alpha_bar[k], world.gain[k]
    expected = MU + gain * np.sqrt(alpha_bar) * (job.pictures(range(200)) - MU)
    variance = gain**2 * (1 - alpha_bar) + S**2 * (1 - alpha_bar) / world.x_variance[k] - world.reverse_variance[0]
    error = x - expected
    n = error.numel()
    assert error.mean().item() == pytest.approx(0, abs=5 * np.sqrt(variance / n))
    assert error.var().item() == pytest.approx(variance, rel=5 * np.sqrt(2 / n))
    along = (error * (job.pictures(range(200)) - MU)).mean().item()
    assert along == pytest.approx(0, abs=5 * S * np.sqrt(variance / n))


def test_painting_leaves_the_known_pixels_alone_and_makes_the_others_like_the_data():
    world, pictures = GaussianWorld(100, 20), gaussian_pictures(200)
    job = gaussian_job("inpaint", world, "ancestral", pictures, jump_length=4, resamplings=2)
    job.source.masks = np.random.default_rng(0).random((200, 16, 16)) < 0.5
    painted = commands._inpaint(job)(list(range(200)))
    known = ~job.source.masks
    np.testing.assert_array_equal(painted[known], pictures[known])
    assert (painted[~known] != pictures[~known]).mean() > 0.9
    x = painted[~known] / 127.5 - 1 + 0.5 / 127.5  # 8 bits are cut off, not rounded
    n = x.size
    assert x.mean() == pytest.approx(MU, abs=5 * S / np.sqrt(n))
    assert x.var() == pytest.approx(S**2 - world.reverse_variance[0], rel=5 * np.sqrt(2 / n))


@pytest.mark.parametrize("strength, first", [(1, 9), (0.999, 9), (0.45, 4), (0.51, 5), (0.25, 2), (0.01, 0)])
def test_variations_start_at_the_nearest_step(strength, first):
    world = GaussianWorld(100, 10)  # at 0, 11, ..., 99
    sampler = Sampler("ddim", "", world.diffusion, RULES["ddim"], world.path, True, None)
    path = commands.noising_path(sampler, strength)
    assert path == [-1, *range(first, -2, -1)]
    nearest = abs(np.array(world.diffusion.timestep_map) - strength * 99)
    assert nearest[first] == nearest.min()


def test_psnr():
    a = np.full((3, 4, 4, 1), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    b[2, 0, 0] = 0
    expected = [np.inf, 20 * np.log10(25.5), 10 * np.log10(255**2 * 16 / 100**2)]
    np.testing.assert_allclose(commands.psnr(a, b), expected, rtol=1e-12)


# Masks


def save_mask(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8) * 255).save(path)
    return str(path)


def test_a_mask_of_another_size_is_resized_without_greys_and_cropped_to_its_centre(tmp_path):
    wide = np.zeros((4, 8))
    wide[:, :2] = wide[:, 7:] = 1  # cropped away
    wide[1, 2] = wide[2, 5] = 1  # the corners of what is left
    mask = commands.read_masks(save_mask(tmp_path / "m.png", wide), (8, 8), ["a"])
    expected = np.zeros((4, 4), bool)
    expected[1, 0] = expected[2, 3] = True
    np.testing.assert_array_equal(mask, expected.repeat(2, 0).repeat(2, 1)[None])
    shrunk = commands.read_masks(save_mask(tmp_path / "n.png", expected.repeat(9, 0).repeat(9, 1)), (4, 4), ["a"])
    np.testing.assert_array_equal(shrunk, expected[None])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_masks_of_any_mode(tmp_path, mode):
    image = Image.new("L", (4, 4), 0)
    image.paste(255, (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "m.png")
    mask = commands.read_masks(str(tmp_path / "m.png"), (4, 4), ["a"])
    np.testing.assert_array_equal(mask[0], np.array([[True, True, False, False]] * 4))


def test_masks_go_with_images_by_name_else_in_order(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        save_mask(tmp_path / "masks" / f"{name}.png", np.eye(4) == (np.arange(4) == i))
    folder = str(tmp_path / "masks")
    of_all = commands.read_masks(folder, (4, 4), ["x", "y", "z"])  # a, b, c
    of_some = commands.read_masks(folder, (4, 4), ["c", "a"])
    np.testing.assert_array_equal(of_some, of_all[[2, 0]])
    with pytest.raises(UserError, match=r"masks holds 3 masks for 2 images: give one for all of them, or one for each"):
        commands.read_masks(folder, (4, 4), ["c", "d"])


def test_a_mask_of_nothing_is_an_error(tmp_path):
    path = save_mask(tmp_path / "m.png", np.zeros((4, 4)))
    with pytest.raises(UserError, match=rf"{path} has nothing to paint: make white what is to be painted"):
        commands.read_masks(path, (4, 4), ["a"])
    with pytest.raises(UserError, match=r"--mask nowhere\.png does not exist"):
        commands.read_masks("nowhere.png", (4, 4), ["a"])
    with pytest.raises(UserError, match="--mask is missing"):
        commands.read_masks("", (4, 4), ["a"])


# The command line


def test_a_script_with_commands_lists_them(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command(script().COMMANDS, "Edit images.", ["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "Edit images." in said and "COMMAND --help lists a command's flags" in said
    for name, command in script().COMMANDS.items():
        assert any(line.split() == [name, *command.description.split()] for line in said.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_its_flags(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        parse(name, "--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f" {name} [--flag value ...] {script().COMMANDS[name].description}" in said
    for f in (f for group in script().COMMANDS[name].groups for f in fields(group)):
        default = "empty" if f.default == "" else f.default
        assert f"--{f.name} " in said and f"{f.metadata['help']} (default: {default})" in said


def test_a_commands_flags_are_parsed_with_its_groups_only():
    commands = {"one": Command("First.", (EditConfig,)), "two": Command("Second.", (ImagesConfig, RunConfig))}
    name, options = parse_command(commands, "Both.", ["two", "--images", "a", "--seed=3"])
    assert name == "two" and options.images == "a" and options.seed == 3 and options.given == {"images", "seed"}
    with pytest.raises(UserError, match="unknown flag '--images'"):
        parse_command(commands, "Both.", ["one", "--images", "a"])


@pytest.mark.parametrize("argv, message", [
    ([], "the command comes first: .* with one of one, two; --help describes them"),
    (["--images", "a", "one"], "the command comes first"),
    (["tow"], "unknown command 'tow': did you mean two\\? choose from: one, two"),
    (["one", "two"], "unexpected argument 'two'"),
])  # fmt: skip
def test_a_wrong_command_is_answered_with_the_right_ones(argv, message):
    commands = {"one": Command("First.", (EditConfig,)), "two": Command("Second.", (ImagesConfig,))}
    with pytest.raises(UserError, match=message):
        parse_command(commands, "Both.", argv)


def test_a_line_that_begins_with_a_flag_may_mean_one_command():
    commands = {"one": Command("First.", (EditConfig,)), "two": Command("Second.", (ImagesConfig, RunConfig))}
    name, options = parse_command(commands, "Both.", ["--images", "a"], default="two")
    assert name == "two" and options.images == "a" and options.chosen == {} and not hasattr(options, "cells")
    assert parse_command(commands, "Both.", ["one"], default="two")[0] == "one"
    for argv in ([], ["-i", "a"]):
        with pytest.raises(UserError, match=r"the command comes first: .* with one of one, two"):
            parse_command(commands, "Both.", argv, default="two")


def test_words_before_the_flags_are_for_one_option():
    commands = {"one": Command("First.", (ImagesConfig, RunConfig), words="images")}

    def parsed(*argv):
        return parse_command(commands, "One.", ["one", *argv])[1]

    assert parsed("a", "b", "--seed", "3").images == "a,b" and parsed("a,b").images == "a,b"
    assert parsed("a").given == {"images"} and parsed("--images", "c", "--seed", "3").images == "c"
    assert parsed("--seed", "3").images == ""
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        parsed("a", "--seed", "3", "b")


def sweep(*argv):
    """The cells of a command that takes lists of steps and samplers."""
    commands = {"sweep": Command("Several.", (SamplerConfig, RunConfig), lists=("sampler", "steps"))}
    return parse_command(commands, "Several.", ["sweep", *argv])[1].cells


def test_listed_values_are_combined():
    cells = sweep("--steps", "5, 10", "--seed", "3", "--sampler=ddim,heun")
    assert [(cell.sampler, cell.steps) for cell in cells] == [("ddim", 5), ("ddim", 10), ("heun", 5), ("heun", 10)]
    for cell in cells:
        assert cell.chosen == {"sampler": cell.sampler, "steps": str(cell.steps)}
        assert cell.seed == 3 and cell.given == cell.flags == {"sampler", "steps", "seed"}


def test_one_value_is_one_combination():
    assert [(cell.steps, cell.chosen) for cell in sweep("--steps", "5")] == [(5, {"steps": "5"})]
    assert [(cell.steps, cell.chosen) for cell in sweep()] == [(0, {})]
    assert [cell.steps for cell in sweep("--steps", "5,10,5,")] == [5, 10]
    assert [cell.steps for cell in sweep("--steps", "5,10", "--steps", "20")] == [20]  # the last one, as of any flag


@pytest.mark.parametrize("argv, message", [
    (["--steps", "5,x"], "--steps 'x': invalid"),
    (["--steps", ","], "--steps ',': invalid"),
    (["--steps", ""], "--steps '': invalid"),
    (["--steps"], "--steps: expected one argument"),
    (["--steps", "--sampler", "ddim,heun"], "--steps: expected one argument"),
    (["--seed", "1,2"], "--seed '1,2': invalid"),
    (["--churn", "3", "--sampler", "euler,ddim"], "--churn 3.0 is for --sampler euler or heun, not ddim"),
])  # fmt: skip
def test_every_combination_is_checked(argv, message):
    with pytest.raises(UserError, match=message):
        sweep(*argv)


def test_groups_are_frozen_and_a_flag_is_written_once():
    for command in script().COMMANDS.values():
        names = [f.name for group in command.groups for f in fields(group)]
        assert len(names) == len(set(names))
        for group in command.groups:
            assert is_dataclass(group) and group.__dataclass_params__.frozen and group()
    assert tuple(script().COMMANDS) == COMMANDS


@pytest.mark.parametrize("argv, message", [
    (["--seeds", "3"], "--seeds 3 must be two seeds such as 3,7"),
    (["--seeds", "3,7,9"], "--seeds 3,7,9 must be two"),
    (["--seeds", "3,-7"], "--seeds 3,-7 must be two"),
    (["--seeds", "a,b"], "--seeds 'a,b': expected two seeds"),
    (["--frames", "1"], "--frames 1 must be at least 2"),
])  # fmt: skip
def test_wrong_ends(argv, message):
    with pytest.raises(UserError, match=message):
        parse("interpolate", *argv)


@pytest.mark.parametrize("strength", ["0", "-0.1", "1.5"])
def test_strength_outside_its_range(strength):
    with pytest.raises(UserError, match=rf"--strength {float(strength)} must be more than 0 and at most 1"):
        parse("variations", "--strength", strength)


def settled(name, *argv):
    options = parse(name, *argv)
    commands.settle(name, options)
    return options


def test_what_each_command_does_unless_told():
    for argv in (["encode"], ["interpolate", "--images", "a"]):
        options = settled(*argv)
        found = [getattr(options, name) for name in ("sampler", "steps", "timestep_grid", "clip_denoised")]
        assert found == ["ddim", 200, "karras", False]
    assert settled("encode", "--diffusion_steps", 50).steps == 50
    assert settled("encode", "--timestep_respacing", "ddim25").steps == 0
    assert settled("encode", "--timestep_grid", "0,10.5,800").steps == 0
    assert settled("encode", "--clip_denoised", "True").clip_denoised is True
    # As image_sample.py --sampler ddim does.
    options = settled("interpolate", "--seeds", "3,7")
    found = [getattr(options, name) for name in ("sampler", "steps", "timestep_grid", "clip_denoised")]
    assert found == ["ddim", 0, "auto", True]
    for name in ("inpaint", "variations"):
        assert settled(name).steps == 100 and settled(name).sampler == "auto"
        assert settled(name, "--sampler", "unipc").steps == 0 and settled(name, "--steps", 7).steps == 7


@pytest.mark.parametrize("argv, message", [
    (["encode", "--guidance_scale", 2], "--guidance_scale 2.0 does not go with the way from an image to its noise"),
    (["encode", "--classifier_path", "c.pt"], "--classifier_path c.pt does not go"),
    (["encode", "--sampler", "unipc"], "--sampler unipc cannot be walked.*: take one of ddim, euler, heun"),
    (["encode", "--sampler", "ddim", "--ddim_eta", 1], "--ddim_eta 1.0 does not go"),
    (["encode", "--sampler", "heun", "--churn", 5], "--churn 5.0 does not go"),
    (["interpolate", "--images", "a", "--guidance_scale", 2], "--guidance_scale 2.0 does not go"),
    (["interpolate"], "give --images A.png,B.png or --seeds 3,7"),
    (["interpolate", "--images", "a", "--seeds", "3,7"], "two images or two seeds"),
    (["interpolate", "--seeds", "3,7", "--sampler", "ancestral"], "--sampler ancestral draws noise on the way"),
    (["interpolate", "--seeds", "3,7", "--use_ddim", "--ddim_eta", 1], "--ddim_eta 1.0 draws noise on the way"),
    (["inpaint", "--sampler", "heun", "--churn", 5], "--churn 5.0 raises the noise again on the way, and so does"),
    (["decode"], "--latents is missing: name the latents.npz that encode wrote"),
    (["decode", "--latents", "nowhere.npz"], "--latents nowhere.npz does not exist"),
])  # fmt: skip
def test_what_a_command_cannot_do_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        settled(*argv)


@pytest.mark.parametrize("argv, found, expected", [
    (["--classes", "dog"], None, [1, 1, 1, 1, 1]),
    (["--classes", "owl,dog"], [0, 0], [2, 2, 2, 1, 1]),
    ([], [0, 2], [0, 0, 0, 2, 2]),
])  # fmt: skip
def test_frames_are_of_the_class_of_the_nearer_end(argv, found, expected):
    options = parse("interpolate", "--images", "a", "--frames", 5, *argv)
    source = Source("--images", "a", found)
    labels = commands.choose_classes("interpolate", options, Classes(3, ["cat", "dog", "owl"]), source)
    assert [labels.index(i) for i in range(5)] == expected


def test_classes_are_asked_for_where_the_images_have_none():
    options = parse("encode", "--images", "a", "--model_path", "m.pt")
    classes = Classes(2, ["cat", "dog"])
    with pytest.raises(UserError, match=r"--images a has no classes among cat, dog, which m.pt needs: give --classes"):
        commands.choose_classes("encode", options, classes, Source("--images", "a"))
    with pytest.raises(UserError, match=r"--images a has the label 2, but the model has the classes 0..1"):
        commands.choose_classes("encode", options, classes, Source("--images", "a", [0, 2]))
    options = parse("interpolate", "--images", "a", "--classes", "0,1,0")
    with pytest.raises(UserError, match="--classes 0,1,0: give one for all frames, or one for each end"):
        commands.choose_classes("interpolate", options, classes, Source("--images", "a"))


def test_interpolation_takes_two_images():
    options = argparse.Namespace(images="a", seeds="", image_size=8, channels=3, out_dir="")
    given = GivenImages(np.zeros((3, 8, 8, 3), np.uint8), None, ["1", "2", "3"])
    with pytest.raises(UserError, match="--images a holds 3 images: interpolate goes between two"):
        commands.read_source("interpolate", options, lambda: given)


# Latents on disk


@pytest.mark.parametrize("arrays, message", [
    ({}, "has no arr_0"),
    ({"arr_0": np.zeros((2, 3, 8, 8))}, "arr_0 of float64"),
    ({"arr_0": np.zeros((3, 8, 8), np.float32)}, r"arr_0 of float32 \(3, 8, 8\)"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.float32), "arr_1": np.zeros(3, int)}, "arr_1 of int64.*: expected 2 integers"),
    ({"arr_0": np.array([{}])}, "holds Python objects, which could run code"),
    *(
        ({"arr_0": np.zeros((2, 3, 8, 8), np.float32), "way": np.array(way)}, "does not say how it was made")
        for way in ("{", "[]", '{"steps": "3"}', '{"seed": 3}', '{"sampler": "x"}', "3")
    ),
])  # fmt: skip
def test_damaged_and_hostile_latents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "latents.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_latents(str(tmp_path / "latents.npz"))


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "latents.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(UserError, match="is not a readable npz"):
        read_latents(str(tmp_path / "latents.npz"))


# End to end


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with six images, and a class-conditional model that has learned a little."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "data", 6)
    args = ["--data_dir", "data", "--class_cond", "--batch_size", 6, "--max_steps", 20, "--lr", 0.003]
    args += ["--label_drop", 0.5, "--ema_rate", 0.5, "--log_interval", 20]
    call("image_train", *TINY_IMAGE, *args, "--out_dir", "run", cwd=folder).succeed()
    return folder


def edit(place, name, *args, model="run/ema_0.5_000020.pt"):
    return call("image_edit", name, "--model_path", place / model, *args, cwd=place)


def made(folder):
    """(the npz's arrays, the PNGs in order of their numbers) of an edit."""
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        found = [arrays[name] for name in arrays.files]
    pngs = sorted((folder / "samples").iterdir(), key=lambda p: p.stem[-6:])
    np.testing.assert_array_equal(np.stack([pixels(p) for p in pngs]), found[0])
    return found, [p.name for p in pngs]


def originals(place):
    """The images in the folder's order, as the network sees them."""
    paths = sorted((place / "data").iterdir())
    return np.stack([np.asarray(images.resize_crop(Image.open(path), (8, 8))) for path in paths])


@pytest.fixture(scope="module")
def encoded(place):
    result = edit(place, "encode", "--images", "data", "--sampler", "heun", "--out_dir", "encoded").succeed()
    assert "6 images encoded and decoded: PSNR" in result.out and result.err == ""
    return place / "encoded"


def test_encoded_images_come_back(place, encoded):
    with np.load(encoded / "latents.npz") as arrays:
        assert arrays["arr_0"].dtype == np.float32 and arrays["arr_0"].shape == (6, 3, 8, 8)
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
        assert json.loads(str(arrays["way"])) == dict(
            sampler="heun", steps=20, timestep_grid="karras", timestep_respacing=""
        )
    assert set(os.listdir(encoded)) == {
        "latents.npz", "log.txt", "samples", "samples.json", "samples.png", "samples_6x8x8x3.npz", ".samples.lock",
    }  # fmt: skip
    (back, labels), names = made(encoded)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and names[3] == "dog_000003.png"
    decibels = commands.psnr(back, originals(place))
    assert decibels.min() > 25  # with as few as 20 noise levels the lowest hides something
    assert f"PSNR {decibels.mean():.1f} dB in the mean, {decibels.min():.1f} dB at" in (encoded / "log.txt").read_text()
    sheet = pixels(encoded / "samples.png")  # each beside what it came from
    np.testing.assert_array_equal(sheet[2:50:6, 2:50:6], originals(place)[0])
    np.testing.assert_array_equal(sheet[2:50:6, 52:100:6], back[0])


def test_encoding_again_does_nothing_again(place, encoded, monkeypatch):
    before = contents(encoded)
    monkeypatch.setattr(Job, "invert", None)
    edit(place, "encode", "--images", "data", "--sampler", "heun", "--out_dir", "encoded").succeed()
    assert contents(encoded) == before


def test_the_batch_size_and_an_interruption_change_nothing(place, encoded, monkeypatch):
    invert, done = Job.invert, []

    def interrupted(job, indices, *args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.extend(indices)
        return invert(job, indices, *args)

    args = ["--images", "data", "--sampler", "heun", "--batch_size", 2, "--out_dir", "slowly"]
    monkeypatch.setattr(Job, "invert", interrupted)
    result = edit(place, "encode", *args)
    assert result.code == 130 and f"4 of 6 latents are in {place}/slowly/latents; the same command goes" in result.err
    (place / "slowly/latents/000001.npy").write_bytes(b"cut")
    done.clear()
    done.append("elsewhere")
    result = edit(place, "encode", *args).succeed()
    assert done == ["elsewhere", 1, 4, 5] and "3 of 6 latents are in" in result.out
    with np.load(encoded / "latents.npz") as expected, np.load(place / "slowly/latents.npz") as found:
        np.testing.assert_allclose(found["arr_0"], expected["arr_0"], atol=1e-4)
    assert not (place / "slowly/latents").exists()


def test_two_ranks_share_the_work(place, encoded):
    args = ["--model_path", place / "run/ema_0.5_000020.pt", "--images", "data", "--sampler", "heun", "--batch_size", 2]
    run("srun", 2, "image_edit", "encode", *args, "--out_dir", "shared", cwd=place).succeed()
    with np.load(encoded / "latents.npz") as expected, np.load(place / "shared/latents.npz") as found:
        np.testing.assert_allclose(found["arr_0"], expected["arr_0"], atol=1e-4)
    difference = made(place / "shared")[0][0].astype(int) - made(encoded)[0][0]
    assert abs(difference).max() <= 1


def test_other_images_are_not_mixed_in(place, encoded):
    result = edit(place, "encode", "--images", "data/cat_00.png", "--sampler", "heun", "--out_dir", "encoded")
    assert result.code == 1 and f"made with images {place}/data, not {place}/data/cat_00.png" in result.err


def test_latents_are_decoded_by_the_steps_that_made_them(place, encoded):
    edit(place, "decode", "--latents", "encoded/latents.npz", "--out_dir", "decoded").succeed()
    np.testing.assert_array_equal(made(place / "decoded")[0][0], made(encoded)[0][0])
    back, there = (json.loads((folder / "samples.json").read_text()) for folder in (place / "decoded", encoded))
    assert back["sampler"] == "heun" and back["steps"] == 20
    assert back["timesteps_sha256"] == there["timesteps_sha256"]


def test_latents_of_another_checkpoint_are_decoded_with_a_warning(place, encoded):
    name = "may be noise"
    assert name not in edit(place, "decode", "--latents", "encoded/latents.npz", "--out_dir", "own").succeed().out
    other = place / "run/ema_0.5_000000.pt"
    args = ["--model_path", other, "--latents", "encoded/latents.npz", "--out_dir", "foreign"]
    result = call("image_edit", "decode", *args, cwd=place).succeed()
    assert name in result.out + result.err


def test_latents_are_decoded_as_other_classes_by_other_steps_and_with_guidance(place, encoded):
    args = ["--latents", "encoded/latents.npz", "--num_samples", 4, "--classes", "dog,cat", "--sampler", "dpmpp_2m"]
    edit(place, "decode", *args, "--steps", 5, "--guidance_scale", 2, "--out_dir", "others").succeed()
    (back, labels), names = made(place / "others")
    assert labels.tolist() == [1, 0, 1, 0] and names[:2] == ["dog_000000.png", "cat_000001.png"]
    assert commands.psnr(back[:1], originals(place)[:1]) < 25


SEEDED = ["--steps", 10, "--batch_size", 1]


def test_the_ends_of_an_interpolation_are_the_samples_of_its_seeds(place):
    model = ["--model_path", place / "run/ema_0.5_000020.pt"]
    for seed in (3, 8):
        args = ["--seed", seed, "--num_samples", 1, "--sampler", "ddim", "--out_dir", f"seed{seed}"]
        call("image_sample", *model, *SEEDED, *args, cwd=place).succeed()
    edit(place, "interpolate", "--seeds", "3,8", "--frames", 4, *SEEDED, "--out_dir", "between").succeed()
    (frames, labels), _ = made(place / "between")
    for end, seed in ((0, 3), (-1, 8)):
        (sample, label), _ = made(place / f"seed{seed}")
        np.testing.assert_array_equal(frames[end], sample[0])
        assert labels[end] == label[0]
    assert len(np.unique(frames, axis=0)) == 4
    strip = pixels(place / "between/interpolation.png")
    assert strip.shape == (52, 4 * 50 + 2, 3)
    np.testing.assert_array_equal(strip[2:50:6, 52:100:6], frames[1])
    with Image.open(place / "between/interpolation.gif") as gif:
        assert gif.n_frames == 6  # there, and back to where it starts again


def test_between_a_seed_and_itself_nothing_changes(place):
    args = ["--frames", 3, *SEEDED, "--classes", "cat", "--out_dir", "still"]
    edit(place, "interpolate", "--seeds", "3,3", *args).succeed()
    frames = made(place / "still")[0][0]
    assert (frames == frames[0]).all()


def test_an_interpolation_goes_from_one_image_to_the_other(place):
    pair = "data/cat_02.png,data/dog_03.png"
    edit(place, "interpolate", "--images", pair, "--frames", 3, "--sampler", "heun", "--out_dir", "pair").succeed()
    (frames, labels), names = made(place / "pair")
    assert labels.tolist() == [0, 0, 1] and names[2] == "dog_000002.png"
    assert commands.psnr(frames[[0, 2]], originals(place)[[1, 4]]).min() > 25
    assert commands.psnr(frames[[1, 1]], originals(place)[[1, 4]]).max() < 25


def test_what_is_known_stays_in_every_painting(place):
    save_mask(place / "mask.png", np.arange(16)[:, None].repeat(16, 1) >= 8)
    args = ["--images", "data", "--mask", "mask.png", "--steps", 6, "--jump_length", 2, "--resamplings", 2]
    result = edit(place, "inpaint", *args, "--num_samples", 9, "--out_dir", "painted").succeed()
    assert "ancestral, 11 steps" in result.out  # of which 5 are taken twice
    (painted, labels), _ = made(place / "painted")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    for i in range(9):
        np.testing.assert_array_equal(painted[i][:4], originals(place)[i % 6][:4])
    assert (painted[0][4:] != painted[6][4:]).any()
    sheet = pixels(place / "painted/samples.png")
    assert (sheet[2:50:6, 2:50:6][4:] == commands.GREY).all()
    edit(place, "inpaint", *args, "--batch_size", 1, "--num_samples", 9, "--out_dir", "one_by_one").succeed()
    assert abs(made(place / "one_by_one")[0][0].astype(int) - painted).max() <= 1


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m"])
def test_stronger_variations_are_less_like_the_image(place, sampler):
    found = []
    for strength in (0.05, 0.5, 1):
        out_dir = f"varied_{sampler}_{strength}"
        args = ["--images", "data", "--strength", strength, "--num_samples", 12, "--sampler", sampler, "--steps", 20]
        edit(place, "variations", *args, "--out_dir", out_dir).succeed()
        varied = made(place / out_dir)[0][0]
        assert (varied[:6] != varied[6:]).any(axis=(1, 2, 3)).all()
        found.append(commands.psnr(varied, originals(place)[[*range(6), *range(6)]]).mean())
    assert found[0] > found[1] + 3 and found[1] > found[2] + 1


def test_steps_are_printed_along_the_commands_path(place):
    result = edit(place, "variations", "--strength", 0.5, "--steps", 5, "--print_steps").succeed()
    rows = [line.split()[1] for line in result.out.splitlines()[-5:]]
    assert rows[0] == rows[-1] == "image" and float(rows[1]) > float(rows[2]) > float(rows[3]) == 0


# Wrong use


def refused(result, *phrases):
    assert result.code == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for phrase in phrases:
        assert phrase in result.err


def test_wrong_use_is_refused_before_a_folder_is_made(place, tmp_path):
    save_mask(tmp_path / "nothing.png", np.zeros((8, 8)))
    np.savez(tmp_path / "other.npz", np.zeros((2, 1, 8, 8), np.float32))
    np.savez(tmp_path / "objects.npz", np.array([{}]))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/1.png").write_bytes((place / "data/cat_00.png").read_bytes())
    model, data = ["--model_path", place / "run/ema_0.5_000020.pt"], ["--images", place / "data"]

    def refuse(name, *args):
        return call("image_edit", name, *model, *args, cwd=tmp_path)

    refused(call("image_edit", "encode", *data, cwd=tmp_path), "--model_path is missing")
    refused(refuse("encode"), "--images is missing")
    refused(refuse("encode", "--images", "nowhere"), "--images nowhere does not exist")
    refused(refuse("encode", "--images", "plain/1.png,plain/2.png"), "--images plain/2.png does not exist")
    refused(refuse("encode", "--images", "plain"), "--images plain has no classes among cat, dog, which")
    refused(refuse("encode", *data, "--steps", 1), "encode needs at least two steps")
    refused(refuse("encode", *data, "--out_dir", place / "data/out"), "lies in --images")
    refused(refuse("encode", *data, "--classes", "owl"), "--classes owl: the model has the classes 0..1: cat, dog")
    refused(refuse("encode", *data, "--guidance_scale", 2), "--guidance_scale 2.0 does not go with the way")
    refused(refuse("interpolate", *data), f"--images {place}/data holds 6 images: interpolate goes between two")
    refused(refuse("inpaint", *data, "--mask", "nothing.png"), "nothing.png has nothing to paint")
    refused(refuse("decode", "--latents", "other.npz"), "holds noise of (1, 8, 8)", "makes images of (3, 8, 8)")
    refused(refuse("decode", "--latents", "objects.npz"), "could run code when loaded")
    refused(refuse("encod"), "did you mean encode?")
    assert {path.name for path in tmp_path.iterdir()} == {"nothing.png", "other.npz", "objects.npz", "plain"}


def test_checkpoints_of_other_kinds(place, tmp_path):
    args = ["--data_dir", place / "data", "--batch_size", 4, "--max_steps", 1, "--ema_rate", 0.5]
    call("image_train", *TINY_IMAGE, *args, "--out_dir", "plain", cwd=tmp_path).succeed()
    call("super_res_train", *TINY_SUPER_RES, *args, "--out_dir", "large", cwd=tmp_path).succeed()
    images_of = ["encode", "--images", place / "data", "--model_path"]
    result = call("image_edit", *images_of, "large/ema_0.5_000000.pt", cwd=tmp_path)
    refused(result, "is a super-resolution model: use the super_res_* scripts")
    result = call("image_edit", *images_of, "plain/ema_0.5_000000.pt", "--classes", "cat", cwd=tmp_path)
    refused(result, "--classes cat", "was trained without classes")
    call("image_edit", *images_of, "plain/ema_0.5_000000.pt", "--steps", 5, "--out_dir", "out", cwd=tmp_path).succeed()
    with np.load(tmp_path / "out/latents.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "model", "way"]
