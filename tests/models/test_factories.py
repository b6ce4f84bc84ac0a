"""The factories, and checkpoints that describe themselves."""

import argparse
import inspect
import json
from dataclasses import replace

import pytest
import torch as th
from helpers import GOLDEN, golden_json
from published_options import MODEL, SUPER_RES

from improved_diffusion import script_util
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.loading import encoder_options, load_model, read_kind, take_options
from improved_diffusion.cli.published_flags import add_dict_to_argparser, args_to_dict
from improved_diffusion.config import ClassifierConfig, ModelConfig, UserError, str2bool
from improved_diffusion.config.presets import options_for
from improved_diffusion.config.published import model_and_diffusion_defaults, sr_model_and_diffusion_defaults
from improved_diffusion.config.settings import (
    ClassifierTraining,
    ImageModel,
    ImageSampling,
    ImageTraining,
    SuperResSampling,
    SuperResTraining,
)
from improved_diffusion.config.settings import (
    SuperResModel as SuperResSettings,
)
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.models.build import build_classifier, build_model, build_model_and_diffusion, with_levels
from improved_diffusion.models.factories import (
    attention_factors,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    resolve_channel_mult,
    sides_without_level,
    sr_create_model_and_diffusion,
)
from improved_diffusion.unet import AttentionBlock, SuperResModel, UNetModel

NETWORK = (
    "num_channels num_res_blocks learn_sigma class_cond use_checkpoint attention_resolutions num_heads "
    "num_heads_upsample use_scale_shift_norm dropout"
)
BOTH = (
    "num_channels num_res_blocks num_heads num_heads_upsample attention_resolutions dropout diffusion_steps "
    "noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint "
    "use_scale_shift_norm"
)
SIGNATURES = {
    "create_model_and_diffusion": f"image_size class_cond learn_sigma sigma_small {BOTH}",
    "sr_create_model_and_diffusion": f"large_size small_size class_cond learn_sigma {BOTH}",
    "create_model": f"image_size {NETWORK}",
    "sr_create_model": f"large_size small_size {NETWORK}",
    "args_to_dict": "args keys",
    "add_dict_to_argparser": "parser default_dict",
}


# Factories


@pytest.mark.parametrize("name", SIGNATURES)
def test_factory_has_the_published_arguments_in_order(name):
    parameters = list(inspect.signature(getattr(script_util, name)).parameters.values())
    published = SIGNATURES[name].split()
    assert [p.name for p in parameters[: len(published)]] == published
    assert all(p.default is p.empty for p in parameters[: len(published)])
    assert all(p.default is not p.empty for p in parameters[len(published) :])


def test_create_gaussian_diffusion_has_the_published_defaults():
    parameters = inspect.signature(create_gaussian_diffusion).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert {name: p.default for name, p in parameters.items()} == dict(
        steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
        rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="",
        # Ours, which change nothing unless given.
        predict_v=False, schedule_shift=1.0, zero_terminal_snr=False, min_snr_gamma=0.0,
    )  # fmt: skip


def test_defaults_are_the_published_dicts():
    assert model_and_diffusion_defaults() == MODEL
    assert sr_model_and_diffusion_defaults() == SUPER_RES
    assert script_util.NUM_CLASSES == 1000
    model_and_diffusion_defaults()["image_size"] = 3
    assert model_and_diffusion_defaults()["image_size"] == 64


def test_defaults_make_the_published_model():
    with th.device("meta"):
        model, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults())
        sr_model, _ = sr_create_model_and_diffusion(**sr_model_and_diffusion_defaults())
    assert type(model) is UNetModel and type(sr_model) is SuperResModel
    assert model.channel_mult == (1, 2, 3, 4) and sr_model.channel_mult == (1, 1, 2, 2, 4, 4)
    assert model.attention_resolutions == (4, 8) and sr_model.attention_resolutions == (16, 32)
    assert model.out_channels == 3 and model.num_classes is None and sr_model.in_channels == 6
    assert diffusion.num_timesteps == 1000 and diffusion.rescale_timesteps


