"""Recipes for one's own images, and which of them `--preset auto` takes."""

import pytest
from helpers import settings_of

from improved_diffusion.cli.image_train import with_recipe
from improved_diffusion.cli.parsing import parse
from improved_diffusion.config import UserError
from improved_diffusion.config.presets import PRESETS, options_for
from improved_diffusion.config.recipes import RECIPES, Hardware, Survey, adapt, choose
from improved_diffusion.config.settings import ImageTraining
from improved_diffusion.models.factories import level_mult, sides_without_level

LARGE = Survey(100_000, 1024, grey=False)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_a_run_that_ends_and_shows_what_it_makes(name):
    settings = ImageTraining.of(options_for(name, ImageTraining))
    train, model = settings.train, settings.model
    assert 0 < settings.watch.sample_interval <= train.save_interval < train.max_steps
    assert train.ema_warmup and settings.diffusion.learn_sigma
    assert level_mult(model.image_size, model.channel_mult, model.num_channels)
    levels = len(model.channel_mult.split(","))
    assert not sides_without_level(model.image_size, levels, model.attention_resolutions)


def test_recipes_have_other_names_than_the_published_models():
    assert not RECIPES.keys() & PRESETS.keys()


@pytest.mark.parametrize(
    "side, cores, gib, size, name",
    [
        (1024, 2, 0, 0, "small-32"),
        (1024, 1, 0, 0, "small-32"),
        (1024, 16, 0, 0, "small-64"),
        (32, 16, 0, 0, "small-32"),
        (32, 16, 80, 0, "small-32"),
        (64, 16, 80, 0, "medium-64"),
        (1024, 16, 80, 0, "large-256"),
        (1024, 16, 24, 0, "medium-128"),
        (1024, 16, 11, 0, "medium-64"),
        (1024, 16, 4, 0, "small-64"),
        (8, 2, 0, 0, "small-32"),
        (1024, 16, 80, 128, "medium-128"),  # --image_size says more than the images
        (32, 16, 80, 64, "medium-64"),
    ],
)
def test_auto_takes_what_the_images_and_the_hardware_allow(side, cores, gib, size, name):
    assert choose(Survey(1000, side, grey=False), Hardware(cores, gib), size) == name


def adapted(name, survey, ranks=1, **given):
    return adapt(RECIPES[name].options, survey, ranks, given)


def test_many_images_get_the_recipe_as_it_is():
    assert adapted("small-32", LARGE) == RECIPES["small-32"].options


@pytest.mark.parametrize(
    "count, ranks, total", [(1, 1, 1), (5, 1, 5), (16, 1, 16), (15, 3, 15), (100, 3, 15), (100, 4, 16)]
)
def test_a_batch_is_no_larger_than_the_set_and_the_ranks_share_it_evenly(count, ranks, total):
    assert adapted("small-32", Survey(count, 100, grey=False), ranks)["total_batch_size"] == total


def test_few_images_make_a_shorter_run_that_is_mirrored_and_has_dropout():
    few = adapted("small-32", Survey(100, 100, grey=True))
    assert few["random_flip"] and few["dropout"] == 0.1 and few["channels"] == 1
    assert few["max_steps"] < RECIPES["small-32"].options["max_steps"]


@pytest.mark.parametrize(
    "given", [dict(max_steps=100), dict(batch_size=4), dict(total_batch_size=4), dict(lr=1.0), dict(image_size=48)]
)
def test_what_was_given_wins(given):
    options = adapted("small-32", LARGE, **given)
    assert not options.keys() & given.keys()
    assert not {"batch_size", "total_batch_size"} & given.keys() or "total_batch_size" not in options
    merged = {**options, **given}
    assert merged["sample_interval"] <= merged["max_steps"] and merged["save_interval"] <= merged["max_steps"]
    settings = ImageTraining.of(merged)
    assert level_mult(settings.model.image_size, settings.model.channel_mult, settings.model.num_channels)


@pytest.mark.parametrize(
    "words, implied",
    [
        (["photos"], True),
        ([], True),
        (["--data_dir", "photos", "--out_dir=x", "--dry_run"], True),
        (["photos", "--resume", "auto"], True),
        (["photos", "--image_size", "64"], False),
        (["photos", "--preset", "cifar10-hybrid"], False),
        (["photos", "--config", "a.json"], False),
        (["--help"], False),
        (["-h"], False),
    ],
)
def test_the_train_command_implies_auto_where_nothing_is_said_of_the_model(words, implied):
    assert (with_recipe(words) == [*words, "--preset", "auto"]) == implied
    assert implied or with_recipe(words) == words


def test_the_published_script_keeps_the_published_defaults():
    parsed = parse(ImageTraining, ["--data_dir", "photos"])
    assert parsed.preset is None and parsed.given == {"data_dir"}
    assert parsed.settings.values() == ImageTraining.of({"data_dir": "photos"}).values()


@pytest.mark.parametrize("script", ["super_res_train", "classifier_train", "image_sample", "image_nll"])
def test_auto_is_for_training_image_models(script):
    with pytest.raises(UserError, match="--preset auto"):
        parse(settings_of(script), ["--preset", "auto"])
