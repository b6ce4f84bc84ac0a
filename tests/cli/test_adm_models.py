"""Models of ADM's form through the commands: training, resuming, sampling by ranks, guidance by a classifier."""

import numpy as np
import pytest
import torch as th
from PIL import Image
from script_helpers import call, run

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError

NETWORK = [
    "--image_size", 8, "--num_channels", 64, "--num_res_blocks", 1, "--channel_mult", "0.5,1",
    "--attention_resolutions", "8,4", "--num_head_channels", 32, "--resblock_updown", "True",
    "--use_new_attention_order", "True", "--class_cond", "True",
]  # fmt: skip
PROCESS = ["--learn_sigma", "True", "--diffusion_steps", 20, "--noise_schedule", "cosine"]
TRAINING = ["--batch_size", 4, "--num_workers", 0, "--lr", "1e-3", "--ema_rate", "0.9", "--save_interval", 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of two classes, light above and light below."""
    place = tmp_path_factory.mktemp("place")
    (place / "images").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 60, (8, 8, 3), dtype=np.uint8)
        pixels[4:] += np.uint8(180 * (i % 2))
        pixels[:4] += np.uint8(180 * (1 - i % 2))
        Image.fromarray(pixels).save(place / "images" / f"{('above', 'below')[i % 2]}_{i:02d}.png")
    return place


def train(place, out, *more):
    call("image_train", "--data_dir", "images", *NETWORK, *PROCESS, *TRAINING, "--out_dir", out, *more,
         cwd=place).succeed()  # fmt: skip


@pytest.fixture(scope="module")
def model(place):
    """A run of four steps, stopped and resumed after two."""
    train(place, "parts", "--max_steps", 2)
    train(place, "parts", "--max_steps", 4, "--resume", "auto")
    return place / "parts"


@pytest.fixture(scope="module")
def classifier(place):
    flags = ["--image_size", 8, "--classifier_width", 32, "--classifier_depth", 1, "--channel_mult", "1,1",
             "--classifier_attention_resolutions", "4", "--classifier_pool", "attention", *PROCESS[2:]]  # fmt: skip
    call("classifier_train", "--data_dir", "images", *flags, "--batch_size", 12, "--num_workers", 0, "--lr", "1e-2",
         "--ema_rate", "0", "--max_steps", 20, "--out_dir", "classifier", cwd=place).succeed()  # fmt: skip
    return place / "classifier"


def test_a_run_in_two_parts_is_the_run_in_one(place, model):
    train(place, "whole", "--max_steps", 4)
    for name in ("model000004.pt", "ema_0.9_000004.pt"):
        one, two = (th.load(folder / name, weights_only=True) for folder in (place / "whole", model))
        assert one.keys() == two.keys() and all(th.equal(one[key], two[key]) for key in one)


def test_the_checkpoint_describes_the_network(model):
    loaded = idf.load(model)
    options = loaded.settings.model
    assert (options.num_head_channels, options.resblock_updown, options.use_new_attention_order) == (32, True, True)
    assert loaded.network.input_blocks[2][0].updown and options.channel_mult == "0.5,1"


@pytest.mark.parametrize("flags", [["--num_head_channels", 16], ["--use_new_attention_order", "False"]])
def test_a_flag_that_contradicts_the_description_is_named(model, flags, place):
    result = call("image_sample", "--model_path", model, "--num_samples", 1, *flags, cwd=place)
    assert result.code == 1 and flags[0] in result.err


def test_a_file_without_description_needs_the_flags_that_shapes_do_not_show(model, place):
    plain = place / "plain.pt"
    th.save(dict(th.load(model / "ema_0.9_000004.pt", weights_only=True)), plain)
    with pytest.raises(UserError, match="num_head_channels"):
        idf.load(plain)
    words = [word for flag, value in zip(NETWORK[::2], NETWORK[1::2]) for word in (flag, str(value))]
    asked = ["--num_samples", 2, "--classes", "0,1", "--seed", 3]
    call("image_sample", "--model_path", plain, *words, *PROCESS, *asked, "--out_dir", "by_flags", cwd=place).succeed()
    call("image_sample", "--model_path", model, *asked, "--out_dir", "described", cwd=place).succeed()
    one, two = (np.load(next((place / folder).glob("samples_*.npz")))["arr_0"] for folder in ("by_flags", "described"))
    assert np.array_equal(one, two)


def test_two_ranks_draw_the_images_of_one(model, place):
    asked = ["--model_path", model, "--num_samples", 4, "--batch_size", 2, "--classes", "0,1", "--seed", 1]
    run("mpiexec", 2, "image_sample", *asked, "--out_dir", "two", cwd=place).succeed()
    call("image_sample", *asked, "--out_dir", "one", cwd=place).succeed()
    one, two = (np.load(next((place / folder).glob("samples_*.npz")))["arr_0"] for folder in ("one", "two"))
    assert np.array_equal(one, two)


def test_a_classifier_of_adms_form_guides_the_model(model, classifier, place):
    loaded = idf.load(model)
    path = str(classifier / "model000020.pt")
    assert checkpoint.load(path)[1]["config"]["classifier_resblock_updown"] is True
    guided = loaded.sample(8, classes=["above"], classifier_path=path, classifier_scale=100, seed=2, progress=False)
    plain = loaded.sample(8, classes=["above"], seed=2, progress=False)

    def lightness_above(images):
        array = images.array.astype(float)
        return (array[:, :4] - array[:, 4:]).mean()

    assert lightness_above(guided) > lightness_above(plain) + 1


def test_a_classifier_without_description_is_read_off_its_shapes(model, classifier, place):
    described = str(classifier / "model000020.pt")
    plain = place / "plain_classifier.pt"
    th.save(dict(th.load(described, weights_only=True)), plain)
    loaded = idf.load(model)
    asked = dict(classes=["below"], classifier_scale=5, seed=2, progress=False)
    one = loaded.sample(2, classifier_path=described, **asked)
    two = loaded.sample(2, classifier_path=str(plain), classifier_depth=1, **asked)
    assert np.array_equal(one.array, two.array)
    with pytest.raises(UserError, match="classifier_width"):
        loaded.sample(2, classifier_path=str(plain), classifier_width=64, **asked)


def test_float16_for_the_model_leaves_the_classifier_alone(model, classifier):
    loaded = idf.load(model)
    guide = str(classifier / "model000020.pt")
    asked = dict(classes=["below"], classifier_path=guide, seed=2, steps=2, progress=False)
    exact, half = loaded.sample(2, **asked), loaded.sample(2, use_fp16=True, **asked)
    assert np.abs(exact.array.astype(int) - half.array.astype(int)).max() <= 8
    with pytest.raises(UserError, match="use_fp16"):
        loaded.sample(2, use_fp16=True, precision="bf16", **asked)


def test_the_names_and_the_bits_of_a_state_dict_stay(model, tmp_path):
    theirs = dict(th.load(model / "ema_0.9_000004.pt", weights_only=True))
    th.save(theirs, tmp_path / "plain.pt")
    options = dict(
        num_head_channels=32, use_new_attention_order=True, image_size=8, noise_schedule="cosine", diffusion_steps=20
    )
    idf.load(tmp_path / "plain.pt", **options).save(tmp_path / "ours.pt")
    ours = th.load(tmp_path / "ours.pt", weights_only=True)
    assert list(ours) == list(theirs) and all(th.equal(ours[name], theirs[name]) for name in theirs)