@pytest.mark.parametrize(
    "flags, loss", [
        (dict(use_kl=True), LossType.RESCALED_KL),
        (dict(use_kl=True, rescale_learned_sigmas=True), LossType.RESCALED_KL),
        (dict(rescale_learned_sigmas=True), LossType.RESCALED_MSE), (dict(), LossType.MSE),
    ],
)  # fmt: skip
def test_flags_choose_the_loss(flags, loss):
    assert create_gaussian_diffusion(steps=20, **flags).loss_type == loss


@pytest.mark.parametrize(
    "flags, var", [
        (dict(learn_sigma=True), ModelVarType.LEARNED_RANGE),
        (dict(learn_sigma=True, sigma_small=True), ModelVarType.LEARNED_RANGE),
        (dict(sigma_small=True), ModelVarType.FIXED_SMALL), (dict(), ModelVarType.FIXED_LARGE),
    ],
)  # fmt: skip
def test_flags_choose_the_variance(flags, var):
    assert create_gaussian_diffusion(steps=20, **flags).model_var_type == var


def test_flags_choose_the_target_and_the_steps():
    assert create_gaussian_diffusion(steps=20, predict_xstart=True).model_mean_type == ModelMeanType.START_X
    assert create_gaussian_diffusion(steps=20).model_mean_type == ModelMeanType.EPSILON
    diffusion = create_gaussian_diffusion(steps=100, timestep_respacing="ddim10", noise_schedule="cosine")
    assert diffusion.num_timesteps == 10 and diffusion.original_num_steps == 100
    assert diffusion.timestep_map == list(range(0, 100, 10))


def test_sigma_small_reaches_super_resolution():
    with th.device("meta"):
        flags = {**sr_model_and_diffusion_defaults(), "num_channels": 32, "sigma_small": True}
        assert sr_create_model_and_diffusion(**flags)[1].model_var_type == ModelVarType.FIXED_SMALL


def test_class_conditional_models_have_a_thousand_classes_unless_told():
    with th.device("meta"):
        for num_classes, expected in ((0, 1000), (7, 7)):
            model = create_model(32, 32, 1, False, True, False, "8", 1, -1, True, 0.0, num_classes=num_classes)
            assert model.label_emb.weight.shape == (expected, 128)


@pytest.mark.parametrize(
    "size, mult", [(256, (1, 1, 2, 2, 4, 4)), (64, (1, 2, 3, 4)), (32, (1, 2, 2, 2)), (28, (1, 2, 2)), (8, (1, 2))]
)
def test_levels_by_image_size(size, mult):
    assert resolve_channel_mult(size) == mult


@pytest.mark.parametrize("size", [*range(2, 300, 2), "32x64", "256x64", "48x96"])
def test_levels_divide_every_even_size(size):
    mult = resolve_channel_mult(size)
    height, width = (size, size) if isinstance(size, int) else map(int, size.split("x"))
    assert len(mult) > 1 and height % 2 ** (len(mult) - 1) == width % 2 ** (len(mult) - 1) == 0


def test_given_levels_are_taken_or_refused():
    assert resolve_channel_mult(24, "1,1.5,2") == (1, 1.5, 2)
    with pytest.raises(UserError, match=r"--image_size 20.*1,2,2,2.*multiple of 8"):
        resolve_channel_mult(20, "1,2,2,2")
    with pytest.raises(UserError, match="--image_size 33"):
        resolve_channel_mult(33)
    assert resolve_channel_mult(33, "1") == (1,)
    with pytest.raises(UserError, match=r"--channel_mult 1,1\.2"):
        create_model(32, 32, 1, False, False, False, "8", 1, -1, True, 0.0, channel_mult="1,1.2")


def test_attention_resolutions_become_downsampling_factors():
    assert attention_factors(64, "16,8") == (4, 8)
    assert attention_factors(256, "16") == (16,)
    assert attention_factors("64x128", "16") == (4,)
    assert attention_factors(28, "16,8") == (2, 4)
    assert attention_factors(32, "") == ()


def test_heads_that_do_not_fit_are_a_users_error():
    with pytest.raises(UserError, match="num_heads 5"):
        create_model(32, 32, 1, False, False, False, "8", 5, -1, True, 0.0)


