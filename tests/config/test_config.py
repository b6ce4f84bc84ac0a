"""Every option: its name, its default, how it is spelt, what wins, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from helpers import settings_of
from published_options import MODEL, SUPER_RES

from improved_diffusion import config
from improved_diffusion.cli import parsing
from improved_diffusion.config import UserError, WatchConfig
from improved_diffusion.config.presets import PRESETS, preset_options

TRAIN = dict(
    data_dir="", schedule_sampler="uniform", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, batch_size=1, microbatch=-1,
    ema_rate="0.9999", log_interval=10, save_interval=10000, resume_checkpoint="", use_fp16=False,
    fp16_scale_growth=1e-3,
)  # fmt: skip
SAMPLE = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")

CLASSIFIER = ("image_size", "dropout", "use_checkpoint", "diffusion_steps", "noise_schedule", "rescale_timesteps")

PUBLISHED = {
    "image_train": {**TRAIN, **MODEL},
    "image_sample": {**SAMPLE, **MODEL},
    "image_nll": dict(MODEL, data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path=""),
    "super_res_train": {**TRAIN, **SUPER_RES},
    "super_res_sample": {**SAMPLE, **SUPER_RES, "base_samples": ""},
    "classifier_train": {**TRAIN, **{name: MODEL[name] for name in CLASSIFIER}},
}
SETTINGS = {name: settings_of(name) for name in PUBLISHED}
ALL_GROUPS = sorted(
    {group for settings in SETTINGS.values() for group in settings.groups().values()}, key=lambda group: group.__name__
)
FLAGS = [(script, flag) for script, flags in PUBLISHED.items() for flag in flags]


def parse(script, *argv):
    """What a command line gives, as `.settings`, `.given` and `.preset`."""
    return parsing.parse(SETTINGS[script], [str(word) for word in argv])


def options_of(script, *argv):
    """The value of each option."""
    return SimpleNamespace(**parse(script, *argv).settings.values())


# Names and defaults


@pytest.mark.parametrize("script, flag", FLAGS)
def test_published_flag_has_its_published_default(script, flag):
    expected = PUBLISHED[script][flag]
    value = parse(script).settings.values()[flag]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("script", PUBLISHED)
def test_options_are_marked_published_that_are(script):
    published = {name for name, f in SETTINGS[script].options().items() if f.metadata["published"]}
    assert published == set(PUBLISHED[script])


OTHER_VALUE = {
    "image_size": "32", "large_size": "128", "small_size": "32", "num_channels": "64", "num_heads_upsample": "2",
    "attention_resolutions": "8", "dropout": "0.25", "noise_schedule": "cosine", "timestep_respacing": "ddim25",
    "schedule_sampler": "loss-second-moment", "ema_rate": "0.9,0.99", "weight_decay": "0.5", "lr": "0.5",
    "fp16_scale_growth": "0.5", "data_dir": "elsewhere", "resume_checkpoint": "model000007.pt", "model_path": "m.pt",
    "base_samples": "b.npz",
}  # fmt: skip


@pytest.mark.parametrize("script, flag", FLAGS)
def test_published_flag_is_read(script, flag):
    default = PUBLISHED[script][flag]
    text = OTHER_VALUE.get(flag) or str(not default if isinstance(default, bool) else 30)
    expected = (not default) if isinstance(default, bool) else type(default)(text)
    for argv in ([f"--{flag}", text], [f"--{flag}={text}"]):
        parsed = parse(script, *argv)
        assert parsed.settings.values()[flag] == expected != default
        assert parsed.given == {flag}


@pytest.mark.parametrize("text", ["True", "true", "yes", "t", "y", "1", "False", "false", "no", "f", "n", "0"])
def test_booleans_are_spelt_as_published(text):
    expected = text.lower()[0] in "ty1"
    for flag in ("learn_sigma", "rescale_timesteps"):
        assert options_of("image_train", f"--{flag}", text).__dict__[flag] is expected


def test_a_bare_flag_is_true():
    options = options_of("image_train", "--learn_sigma", "--use_fp16", "--lr", "0.1", "--class_cond")
    assert options.learn_sigma is options.use_fp16 is options.class_cond is True and options.lr == 0.1


@pytest.mark.parametrize("script", ["image_train", "image_sample"])
@pytest.mark.parametrize("argv, mode", [([], "off"), (["--compile"], "blocks"), (["--compile", "model"], "model")])
def test_compile_is_a_switch_or_takes_a_mode(script, argv, mode):
    assert options_of(script, *argv, "--tf32").compile == mode
    assert options_of(script, *argv, "--tf32").tf32 == "all"
    assert options_of(script, *argv).tf32 == "convolutions"


@pytest.mark.parametrize("script", PUBLISHED)
def test_help_has_a_sentence_and_the_default_of_every_flag(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help-all")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, f in SETTINGS[script].options().items():
        default = "empty" if f.default == "" else f.default
        assert f"--{name} " in text
        assert f"{f.metadata['help']} (default: {default})" in text, name
        assert len(f.metadata["help"]) > 8


def test_a_flag_is_written_once():
    for settings in SETTINGS.values():
        names = [f.name for group in settings.groups().values() for f in dataclasses.fields(group)]
        assert len(names) == len(set(names))


def test_options_that_training_fixes():
    assert config.fixed_names() == {
        "image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "attention_resolutions",
        "class_cond", "use_scale_shift_norm", "channels", "num_classes", "channel_mult", "learn_sigma",
        "diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps", "large_size", "small_size",
        "classifier_width", "classifier_depth", "classifier_attention_resolutions", "predict_v", "schedule_shift",
        "zero_terminal_snr", "num_head_channels", "resblock_updown", "use_new_attention_order", "classifier_pool",
        "classifier_resblock_updown", "classifier_use_scale_shift_norm", "norm_eps", "downsample_padding",
        "time_freq_shift",
    }  # fmt: skip


# What is refused


@pytest.mark.parametrize(
    "argv, culprits",
    [
        (["--learn_sigm", "True"], ["--learn_sigm", "--learn_sigma"]),
        (["--prest", "cifar10-hybrid"], ["--prest", "--preset"]),
        (["--batchsize=4"], ["--batchsize", "--batch_size"]),
        (["--preset", "cifar10-hybird"], ["cifar10-hybird", "cifar10-hybrid"]),
        (["--noise_schedule", "cosin"], ["noise_schedule", "cosin", "did you mean cosine"]),
        (["--schedule_sampler", "uniforn"], ["schedule_sampler", "did you mean uniform"]),
        (["--precision", "fp8"], ["precision", "fp8", "fp16"]),
        (["4"], ["'4'", "--batch_size"]),
        (["--lr"], ["--lr", "--help"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--learn_sigma", "maybe"], ["--learn_sigma", "maybe", "True or False"]),
        (["--image_size", "0"], ["--image_size", "0"]),
        (["--image_size", "1x2x3"], ["--image_size", "48x64"]),
        (["--num_channels", "100"], ["--num_channels 100", "32"]),
        (["--num_res_blocks", "0"], ["--num_res_blocks 0"]),
        (["--num_heads", "0"], ["--num_heads 0"]),
        (["--num_heads_upsample", "0"], ["--num_heads_upsample 0", "-1"]),
        (["--dropout", "1"], ["--dropout 1"]),
        (["--channels", "5"], ["--channels 5", "1 to 4"]),
        (["--attention_resolutions", "16;8"], ["--attention_resolutions", "16;8", "16,8"]),
        (["--attention_resolutions", "0"], ["--attention_resolutions", "positive"]),
        (["--channel_mult", "1,x"], ["--channel_mult", "1,x"]),
        (["--diffusion_steps", "0"], ["--diffusion_steps 0"]),
        (["--diffusion_steps", "10"], ["--diffusion_steps 10", "linear", "cosine"]),
        (["--batch_size", "0"], ["--batch_size 0"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--weight_decay", "-1"], ["--weight_decay -1"]),
        (["--ema_rate", "0.9;0.99"], ["--ema_rate", "0.9;0.99"]),
        (["--ema_rate", "1.0"], ["--ema_rate 1.0", "[0, 1)"]),
        (["--use_fp16", "True", "--precision", "bf16"], ["--use_fp16", "--precision bf16"]),
        (["--lr_schedule", "cosine"], ["--lr_schedule cosine", "--max_steps"]),
        (["--resume", "auto", "--resume_checkpoint", "model1.pt"], ["--resume auto", "--resume_checkpoint model1.pt"]),
        (["--init_checkpoint", "a.pt", "--resume_checkpoint", "b.pt"], ["--init_checkpoint", "--resume_checkpoint"]),
        (["--num_workers", "-1"], ["--num_workers -1"]),
    ],
)
def test_a_wrong_flag_is_named_with_the_remedy(argv, culprits):
    with pytest.raises(UserError) as error:
        parse("image_train", *argv)
    assert "\n" not in str(error.value)
    for culprit in culprits:
        assert culprit in str(error.value)


def test_an_abbreviated_flag_is_unknown():
    with pytest.raises(UserError, match="--learn_sigma"):
        parse("image_train", "--learn_sig", "True")


def test_sizes_of_super_resolution_must_divide():
    with pytest.raises(UserError, match=r"--large_size 100.*--small_size 64"):
        parse("super_res_train", "--large_size", 100)
    assert options_of("super_res_train", "--large_size", "96x128", "--small_size", "24x32").large_size == "96x128"
    with pytest.raises(UserError, match="large_size"):
        parse("super_res_train", "--large_size", "96x128", "--small_size", "24x16")


@pytest.mark.parametrize("group", ALL_GROUPS, ids=lambda group: group.__name__)
def test_groups_are_frozen_and_keyword_only(group):
    options = group()
    name = dataclasses.fields(group)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, name, 3)
    with pytest.raises(TypeError):
        group(3)
    assert group.__doc__
    json.dumps(dataclasses.asdict(options))


def test_from_dict_refuses_an_unknown_name():
    assert config.from_dict(config.RunConfig, {"seed": 3}) == config.RunConfig(seed=3)
    with pytest.raises(UserError, match="did you mean seed"):
        config.from_dict(config.RunConfig, {"sead": 3})


def test_sizes():
    assert config.parse_size("64") == config.parse_size(64) == config.parse_size("64x64") == 64
    assert config.parse_size("48x64") == config.parse_size((48, 64)) == "48x64"
    assert config.height_width("48X64") == (48, 64) and config.height_width(32) == (32, 32)
    for wrong in ("", "a", "0", "-3", "3x", "1x2x3"):
        with pytest.raises(ValueError):
            config.parse_size(wrong)


def test_comma_lists():
    assert config.comma_list("16,8", int) == [16, 8] and config.comma_list("", int) == []
    assert config.comma_list("0.9, 0.99,", float) == [0.9, 0.99]


def test_unknown_names_suggest_the_nearest_or_list_all():
    assert "did you mean linear?" in str(config.unknown_name("schedule", "lineal", ["linear", "cosine"]))
    assert "choose from: cosine, linear" in str(config.unknown_name("schedule", "xyz", ["linear", "cosine"]))


@pytest.mark.parametrize("name, known, expected", [
    ("lineal", ["linear", "cosine"], "linear"), ("tow", ["one", "two"], "two"), ("Cat", ["cat", "dog"], "cat"),
    ("--seeed", ["--seed", "--steps"], "--seed"), ("batch", ["batch_size", "bits"], "batch_size"),
    ("sample_steps", ["rescale_timesteps", "sample_interval"], None),
    ("--sample_steps", ["--rescale_timesteps", "--sample_interval"], None), ("learning_rate", ["ema_rate"], None),
    ("x", [], None), ("student", ["steps", "student_prediction"], "student_prediction"),
    ("sample", ["sample_steps", "sample_interval"], None),
])  # fmt: skip
def test_only_near_names_are_suggested(name, known, expected):
    assert config.nearest(name, known) == expected


# Presets and files

COSINE_4000 = dict(learn_sigma=True, diffusion_steps=4000, noise_schedule="cosine")
BY_VLB = dict(use_kl=True, schedule_sampler="loss-second-moment")
PLAIN = dict(rescale_learned_sigmas=False, rescale_timesteps=False)
HYBRID_CIFAR10 = dict(
    image_size=32, num_res_blocks=3, dropout=0.3, **COSINE_4000, lr=1e-4, total_batch_size=128, max_steps=500_000
)
HYBRID_IMAGENET = dict(
    image_size=64, num_res_blocks=3, **COSINE_4000, lr=1e-4, total_batch_size=128, max_steps=1_500_000
)
RECIPES = {
    "cifar10-hybrid": HYBRID_CIFAR10,
    "cifar10-vlb": {**HYBRID_CIFAR10, **BY_VLB},
    "imagenet64-hybrid": HYBRID_IMAGENET,
    "imagenet64-vlb": {**HYBRID_IMAGENET, **BY_VLB},
    "imagenet64-cond": dict(
        image_size=64, num_channels=192, num_res_blocks=3, class_cond=True, **COSINE_4000, **PLAIN, lr=3e-4,
        total_batch_size=2048, max_steps=250_000,
    ),
    "upsample64-256": dict(
        large_size=256, small_size=64, num_channels=192, learn_sigma=True, class_cond=True, diffusion_steps=4000,
        noise_schedule="linear", **PLAIN, lr=3e-4, total_batch_size=256, max_steps=500_000,
    ),
    "lsun-bedroom": dict(
        image_size=256, num_heads=1, learn_sigma=True, use_scale_shift_norm=False, attention_resolutions="16",
        diffusion_steps=1000, noise_schedule="linear", **PLAIN, lr=1e-4, total_batch_size=128, max_steps=1_200_000,
    ),
    "ddpm-cifar10": dict(
        image_size=32, num_res_blocks=2, attention_resolutions="16", num_heads=1, dropout=0.1,
        use_scale_shift_norm=False, diffusion_steps=1000, noise_schedule="linear", learn_sigma=False,
        sigma_small=False, use_kl=False, lr=2e-4, lr_warmup_steps=5000, adam_beta1=0.9, adam_beta2=0.999,
        adam_eps=1e-8, weight_decay=0.0, grad_clip=1.0, random_flip=True, total_batch_size=128, ema_rate="0.9999",
        max_steps=800_000,
    ),
}  # fmt: skip
SCORES = {
    "cifar10-hybrid": "NLL 3.17, FID 3.19", "cifar10-vlb": "NLL 2.94, FID 11.47",
    "imagenet64-hybrid": "NLL 3.57, FID 19.2", "imagenet64-vlb": "NLL 3.53, FID 40.1",
    "imagenet64-cond": "FID 2.92 at 250 steps", "ddpm-cifar10": "FID 3.17",
}  # fmt: skip


def test_the_published_recipes_are_all_there():
    assert {name for name in PRESETS if not name.startswith("adm-")} == set(RECIPES)
    for name, score in SCORES.items():
        assert PRESETS[name].reported == score


@pytest.mark.parametrize("name", RECIPES)
def test_preset_sets_the_recipe_and_nothing_else(name):
    recipe = RECIPES[name]
    script = "super_res_train" if "large_size" in recipe else "image_train"
    defaults, parsed = parse(script).settings.values(), parse(script, "--preset", name)
    options = parsed.settings.values()
    for option in options:
        if option == "lr_schedule":
            assert options[option] in ("auto", "constant")  # which is the same without lr_anneal_steps
        else:
            assert options[option] == recipe.get(option, defaults[option]), option
    assert parsed.preset == name


@pytest.mark.parametrize("name", RECIPES)
def test_preset_serves_the_sampling_scripts_too(name):
    script = "super_res_sample" if "large_size" in RECIPES[name] else "image_sample"
    options = options_of(script, "--preset", name)
    assert options.diffusion_steps == RECIPES[name]["diffusion_steps"] and options.batch_size == 16


@pytest.mark.parametrize("script, name", [("super_res_train", "cifar10-hybrid"), ("image_train", "upsample64-256")])
def test_preset_of_the_other_kind_is_an_error(script, name):
    with pytest.raises(UserError, match=name):
        parse(script, "--preset", name)


def test_super_resolution_has_its_two_sizes_instead_of_one():
    for script in ("super_res_train", "super_res_sample"):
        assert "image_size" not in SETTINGS[script].options()
        with pytest.raises(UserError, match="unknown flag '--image_size'"):
            parse(script, "--image_size", "32")


def test_preset_options_are_a_copy():
    preset_options("cifar10-hybrid")["lr"] = 5
    assert preset_options("cifar10-hybrid")["lr"] == 1e-4


@pytest.fixture(params=["yaml", "yml", "json"])
def config_file(request, tmp_path):
    def write(values):
        path = tmp_path / f"options.{request.param}"
        lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
        path.write_text(json.dumps(values) if request.param == "json" else "\n".join(lines))
        return path

    return write


def test_flags_win_over_the_file_which_wins_over_the_preset(config_file):
    path = config_file({"dropout": 0.1, "lr": 0.002, "noise_schedule": "linear", "class_cond": True})
    parsed = parse("image_train", "--preset", "cifar10-hybrid", "--config", path, "--lr", "0.003")
    options = SimpleNamespace(**parsed.settings.values())
    assert (options.lr, options.dropout, options.noise_schedule) == (0.003, 0.1, "linear")
    assert (options.class_cond, options.num_res_blocks, options.num_channels) == (True, 3, 128)
    assert {"lr", "dropout", "noise_schedule", "class_cond", "num_res_blocks"} <= parsed.given
    assert "num_channels" not in parsed.given


def test_values_of_a_file_are_checked_like_flags(config_file):
    options = options_of("image_train", "--config", config_file({"lr": "3e-4", "ema_rate": 0.99, "image_size": "32"}))
    assert (options.lr, options.ema_rate, options.image_size) == (3e-4, "0.99", 32)
    with pytest.raises(UserError, match="--dropout 2"):
        parse("image_train", "--config", config_file({"dropout": 2}))


def test_unknown_name_in_a_file_is_named_with_the_file(config_file):
    path = config_file({"learning_rat": 1})
    with pytest.raises(UserError, match=r"options\.[a-z]+.*learning_rat"):
        parse("image_train", "--config", path)


def test_a_runs_own_config_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"version": "0", "config": {"lr": 0.5, "batch_size": 3}, "class_names": None}))
    assert options_of("image_train", "--config", path).lr == 0.5
    assert options_of("image_sample", "--config", path).batch_size == 3


@pytest.mark.parametrize("text, name", [("lr: [", "x.yaml"), ("{", "x.json"), ("- 1", "x.yml"), ("[1]", "x.json")])
def test_a_damaged_file_is_named(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        parse("image_train", "--config", tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        parse("image_train", "--config", tmp_path / "nowhere.json")


def test_a_ranks_own_batch_size_replaces_the_presets_total():
    assert options_of("image_train", "--preset", "cifar10-hybrid").total_batch_size == 128
    options = options_of("image_train", "--preset", "cifar10-hybrid", "--batch_size", "4")
    assert (options.batch_size, options.total_batch_size) == (4, 0)
    options = options_of("image_train", "--preset", "cifar10-hybrid", "--total_batch_size", "64")
    assert options.total_batch_size == 64


def test_a_files_batch_size_replaces_the_presets_total_too(config_file):
    options = options_of("image_train", "--preset", "cifar10-hybrid", "--config", config_file({"batch_size": 16}))
    assert (options.batch_size, options.total_batch_size) == (16, 0)
    both = config_file({"batch_size": 16, "total_batch_size": 32})
    options = options_of("image_train", "--preset", "cifar10-hybrid", "--config", both)
    assert options.total_batch_size == 32  # as in a run's own config.json, which has both
    assert options_of("image_train", "--config", both, "--batch_size", "4").total_batch_size == 0


def test_an_unknown_tracker_is_named():
    assert WatchConfig(trackers="tensorboard, wandb").trackers == "tensorboard, wandb"
    with pytest.raises(UserError, match="unknown --trackers 'tensorbord': did you mean tensorboard"):
        WatchConfig(trackers="tensorbord")
