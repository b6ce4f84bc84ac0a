"""What a checkpoint says of itself: values that no flag could have are one error that names the file and the option."""

import copy
import json
import time

import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.loading import load_classifier, load_model
from improved_diffusion.config import ClassifierConfig, DiffusionConfig, ModelConfig, ProcessConfig, UserError
from improved_diffusion.config.messages import shown
from improved_diffusion.config.settings import (
    ClassifierTraining,
    ImageSampling,
    ImageTraining,
    SuperResSampling,
    SuperResTraining,
)
from improved_diffusion.models.build import build_classifier
from improved_diffusion.training.tasks import take_guided_process

ODD = [None, -1, 0, 1.5, 10**9, 10**30, "", "a", "nan", "1," * 50_000, "x" * 10**6, True, [1, 2], {"a": 1}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(state dict, description) of an image model with classes, a super-resolution model and a classifier."""
    folder = tmp_path_factory.mktemp("described")
    image = tiny_settings(ImageTraining, class_cond=True)
    superres = tiny_settings(SuperResTraining, image_size=None, large_size=8, small_size=4)
    save_checkpoint(folder / "image.pt", image, class_names=CLASSES)
    save_checkpoint(folder / "super_res.pt", superres)
    config = ClassifierConfig(
        image_size=8, num_classes=2, classifier_width=32, classifier_depth=1, channel_mult="1,1",
        classifier_attention_resolutions="4",
    )  # fmt: skip
    process = ProcessConfig(diffusion_steps=20, noise_schedule="cosine")
    metadata = {"config": {**vars(config), **vars(process)}, "class_names": CLASSES, "step": 1}
    checkpoint.save_state_dict(build_classifier(config).state_dict(), str(folder / "classifier.pt"), metadata)
    return {name: checkpoint.load(str(folder / f"{name}.pt")) for name in ("image", "super_res", "classifier")}


def with_description(path, state_dict, text):
    """The checkpoint with another description."""
    state_dict = copy.copy(state_dict)
    state_dict._metadata = {**state_dict._metadata, checkpoint.METADATA_KEY: {"json": text}}
    th.save(state_dict, path)
    return str(path)


def described_as(tmp_path, found, **changes):
    """The checkpoint with other options in its description."""
    state_dict, metadata = found
    changed = {**metadata, "config": {**metadata["config"], **changes}}
    return with_description(tmp_path / "odd.pt", state_dict, json.dumps(changed))


def load(kind, path):
    if kind == "classifier":
        return load_classifier(path)
    settings = ImageSampling if kind == "image" else SuperResSampling
    return load_model(settings.of({}), (), path)


def problem(kind, path):
    """The message that loading gives, soon; None where the value is one that a flag could have."""
    start = time.perf_counter()
    try:
        load(kind, path)
    except UserError as error:
        assert path in str(error) and len(str(error)) < 600
        return str(error)
    finally:
        assert time.perf_counter() - start < 30
    return None


OPTIONS = {
    "image": ["image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "channels",
              "attention_resolutions", "channel_mult", "class_cond", "num_classes", "dropout", "label_drop",
              "use_scale_shift_norm", "learn_sigma", "diffusion_steps", "noise_schedule", "schedule_shift",
              "timestep_respacing", "predict_v", "zero_terminal_snr", "min_snr_gamma", "use_checkpoint"],
    "super_res": ["large_size", "small_size"],
    "classifier": ["image_size", "classifier_width", "classifier_depth", "classifier_attention_resolutions", "channels",
                   "num_classes", "channel_mult", "diffusion_steps", "noise_schedule"],
}  # fmt: skip
NEVER = [None, -1, 10**30, "a", "nan", "x" * 10**6, [1, 2], {"a": 1}]  # no option of these can be any of them
FREE = {"timestep_respacing", "min_snr_gamma", "num_heads_upsample"}  # but for these


@pytest.mark.parametrize("kind, option", [(kind, option) for kind, names in OPTIONS.items() for option in names])
def test_an_odd_value_of_an_option_is_one_error_or_that_of_a_flag(tmp_path, checkpoints, kind, option):
    for value in ODD:
        message = problem(kind, described_as(tmp_path, checkpoints[kind], **{option: value}))
        if option not in FREE and value in NEVER:
            assert message is not None, value


@pytest.mark.parametrize(
    "option, value",
    [("num_channels", 10**9), ("num_res_blocks", 200_000), ("diffusion_steps", 10**8), ("image_size", 10**9),
     ("channel_mult", "1," * 1000 + "1"), ("channel_mult", "1,1e9"), ("num_heads", 0), ("num_heads", 3),
     ("num_classes", 10**9), ("channels", 10**9), ("attention_resolutions", "0"), ("noise_schedule", "evil"),
     ("schedule_shift", 0), ("dropout", "a")],
)  # fmt: skip
def test_the_option_is_named(tmp_path, checkpoints, option, value):
    assert option in problem("image", described_as(tmp_path, checkpoints["image"], **{option: value}))


@pytest.mark.parametrize(
    "option, value",
    [("num_channels", 8192), ("num_res_blocks", 100), ("channel_mult", "64,64"), ("num_classes", 10**6)],
)
def test_a_network_that_is_not_the_files_takes_no_memory(tmp_path, checkpoints, monkeypatch, option, value):
    """These values are within their bounds, but would need many GiB."""
    path = described_as(tmp_path, checkpoints["image"], **{option: value})
    built = []
    monkeypatch.setattr("improved_diffusion.checkpoints.loading.build_model_and_diffusion", built.append)
    assert "does not fit the model" in problem("image", path) and not built


@pytest.mark.parametrize(
    "name, values",
    [
        (
            "class_names",
            [5, "a", [], [1, 2], ["a", None], {}, True, ["x" * 10**5, "b"], ["a", "b", "c"], ["a"] * 10**5],
        ),
        ("seen_classes", [5, "01", [], [-1], [0, 3], [True], [0.0], ["0"], {"0": 1}, [None], [10**30]]),
        ("step", [-1, 1.5, "a", None, True, [], 10**30]),
        ("num_images", [-1, "a", None, 10**30]),
        ("config", [5, "a", None, [], [1]]),
        ("ema_rate", [-1, 1, 2, "a", None, []]),
        ("ema_sigma_rel", [-1, 0, 1, "a", None]),
        ("best", [5, {}, {"val_loss": "a", "step": 1, "ema": ""}]),
    ],
)
def test_other_odd_values_are_named(tmp_path, checkpoints, name, values):
    state_dict, metadata = checkpoints["image"]
    for value in values:
        path = with_description(tmp_path / "odd.pt", state_dict, json.dumps({**metadata, name: value}))
        message = problem("image", path)
        assert message is not None and (name in message or "classes" in message) and len(message) < 600


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "[" * 100_000, '{"step": NaN}', '{"step": 1e999}', '{"a": "\\ud800"}', '{"config": '],
)  # fmt: skip
def test_a_damaged_description_is_one_error(tmp_path, checkpoints, text):
    path = with_description(tmp_path / "odd.pt", checkpoints["image"][0], text)
    assert "damaged description" in problem("image", path)


@pytest.mark.parametrize("name", ["total_batch_size", "seed", "anything"])
@pytest.mark.parametrize("value", [10**30, -(10**90), 10**4000], ids=shown)
def test_a_number_beyond_all_options_is_an_error_whatever_its_name(tmp_path, checkpoints, name, value):
    assert "damaged description" in problem("image", described_as(tmp_path, checkpoints["image"], **{name: value}))


def test_python_gets_the_same_error(tmp_path, checkpoints):
    for option, value in (("num_channels", "a"), ("class_cond", None), ("image_size", -1)):
        with pytest.raises(UserError, match=rf"odd\.pt.*{option}"):
            idf.load(described_as(tmp_path, checkpoints["image"], **{option: value}))


def test_values_in_the_form_of_flags_are_taken(tmp_path, checkpoints):
    loaded = load("image", described_as(tmp_path, checkpoints["image"], num_channels="32", learn_sigma="True"))
    assert loaded.settings.model.num_channels == 32 and loaded.settings.diffusion.learn_sigma is True


@pytest.mark.parametrize("option, value", [("diffusion_steps", 10**8), ("image_size", "a"), ("noise_schedule", None)])
def test_a_classifier_takes_no_odd_process_from_the_model_it_guides(tmp_path, checkpoints, option, value):
    path = described_as(tmp_path, checkpoints["image"], **{option: value})
    with pytest.raises(UserError, match=rf"odd\.pt.*{option}"):
        take_guided_process(ClassifierTraining.of({"model_path": path}), frozenset())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["image", "super_res", "classifier"])
def test_weights_that_are_not_finite_are_refused(tmp_path, checkpoints, kind, number):
    state_dict = copy.copy(checkpoints[kind][0])
    name = list(state_dict)[3]
    state_dict[name] = state_dict[name].clone()
    state_dict[name].view(-1)[-1] = number
    th.save(state_dict, tmp_path / "broken.pt")
    message = problem(kind, str(tmp_path / "broken.pt"))
    assert name in message and "not finite" in message


def test_the_largest_published_options_are_within_the_bounds():
    ModelConfig(image_size=256, num_channels=256, num_res_blocks=3, num_heads=4, channel_mult="1,1,2,2,4,4")
    ModelConfig(image_size=1024, num_channels=512, num_res_blocks=8, num_heads=32, num_classes=21_841)
    DiffusionConfig(diffusion_steps=4000, noise_schedule="cosine")