# argparse helpers


def test_published_scripts_parse_their_defaults():
    parser = argparse.ArgumentParser()
    defaults = {**model_and_diffusion_defaults(), "data_dir": None, "lr": 1e-4}
    add_dict_to_argparser(parser, defaults)
    assert vars(parser.parse_args([])) == defaults
    args = parser.parse_args(["--learn_sigma", "True", "--lr", "1", "--image_size", "32", "--data_dir", "x"])
    assert (args.learn_sigma, args.lr, args.image_size, args.data_dir) == (True, 1.0, 32, "x")
    assert args_to_dict(args, ["lr", "image_size"]) == {"lr": 1.0, "image_size": 32}
    chosen = args_to_dict(args, model_and_diffusion_defaults().keys())
    assert chosen == {**MODEL, "learn_sigma": True, "image_size": 32}


def test_str2bool():
    for text in ("yes", "True", "T", "y", "1", True):
        assert str2bool(text) is True
    for text in ("no", "False", "F", "n", "0", False):
        assert str2bool(text) is False
    with pytest.raises(ValueError):
        str2bool("maybe")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_dict_to_argparser(parser, {"flag": True})
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--flag", "maybe"])


# Checkpoints

SMALL = dict(
    num_channels=32, num_res_blocks=1, num_heads=2, attention_resolutions="4", learn_sigma=True, diffusion_steps=50,
    noise_schedule="cosine",
)  # fmt: skip
IMAGE = dict(SMALL, image_size=8, channel_mult="1,2")
SUPER = dict(SMALL, large_size=16, small_size=4, channel_mult="1,2", class_cond=True, num_classes=3)


def build(kind, **options):
    settings = kind.of(options)
    return build_model_and_diffusion(settings.model, settings.diffusion)[0]


def load(path, kind=ImageSampling, **given):
    return load_model(kind.of(given), given, str(path))


def save_model(path, metadata, kind=ImageSampling, **options):
    model = build(kind, **options)
    checkpoint.save_state_dict(model.state_dict(), str(path), metadata)
    return model


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "ema_0.9999_000010.pt"
    config = ImageTraining.of(IMAGE).values()
    model = save_model(path, {"config": config, "class_names": None, "step": 11}, **IMAGE)
    return path, model


def test_a_described_checkpoint_needs_no_options(described):
    path, saved = described
    loaded = load(path)
    assert loaded.path == str(path) and loaded.metadata["step"] == 11 and loaded.given == frozenset()
    assert not loaded.model.training and loaded.model.num_heads == 2 and loaded.diffusion.num_timesteps == 50
    assert loaded.settings.model.image_size == 8
    for name, value in saved.state_dict().items():
        th.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=0)
    assert loaded.settings.sample.batch_size == 16  # the sampling command's own


def test_loading_changes_no_settings_of_the_caller(described):
    settings = ImageSampling.of({})
    assert load_model(settings, (), str(described[0])).settings.model.image_size == 8
    assert settings == ImageSampling.of({})


def test_what_training_does_not_fix_may_be_given(described):
    diffusion = load(described[0], timestep_respacing="10").diffusion
    assert diffusion.num_timesteps == 10 and diffusion.original_num_steps == 50


def test_an_option_that_repeats_the_checkpoint_is_no_contradiction(described):
    load(described[0], image_size=8, num_channels=32)


@pytest.mark.parametrize(
    "name, value, stored",
    [("num_channels", 64, 32), ("diffusion_steps", 100, 50), ("noise_schedule", "linear", "cosine"),
     ("learn_sigma", False, True), ("image_size", 32, 8), ("channels", 1, 3), ("num_heads", 4, 2)],
)  # fmt: skip
def test_a_contradicting_flag_names_both_values(described, name, value, stored):
    with pytest.raises(UserError) as error:
        load(described[0], **{name: value})
    assert f"--{name} {value}" in str(error.value) and f"--{name} {stored}" in str(error.value)
    assert str(described[0]) in str(error.value)


