"""Models of diffusers as models of ours: the same numbers, and the same files again."""

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call, cut, refused, write_images

import improved_diffusion as idf
from improved_diffusion.config import UserError

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function from options to a model with random weights."""

    @cache
    def load(**options):
        settings = tiny_settings(**options)
        names = CLASSES if settings.model.class_cond else None
        path = tmp_path_factory.mktemp("model") / "model000003.pt"
        return idf.load(save_checkpoint(path, settings, class_names=names))

    return load


@pytest.fixture(scope="module")
def exports(load, tmp_path_factory):
    @cache
    def export(**options):
        folder = tmp_path_factory.mktemp("exports") / "out"
        load(**options).to_diffusers(folder)
        return folder

    return export


@pytest.fixture
def exported(exports, tmp_path):
    """A function from options to a pipeline's folder, which the test may change."""
    return lambda **options: shutil.copytree(exports(**options), tmp_path / "out")


def edited(path, **values):
    """Change values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same_weights(one, other):
    weights, theirs = one.network.state_dict(), other.network.state_dict()
    assert list(weights) == list(theirs)
    assert all(th.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize(
    "options",
    [
        dict(class_cond=True), dict(diffusion_steps=4000), dict(num_heads=2, use_scale_shift_norm=False),
        dict(schedule_shift=2.5), dict(zero_terminal_snr=True, predict_v=True), dict(image_size="8x16"),
        dict(num_head_channels=16, channel_mult="1,2", attention_resolutions="8,4"),
        dict(resblock_updown=True, channel_mult="1,2,1"), dict(norm_eps=1e-3, downsample_padding=0, time_freq_shift=1),
        dict(time_freq_shift=1, diffusion_steps=4000), dict(noise_schedule="sigmoid"), dict(rescale_timesteps=False),
        dict(noise_schedule="linear", diffusion_steps=50), dict(learn_sigma=False, sigma_small=True),
        dict(attention_resolutions="8,4", channel_mult="1,3"),
    ],
    ids=str,
)  # fmt: skip
class TestRoundTrips:
    def test_everything_comes_back(self, load, tmp_path, options):
        model = load(**options)
        model.to_diffusers(tmp_path / "out")
        again = idf.load(tmp_path / "out")
        assert_same_weights(again, model)
        assert again.settings == model.settings
        assert again.class_names == model.class_names and again.step == model.step

    def test_files_that_diffusers_has_saved_anew_are_the_same_model(self, load, tmp_path, options):
        """It keeps no description: network and schedule are in its configs."""
        model = load(**options)
        model.to_diffusers(tmp_path / "out")
        diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
        again = idf.load(tmp_path / "theirs")
        assert_same_weights(again, model)
        names = {*options, "learn_sigma", "num_classes", "image_size", "noise_schedule", "num_res_blocks"}
        ours, theirs = model.settings.values(), again.settings.values()
        assert {name: theirs[name] for name in names} == {name: ours[name] for name in names}
        again.to_diffusers(tmp_path / "again")
        for part in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
            assert (tmp_path / "again" / part).read_bytes() == (tmp_path / "out" / part).read_bytes()


def test_the_order_of_the_attention_is_the_description_s(load, tmp_path):
    model = load(num_heads=4, use_new_attention_order=True)
    model.to_diffusers(tmp_path / "out")
    assert_same_weights(idf.load(tmp_path / "out"), model)
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    again = idf.load(tmp_path / "theirs")
    assert not again.settings.model.use_new_attention_order
    x = th.randn(2, 3, 8, 8)
    with th.no_grad():
        assert th.equal(again.network(x, th.tensor([3, 9])), model.network(x, th.tensor([3, 9])))


def test_a_model_without_its_variance_comes_back_without_it(load, tmp_path):
    model = load(class_cond=True)
    model.to_diffusers(tmp_path / "out", drop_variance=True)
    again = idf.load(tmp_path / "out")
    assert again.settings == model.settings.replace(learn_sigma=False) and again.class_names == CLASSES
    weights, whole = again.network.state_dict(), model.network.state_dict()
    assert th.equal(weights["out.2.weight"], whole["out.2.weight"][:3])


@pytest.mark.parametrize("place", ["", "unet", WEIGHTS])
def test_the_folder_the_network_and_the_weights_are_ways_to_name_a_model(load, tmp_path, place):
    model = load()
    model.to_diffusers(tmp_path / "out")
    assert idf.load(tmp_path / "out" / place).settings == model.settings


def test_a_network_alone_takes_the_noise_schedule_from_options(load, exported, tmp_path, capfd):
    model = load()
    diffusers.UNet2DModel.from_pretrained(exported(), subfolder="unet").save_pretrained(tmp_path / "net")
    again = idf.load(tmp_path / "net", noise_schedule="cosine", diffusion_steps=20)
    assert "scheduler_config.json" in capfd.readouterr().out
    assert_same_weights(again, model)
    assert again.settings.diffusion.noise_schedule == "cosine" and again.settings.diffusion.learn_sigma


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (dict(beta_schedule="squaredcos_cap_v2"), dict(noise_schedule="cosine")),
        (dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, beta_schedule="squaredcos_cap_v2"),
         dict(predict_v=True, zero_terminal_snr=True, noise_schedule="cosine")),
        (dict(prediction_type="sample"), dict(predict_xstart=True)),
        (dict(variance_type="fixed_small"), dict(sigma_small=True)),
        (dict(variance_type="fixed_small_log"), dict(sigma_small=True)),
        (dict(_class_name="DDIMScheduler"), dict(sigma_small=False)),
        (dict(_class_name="PNDMScheduler", skip_prk_steps=True), dict(sigma_small=False)),
        (dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
         dict(diffusion_steps=1000, noise_schedule="linear", rescale_timesteps=True)),
    ],
    ids=str,
)  # fmt: skip
def test_a_scheduler_becomes_options(exported, values, options):
    folder = exported(learn_sigma=False, rescale_timesteps=False)
    edited(folder / "scheduler/scheduler_config.json", **values)
    found = idf.load(folder).settings.values()
    assert {name: found[name] for name in options} == options


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        (dict(clip_sample=False), "--clip_denoised"), (dict(clip_sample_range=2), "[-2, 2]"),
        (dict(thresholding=True), "--dynamic_threshold"),
    ],
)  # fmt: skip
def test_how_a_scheduler_samples_otherwise_is_said(exported, capfd, values, flag):
    folder = exported()
    edited(folder / "scheduler/scheduler_config.json", **values)
    idf.load(folder)
    assert flag in capfd.readouterr().out


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("unet/config.json", "_class_name", "UNet2DConditionModel"),
        ("unet/config.json", "center_input_sample", True),
        ("unet/config.json", "act_fn", "mish"),
        ("unet/config.json", "norm_num_groups", 16),
        ("unet/config.json", "class_embed_type", "timestep"),
        ("unet/config.json", "mid_block_type", None),
        ("unet/config.json", "mid_block_scale_factor", 1.4),
        ("unet/config.json", "add_attention", False),
        ("unet/config.json", "attn_norm_num_groups", None),
        ("unet/config.json", "time_embedding_type", "fourier"),
        ("unet/config.json", "down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]),
        ("unet/config.json", "down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
        ("unet/config.json", "down_block_types", "DownBlock2D"),
        ("unet/config.json", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("unet/config.json", "downsample_type", "fir"),
        ("unet/config.json", "downsample_padding", 2),
        ("unet/config.json", "freq_shift", 0.5),
        ("unet/config.json", "norm_eps", 0),
        ("unet/config.json", "resnet_time_scale_shift", "ada_group"),
        ("unet/config.json", "attention_head_dim", 7),
        ("unet/config.json", "dual_cross_attention", True),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "sample_size", 10**30),
        ("unet/config.json", "in_channels", 3.0),
        ("unet/config.json", "out_channels", 5),
        ("unet/config.json", "block_out_channels", [32, 10**12]),
        ("unet/config.json", "block_out_channels", [[32], 32]),
        ("unet/config.json", "block_out_channels", {}),
        ("unet/config.json", "layers_per_block", 10**5),
        ("unet/config.json", "num_class_embeds", -1),
        ("unet/config.json", "dropout", "0.1"),
        ("unet/config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "_class_name", "ScoreSdeVeScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", "scaled_linear"),
        ("scheduler/scheduler_config.json", "beta_schedule", ["linear"]),
        ("scheduler/scheduler_config.json", "beta_end", 0.5),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1] * 49),
        ("scheduler/scheduler_config.json", "trained_betas", [0.0] * 50),
        ("scheduler/scheduler_config.json", "trained_betas", "betas"),
        ("scheduler/scheduler_config.json", "variance_type", "learned"),
        ("scheduler/scheduler_config.json", "variance_type", "fixed_large"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_our_network_and_schedules_are_not_is_named(exported, file, name, value):
    folder = exported(noise_schedule="linear", diffusion_steps=4000 if name == "num_train_timesteps" else 50)
    edited(folder / file, **{name: value})
    with pytest.raises(UserError, match=name) as error:
        idf.load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 800 and "\n" not in str(error.value)


LINEAR = np.linspace(0.1 / 50, 20 / 50, 50).tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    "betas",
    [[5e-324] * 50, [5e-324, *LINEAR[1:]], [1e-9, *LINEAR[1:]], [0, *LINEAR[1:]], [1] * 50, [1, *LINEAR[1:]],
     [*LINEAR[:9], 1, *LINEAR[10:]], [*LINEAR[:9], -0.1, *LINEAR[10:]], [*LINEAR[:9], math.nan, *LINEAR[10:]],
     [*LINEAR[:9], math.inf, *LINEAR[10:]], [*LINEAR[:9], 10**90, *LINEAR[10:]], [1 - 1e-16] * 50, [True] * 50],
    ids=lambda betas: f"{betas[0]}, {betas[9]}",
)  # fmt: skip
def test_betas_that_are_no_noise_schedule_are_one_error(exported, betas, rescaled):
    folder = exported(noise_schedule="linear", diffusion_steps=50)
    edited(folder / "scheduler/scheduler_config.json", trained_betas=betas, rescale_betas_zero_snr=rescaled)
    with pytest.raises(UserError, match=r"scheduler_config\.json.*(trained_betas|not a finite number)"):
        idf.load(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ends", [(1, 1), (1, 0.5), (1e-9, 1e-9), (1e-9, 1)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_ends_of_betas_that_are_no_noise_schedule_are_one_error(exported, ends, steps):
    folder = exported(noise_schedule="linear", diffusion_steps=50)
    values = dict(beta_start=ends[0], beta_end=ends[1], num_train_timesteps=steps, rescale_betas_zero_snr=True)
    edited(folder / "scheduler/scheduler_config.json", **values)
    with pytest.raises(UserError, match=r"scheduler_config\.json.*beta_start"):
        idf.load(folder)


def test_a_config_of_another_network_than_the_weights_is_an_error(exported):
    folder = exported()
    edited(folder / "unet/config.json", layers_per_block=2)
    with pytest.raises(UserError, match=r"lacks the tensor 'down_blocks\.0\.resnets\.1"):
        idf.load(folder)
    edited(folder / "unet/config.json", layers_per_block=1, num_class_embeds=3)
    with pytest.raises(UserError, match="class_embedding"):
        idf.load(folder)


def test_tensors_beyond_the_config_are_an_error(exported):
    folder = exported()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name in ("mid_block.attentions.0.to_add.weight", "down_blocks.9.x"):
        (folder / WEIGHTS).unlink()  # where the tensors lie
        safetensors.torch.save_file({**tensors, name: th.zeros(3)}, folder / WEIGHTS)
        with pytest.raises(UserError, match=re.escape(name)):
            idf.load(folder)


def test_edited_configs_count_instead_of_the_description(exported, capfd):
    folder = exported(diffusion_steps=50)
    edited(folder / "scheduler/scheduler_config.json", beta_schedule="linear", beta_start=0.002, beta_end=0.4)
    assert idf.load(folder).settings.diffusion.noise_schedule == "linear"
    assert "not those of its description" in capfd.readouterr().out


@pytest.mark.parametrize("missing", ["unet/config.json", WEIGHTS])
def test_a_missing_file_is_named(exported, missing):
    folder = exported()
    (folder / missing).unlink()
    with pytest.raises(UserError, match=re.escape(Path(missing).name)):
        idf.load(folder)


@pytest.mark.parametrize("place", ["", "unet"])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model-00001-of-00009.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
)
def test_shards_and_variants_are_named_with_how_to_join_them(exported, place, name):
    folder = exported()
    (folder / WEIGHTS).rename(folder / "unet" / name)
    with pytest.raises(UserError, match=f"{re.escape(name)}.*save_pretrained"):
        idf.load(folder / place)


def test_damaged_files_are_errors(exported):
    folder = exported()
    index = (folder / "model_index.json").read_text()
    for text in ("[]", "{", "null", '{"_class_name": ' + "[" * 10**5):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(UserError, match=r"model_index\.json"):
            idf.load(folder)
    (folder / "model_index.json").write_text(index)
    for text in ("[]", "", '"UNet2DModel"', '{"_class_name": "UNet2DModel", "_class_name": 1}'):
        (folder / "unet/config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            idf.load(folder)


def test_cut_weights_are_an_error(exported):
    folder = exported()
    cut(folder / WEIGHTS)
    with pytest.raises(UserError, match="safetensors"):
        idf.load(folder)


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_bin_file_is_read_without_running_code(load, exported, tmp_path, monkeypatch):
    model = load()
    folder = exported()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weights = folder / "unet/diffusion_pytorch_model.bin"
    th.save(tensors, weights)
    assert_same_weights(idf.load(folder), model)
    monkeypatch.chdir(tmp_path)
    th.save({**tensors, "x": Harm()}, weights)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin"):
        idf.load(folder)
    assert not (tmp_path / "harm").exists()


def test_commands_take_the_folder(exported, tmp_path):
    folder = exported()
    drawn = call("image_sample", "--model_path", folder, "--num_samples", 2, "--out_dir", "samples", cwd=tmp_path)
    assert drawn.succeed() and len(list((tmp_path / "samples").rglob("*.npz"))) == 1
    edited(folder / "unet/config.json", act_fn="relu")
    refused(call("image_sample", "--model_path", folder, cwd=tmp_path), "act_fn", "relu")


# Models of DDPM's code: google/ddpm-cifar10-32 and its kin

CIFAR10 = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip
INDEX = {
    "_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}  # fmt: skip


def ddpm_folder(folder, **changes):
    """(a folder as these models were published: all files in one, the network in it)."""
    th.manual_seed(0)
    config = {**CIFAR10, **changes}
    unet = diffusers.UNet2DModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    folder.mkdir()
    for name, content in (("config", config), ("scheduler_config", SCHEDULER), ("model_index", INDEX)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    safetensors.torch.save_file(unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder, unet


def test_the_published_ddpm_of_cifar_10_becomes_a_model_of_ours_and_the_same_files_again(tmp_path):
    folder, unet = ddpm_folder(tmp_path / "ddpm")
    model = idf.load(folder)
    config, diffusion = model.settings.model, model.settings.diffusion
    assert (config.image_size, config.num_channels, config.channel_mult) == (32, 128, "1,2,2,2")
    assert (config.attention_resolutions, config.num_heads, config.use_scale_shift_norm) == ("16", 1, False)
    assert (config.norm_eps, config.downsample_padding, config.time_freq_shift) == (1e-6, 0, 1)
    assert (diffusion.noise_schedule, diffusion.diffusion_steps) == ("linear", 1000)
    assert not diffusion.learn_sigma and not diffusion.sigma_small

    x, t = th.randn(2, 3, 32, 32, generator=th.Generator().manual_seed(0)), th.tensor([0, 777])
    with th.no_grad():
        th.testing.assert_close(model.network(x, t), unet(x, t).sample, rtol=0, atol=1e-5)
    assert model.sample(1, sampler="ddim", steps=2, progress=False).array.shape == (1, 32, 32, 3)

    model.to_diffusers(tmp_path / "out")
    again = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    assert again.keys() == unet.state_dict().keys()
    assert all(th.equal(again[name], tensor) for name, tensor in unet.state_dict().items())
    for name, published in (("unet/config.json", CIFAR10), ("scheduler/scheduler_config.json", SCHEDULER)):
        ours = json.loads((tmp_path / "out" / name).read_text())
        assert {key: ours[key] for key in published if key != "_diffusers_version"} == {
            key: value for key, value in published.items() if key != "_diffusers_version"
        }


SMALL = dict(block_out_channels=[32, 64, 64, 64], layers_per_block=1, sample_size=8)


def test_a_ddpm_is_finetuned_by_the_normal_command(tmp_path):
    folder, _ = ddpm_folder(tmp_path / "ddpm", **SMALL)
    write_images(tmp_path / "images", 4, size=(8, 8))
    options = dict(init_checkpoint=folder, max_steps=1, batch_size=2, num_workers=0, out_dir=tmp_path / "run")
    tuned = idf.train(tmp_path / "images", lr=1e-3, **options)
    before = idf.load(folder)
    assert tuned.settings.model == before.settings.model
    moved = [name for name, tensor in idf.load(tmp_path / "run", average="raw").network.state_dict().items()
             if not th.equal(tensor, before.network.state_dict()[name])]  # fmt: skip
    assert len(moved) > 50
    tuned.to_diffusers(tmp_path / "out")
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet.config.norm_eps == 1e-6


def test_former_names_of_attention_weights_in_a_bin_file(tmp_path):
    folder, unet = ddpm_folder(tmp_path / "ddpm", **SMALL)
    model = idf.load(folder)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(?<=\.attentions\.\d\.)(to_q|to_k|to_v|to_out\.0)")
    tensors = {pattern.sub(lambda m: former[m[0]], name): tensor for name, tensor in unet.state_dict().items()}
    assert sum("proj_attn" in name for name in tensors) == 8
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    th.save(tensors, folder / "diffusion_pytorch_model.bin")
    assert_same_weights(idf.load(folder), model)
    both = {**unet.state_dict(), **tensors}  # under the former names and today's
    th.save(both, folder / "diffusion_pytorch_model.bin")
    assert_same_weights(idf.load(folder), model)
    for name in (next(name for name in both if "query" in name), next(name for name in both if "to_q" in name)):
        th.save({**both, name: both[name] + 1}, folder / "diffusion_pytorch_model.bin")
        with pytest.raises(UserError, match=r"model\.bin.*to_q.*twice"):
            idf.load(folder)


@pytest.mark.parametrize("blocks", [("DownBlock2D", "UpBlock2D"), ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")])
def test_a_model_trained_in_diffusers_with_its_defaults(tmp_path, blocks):
    th.manual_seed(0)
    down, up = blocks
    kind = "resnet" if "Resnet" in down else "conv"
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64, 96), down_block_types=(down, "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", up), downsample_type=kind, upsample_type=kind,
        num_class_embeds=5, flip_sin_to_cos=False, dropout=0.1,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    model = idf.load(tmp_path / "theirs")
    config, diffusion = model.settings.model, model.settings.diffusion
    assert (config.num_head_channels, config.num_classes, config.dropout) == (8, 5, 0.1)
    assert config.resblock_updown == (kind == "resnet")
    assert diffusion.predict_v and diffusion.noise_schedule == "cosine" and diffusion.sigma_small
    x, t, y = th.randn(2, 3, 16, 16), th.tensor([1, 900]), th.tensor([0, 4])
    with th.no_grad():
        th.testing.assert_close(model.network(x, t, y=y), unet(x, t, class_labels=y).sample, rtol=0, atol=1e-5)