def test_image_and_super_resolution_models_are_told_apart(described, tmp_path):
    with pytest.raises(UserError, match="is an image model"):
        load(described[0], SuperResSampling)
    path = tmp_path / "sr.pt"
    save_model(path, {"config": {"large_size": 16, "small_size": 4}}, SuperResSampling, **SUPER)
    with pytest.raises(UserError, match="is a super-resolution model"):
        load(path)
    assert read_kind(str(described[0])) is ImageModel and read_kind(str(path)) is SuperResSettings


def test_a_super_resolution_checkpoint_needs_no_flags(tmp_path):
    path, config = tmp_path / "sr.pt", SuperResTraining.of(SUPER).values()
    save_model(path, {"config": config}, SuperResSampling, **SUPER)
    model = load(path, SuperResSampling).model
    assert isinstance(model, SuperResModel) and model.num_classes == 3


# Foreign checkpoints


def save_foreign(path, model):
    th.save({name: value.clone() for name, value in model.state_dict().items()}, path)


@pytest.mark.parametrize(
    "flags",
    [
        dict(image_size=32, num_channels=32, num_res_blocks=2, learn_sigma=True),
        dict(image_size=32, num_channels=64, num_res_blocks=1, class_cond=True, use_scale_shift_norm=False),
        dict(image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="32,8", num_heads=2),
        dict(image_size=32, num_channels=32, num_res_blocks=1, channels=1, class_cond=True, num_classes=4),
    ],
)
def test_a_foreign_checkpoint_has_its_architecture_read_off(tmp_path, flags, capsys):
    path = tmp_path / "model.pt"
    model = build(ImageSampling, **flags)
    save_foreign(path, model)
    loaded = load(path, diffusion_steps=1000)
    assert loaded.metadata == {} and read_kind(str(path)) is ImageModel
    for name, value in flags.items():
        if name != "num_heads":
            assert loaded.settings.values()[name] == value, name
    text = capsys.readouterr().out
    assert f"num_channels={flags['num_channels']}" in text and "num_heads=4" in text  # as read, and as assumed
    assert loaded.model.attention_resolutions == model.attention_resolutions


def test_a_foreign_super_resolution_checkpoint_is_read_too(tmp_path):
    flags = dict(large_size=64, small_size=16, num_channels=32, num_res_blocks=1, learn_sigma=True, class_cond=True)
    save_foreign(tmp_path / "sr.pt", build(SuperResSampling, **flags))
    loaded = load(tmp_path / "sr.pt", SuperResSampling, small_size=16)
    network = loaded.settings.model
    assert isinstance(loaded.model, SuperResModel) and loaded.settings.diffusion.learn_sigma is True
    assert (network.large_size, network.class_cond, network.num_classes) == (64, True, 1000)
    with pytest.raises(UserError, match="super-resolution model"):
        load(tmp_path / "sr.pt")
    assert read_kind(str(tmp_path / "sr.pt")) is SuperResSettings


def test_a_flag_that_contradicts_a_foreign_checkpoint_names_both_values(tmp_path):
    save_foreign(tmp_path / "model.pt", build(ImageSampling, image_size=32, num_channels=32, num_res_blocks=1))
    with pytest.raises(UserError, match=r"--num_res_blocks 2 .*--num_res_blocks 1"):
        load(tmp_path / "model.pt", num_res_blocks=2)


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "layouts").glob("*.json")))
def test_flags_of_the_published_models_are_read_off_their_shapes(name):
    layout = golden_json(f"layouts/{name}")
    shapes = {key: th.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}
    settings = (SuperResSampling if layout["superres"] else ImageSampling).of({})
    options = take_options(settings, {"diffusion_steps"}, "model.pt", shapes, {}).values()
    for flag in ("num_channels", "num_res_blocks", "learn_sigma", "class_cond", "image_size"):
        if flag in layout["flags"]:
            assert options[flag] == layout["flags"][flag]
    if layout["superres"]:
        assert options["large_size"] == 256
    assert options["attention_resolutions"] == "16,8" and options["use_scale_shift_norm"] is True


@pytest.mark.parametrize("updown", [False, True])
def test_what_shapes_do_not_show_must_be_given(tmp_path, updown):
    flags = dict(image_size=32, num_channels=32, num_res_blocks=1, num_heads=2, resblock_updown=updown)
    save_foreign(tmp_path / "model.pt", build(ImageSampling, **flags))
    with pytest.raises(UserError, match=r"model\.pt has no description.*diffusion_steps.*num_heads"):
        load(tmp_path / "model.pt", timestep_respacing="10")
    if updown:
        with pytest.raises(UserError, match=r"do not show num_head_channels, num_heads, use_new_attention_order"):
            load(tmp_path / "model.pt", noise_schedule="cosine")
    loaded = load(tmp_path / "model.pt", num_heads=2)
    assert loaded.model.middle_block[1].num_heads == 2 and loaded.settings.model.resblock_updown is updown


def test_an_image_size_or_attention_that_does_not_fit_the_levels_is_said(tmp_path, capsys):
    flags = dict(image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="16,8")
    save_foreign(tmp_path / "model.pt", build(ImageSampling, **flags))
    assert load(tmp_path / "model.pt", image_size=32).settings.model.attention_resolutions == "8,4"
    out = capsys.readouterr().out
    assert "images of 64" in out and "image_size=32" in out.partition("By flag or default:")[2]
    with pytest.raises(UserError, match=r"--attention_resolutions 16,8 with --image_size 32 .* 1/4, 1/8 of"):
        load(tmp_path / "model.pt", image_size=32, attention_resolutions="16,8")
    with pytest.raises(UserError, match=r"--num_channels 64 contradicts .* preset"):
        load(tmp_path / "model.pt", image_size=32, attention_resolutions="16,8", num_channels=64)


def test_a_network_of_guided_diffusions_form_has_its_default_of_the_timesteps(tmp_path):
    flags = dict(image_size=32, num_channels=32, num_res_blocks=1, resblock_updown=True)
    save_foreign(tmp_path / "model.pt", build(ImageSampling, **flags))
    asked = dict(num_heads=4, diffusion_steps=4000)
    assert load(tmp_path / "model.pt", **asked).diffusion.rescale_timesteps is False
    assert load(tmp_path / "model.pt", **asked, rescale_timesteps=True).diffusion.rescale_timesteps is True


def test_a_missing_tensor_is_named(tmp_path):
    state_dict = build(ImageSampling, image_size=32, num_channels=32, num_res_blocks=1).state_dict()
    del state_dict["time_embed.0.weight"]
    th.save(dict(state_dict), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt .*lacks time_embed\.0\.weight"):
        load(tmp_path / "model.pt", num_heads=4)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_wrong_depth_of_a_classifier_is_named(depth):
    config = ClassifierConfig(image_size=16, classifier_width=32, classifier_depth=1, num_classes=3)
    with th.device("meta"):
        state_dict = build_classifier(config).state_dict()
    like = ClassifierConfig(classifier_depth=depth)
    with pytest.raises(UserError, match=f"--classifier_depth {depth} is wrong"):
        encoder_options("x.pt", state_dict, like, {"classifier_depth"})


ADM_LAYOUTS = {
    "64x64_diffusion": "adm-imagenet64", "128x128_diffusion": "adm-imagenet128",
    "256x256_diffusion_uncond": "adm-imagenet256-uncond", "64_256_upsampler": "adm-upsample-64-256",
}  # fmt: skip


@pytest.mark.parametrize("name", ADM_LAYOUTS)
def test_published_adm_models_have_a_preset_and_are_never_guessed(name):
    layout = golden_json(f"adm/layouts/{name}")
    shapes = {key: th.empty(shape, device="meta") for key, shape in layout["shapes"].items()}
    words = layout["flags"].replace("--", "").split()
    flags = dict(zip(words[::2], words[1::2]))
    settings = SuperResSampling if "large_size" in flags else ImageSampling
    with pytest.raises(UserError, match=rf"--preset .*{ADM_LAYOUTS[name]}\b"):
        take_options(settings.of({}), (), "model.pt", shapes, {})
    by_flags = take_options(settings.of(flags), flags, "model.pt", shapes, {})
    preset = options_for(ADM_LAYOUTS[name], settings)
    by_preset = take_options(settings.of(preset), preset, "model.pt", shapes, {})
    with th.device("meta"):
        built = build_model(by_preset.model, by_preset.diffusion.learn_sigma)
    assert {key: list(t.shape) for key, t in built.state_dict().items()} == layout["shapes"]
    assert sum(p.numel() for p in built.parameters()) == layout["parameters"]
    differing = {name for name, value in by_flags.values().items() if by_preset.values()[name] != value}
    assert differing <= {"rescale_timesteps", "rescale_learned_sigmas", "use_fp16"}  # equal for 1000 steps


@pytest.mark.parametrize("name", ["64x64_classifier", "128x128_classifier"])
def test_published_adm_classifiers_are_read_off_their_shapes(name):
    layout = golden_json(f"adm/layouts/{name}")
    shapes = {key: th.empty(shape, device="meta") for key, shape in layout["shapes"].items()}
    options = encoder_options("x.pt", shapes, ClassifierConfig(), ())
    words = layout["flags"].replace("--", "").split()
    for flag, value in zip(words[::2], words[1::2]):
        assert str(options[flag]) == value
    with th.device("meta"):
        built = build_classifier(ClassifierConfig(**options))
    assert {key: list(t.shape) for key, t in built.state_dict().items()} == layout["shapes"]
    assert sum(p.numel() for p in built.parameters()) == layout["parameters"]
    preset = ClassifierTraining.of(options_for(f"adm-classifier{options['image_size']}", ClassifierTraining)).model
    assert replace(preset, **options) == replace(ClassifierConfig(), **options)
    for flag in ("classifier_width", "classifier_depth", "classifier_pool", "classifier_resblock_updown"):
        assert getattr(preset, flag) == options[flag]


def test_a_state_dict_of_something_else_is_an_error(tmp_path):
    th.save(th.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not a checkpoint of this method"):
        load(tmp_path / "other.pt")


def test_a_missing_model_path_is_named():
    with pytest.raises(UserError, match="--model_path is missing"):
        load("")
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        load("nowhere.pt")


def test_a_description_with_unknown_options_is_still_read(described, tmp_path):
    """A newer version's checkpoint may know more options than we do."""
    state_dict, metadata = checkpoint.load(str(described[0]))
    metadata["config"]["of_the_future"] = 1
    checkpoint.save_state_dict(state_dict, str(tmp_path / "newer.pt"), json.loads(json.dumps(metadata)))
    load(tmp_path / "newer.pt")


# Attention of sizes that the method was not published for


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_default_attention_of_published_sizes_stays(size):
    assert with_levels(ModelConfig(image_size=size), new=True).attention_resolutions == "16,8"


@pytest.mark.parametrize("size", [24, 40, 48, 80, 96, 112, 160, 192, "48x64", "96x64", "24x64"])
def test_the_default_attention_of_other_sizes_takes_the_nearest_levels(size):
    config = with_levels(ModelConfig(image_size=size), new=True)
    levels = len(config.channel_mult.split(","))
    assert not sides_without_level(size, levels, config.attention_resolutions)
    model = create_model(size, 32, 1, False, False, False, config.attention_resolutions, 1, -1, True, 0.0)
    assert any(isinstance(module, AttentionBlock) for module in model.input_blocks.modules())


def test_sides_that_were_given_are_kept_with_a_warning_where_no_level_has_them(capsys):
    config = with_levels(ModelConfig(image_size=96), {"attention_resolutions"}, new=True)
    assert config.attention_resolutions == "16,8"
    assert "96, 48, 24, 12, 6" in capsys.readouterr().out


def test_a_resumed_network_keeps_its_levels():
    assert with_levels(ModelConfig(image_size=96)).attention_resolutions == "16,8"


def test_a_classifiers_attention_follows_the_same_rule():
    config = ClassifierConfig(image_size=96, num_classes=2)
    assert with_levels(config, new=True).classifier_attention_resolutions == "24,12,6"
