"""Code written against the published package runs unchanged: its names, its arguments, its kind of script."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch as th
from script_helpers import run, write_images

STYLE = Path(__file__).resolve().parent / "published_style"

# The published factories know the sizes 32, 64 and 256 only.
MODEL = [
    "--num_channels", "32", "--num_res_blocks", "1", "--learn_sigma", "True", "--diffusion_steps", "20",
    "--noise_schedule", "cosine", "--class_cond", "True",
]  # fmt: skip
IMAGE = ["--image_size", "32", *MODEL]
SUPER_RES = ["--large_size", "64", "--small_size", "32", *MODEL]

LOSS = "clip_denoised=True, denoised_fn=None, model_kwargs=None"
LOOP = f"model, shape, noise=None, {LOSS}, device=None, progress=False"
NETWORK = (
    "num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions, num_heads, "
    "num_heads_upsample, use_scale_shift_norm, dropout"
)

# module -> name -> the published arguments; None: a class or a function whose arguments nobody passes by name
PUBLISHED = {
    "gaussian_diffusion": {
        "get_named_beta_schedule": "schedule_name, num_diffusion_timesteps",
        "betas_for_alpha_bar": "num_diffusion_timesteps, alpha_bar, max_beta=0.999",
        "GaussianDiffusion": "*, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False",
        "GaussianDiffusion.q_mean_variance": "self, x_start, t",
        "GaussianDiffusion.q_sample": "self, x_start, t, noise=None",
        "GaussianDiffusion.q_posterior_mean_variance": "self, x_start, x_t, t",
        "GaussianDiffusion.p_mean_variance": f"self, model, x, t, {LOSS}",
        "GaussianDiffusion.p_sample": f"self, model, x, t, {LOSS}",
        "GaussianDiffusion.p_sample_loop": f"self, {LOOP}",
        "GaussianDiffusion.p_sample_loop_progressive": f"self, {LOOP}",
        "GaussianDiffusion.ddim_sample": f"self, model, x, t, {LOSS}, eta=0.0",
        "GaussianDiffusion.ddim_reverse_sample": f"self, model, x, t, {LOSS}, eta=0.0",
        "GaussianDiffusion.ddim_sample_loop": f"self, {LOOP}, eta=0.0",
        "GaussianDiffusion.ddim_sample_loop_progressive": f"self, {LOOP}, eta=0.0",
        "GaussianDiffusion.training_losses": "self, model, x_start, t, model_kwargs=None, noise=None",
        "GaussianDiffusion.calc_bpd_loop": "self, model, x_start, clip_denoised=True, model_kwargs=None",
        "ModelMeanType.PREVIOUS_X": None, "ModelMeanType.START_X": None, "ModelMeanType.EPSILON": None,
        "ModelVarType.LEARNED": None, "ModelVarType.FIXED_SMALL": None, "ModelVarType.FIXED_LARGE": None,
        "ModelVarType.LEARNED_RANGE": None, "LossType.MSE": None, "LossType.RESCALED_MSE": None, "LossType.KL": None,
        "LossType.RESCALED_KL": None, "LossType.is_vb": "self",
    },
    "respace": {
        "space_timesteps": "num_timesteps, section_counts",
        "SpacedDiffusion": "use_timesteps, **kwargs",
    },
    "losses": {
        "normal_kl": "mean1, logvar1, mean2, logvar2",
        "approx_standard_normal_cdf": "x",
        "discretized_gaussian_log_likelihood": "x, *, means, log_scales",
    },
    "resample": {
        "create_named_schedule_sampler": "name, diffusion",
        "ScheduleSampler.weights": "self",
        "ScheduleSampler.sample": "self, batch_size, device",
        "UniformSampler": "diffusion",
        "LossAwareSampler.update_with_local_losses": "self, local_ts, local_losses",
        "LossAwareSampler.update_with_all_losses": "self, ts, losses",
        "LossSecondMomentResampler": "diffusion, history_per_term=10, uniform_prob=0.001",
    },
    "nn": {
        "SiLU": None, "GroupNorm32": None,
        "conv_nd": "dims, *args, **kwargs",
        "linear": "*args, **kwargs",
        "avg_pool_nd": "dims, *args, **kwargs",
        "update_ema": "target_params, source_params, rate=0.99",
        "zero_module": "module",
        "scale_module": "module, scale",
        "mean_flat": "tensor",
        "normalization": "channels",
        "timestep_embedding": "timesteps, dim, max_period=10000",
        "checkpoint": "func, inputs, params, flag",
    },
    "unet": {
        "TimestepBlock": None, "TimestepEmbedSequential": None, "QKVAttention": None,
        "Upsample": "channels, use_conv, dims=2",
        "Downsample": "channels, use_conv, dims=2",
        "ResBlock": "channels, emb_channels, dropout, out_channels=None, use_conv=False, use_scale_shift_norm=False, "
                    "dims=2, use_checkpoint=False",
        "AttentionBlock": "channels, num_heads=1, use_checkpoint=False",
        "UNetModel": "in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0, "
                     "channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None, use_checkpoint=False, "
                     "num_heads=1, num_heads_upsample=-1, use_scale_shift_norm=False",
        "UNetModel.forward": "self, x, timesteps, y=None",
        "UNetModel.get_feature_vectors": "self, x, timesteps, y=None",
        "UNetModel.convert_to_fp16": "self",
        "UNetModel.convert_to_fp32": "self",
        "SuperResModel": "in_channels, *args, **kwargs",
        "SuperResModel.forward": "self, x, timesteps, low_res=None, **kwargs",
    },
    "fp16_util": {
        "convert_module_to_f16": "l",
        "convert_module_to_f32": "l",
        "make_master_params": "model_params",
        "model_grads_to_master_grads": "model_params, master_params",
        "master_params_to_model_params": "model_params, master_params",
        "unflatten_master_params": "model_params, master_params",
        "zero_grad": "model_params",
    },
    "train_util": {
        "TrainLoop": "*, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval, save_interval, "
                     "resume_checkpoint, use_fp16=False, fp16_scale_growth=0.001, schedule_sampler=None, "
                     "weight_decay=0.0, lr_anneal_steps=0",
        "TrainLoop.run_loop": "self",
        "TrainLoop.run_step": "self, batch, cond",
        "TrainLoop.save": "self",
        "parse_resume_step_from_filename": "filename",
        "get_blob_logdir": "",
        "find_resume_checkpoint": "",
        "find_ema_checkpoint": "main_checkpoint, step, rate",
        "log_loss_dict": "diffusion, ts, losses",
    },
    "script_util": {
        "NUM_CLASSES": None,
        "model_and_diffusion_defaults": "",
        "sr_model_and_diffusion_defaults": "",
        "create_model_and_diffusion": "image_size, class_cond, learn_sigma, sigma_small, num_channels, num_res_blocks, "
                                      "num_heads, num_heads_upsample, attention_resolutions, dropout, diffusion_steps, "
                                      "noise_schedule, timestep_respacing, use_kl, predict_xstart, rescale_timesteps, "
                                      "rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm",
        "sr_create_model_and_diffusion": "large_size, small_size, class_cond, learn_sigma, num_channels, "
                                         "num_res_blocks, num_heads, num_heads_upsample, attention_resolutions, "
                                         "dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, "
                                         "predict_xstart, rescale_timesteps, rescale_learned_sigmas, use_checkpoint, "
                                         "use_scale_shift_norm",
        "create_model": f"image_size, {NETWORK}",
        "sr_create_model": f"large_size, small_size, {NETWORK}",
        "create_gaussian_diffusion": "*, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule='linear', "
                                     "use_kl=False, predict_xstart=False, rescale_timesteps=False, "
                                     "rescale_learned_sigmas=False, timestep_respacing=''",
        "add_dict_to_argparser": "parser, default_dict",
        "args_to_dict": "args, keys",
        "str2bool": "v",
    },
    "dist_util": {
        "setup_dist": "",
        "dev": "",
        "load_state_dict": "path, **kwargs",
        "sync_params": "params",
    },
    "image_datasets": {
        "load_data": "*, data_dir, batch_size, image_size, class_cond=False, deterministic=False",
        "ImageDataset": "resolution, image_paths, classes=None, shard=0, num_shards=1",
    },
    "logger": {
        "configure": "dir=None, format_strs=None, comm=None, log_suffix=''",
        "log": "*args, level=20", "debug": "*args", "info": "*args", "warn": "*args", "error": "*args",
        "logkv": "key, val", "logkv_mean": "key, val", "logkvs": "d", "dumpkvs": "", "getkvs": "",
        "set_level": "level", "set_comm": "comm", "get_dir": "", "get_current": "", "reset": "",
        "scoped_configure": "dir=None, format_strs=None, comm=None",
        "profile_kv": "scopename", "profile": "n",
    },
}  # fmt: skip
NAMES = [(module, name) for module, names in PUBLISHED.items() for name in names]


def find(module, dotted):
    found = importlib.import_module(f"improved_diffusion.{module}")
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_published_name_takes_the_published_arguments(module, name):
    found = find(module, name)
    published = PUBLISHED[module][name]
    if published is None:
        return
    namespace = {}
    exec(f"def published({published}): pass", namespace)
    expected = list(inspect.signature(namespace["published"]).parameters.values())
    own = list(inspect.signature(found).parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in expected if p.kind not in variadic]
    shown = [p for p in own if p.kind not in variadic]
    assert [(p.name, p.kind, p.default) for p in shown[: len(named)]] == [(p.name, p.kind, p.default) for p in named]
    assert {p.kind for p in expected if p.kind in variadic} <= {p.kind for p in own}
    for more in shown[len(named) :]:
        assert more.default is not inspect.Parameter.empty, f"{more.name} is new and needs a default"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos") / "photos", 8, size=(70, 66))


@pytest.fixture(scope="module", params=[("python", 1), pytest.param(("mpiexec", 2), marks=pytest.mark.slow)],
                ids=["python", "mpiexec"])  # fmt: skip
def launched(request, tmp_path_factory, photos):
    """style(script, folder, *args) runs a script of the published kind, logging into a folder; after both trainings."""
    launcher, ranks = request.param
    folder = tmp_path_factory.mktemp(launcher)

    def style(script, name, *args, **variables):
        env = {"OPENAI_LOGDIR": str(folder / name), **variables}
        result = run(launcher, ranks, STYLE / f"{script}.py", *args, cwd=folder, env=env).succeed()
        assert "Traceback" not in result.err
        return folder / name, result.out

    style.ranks = ranks
    training = ["--data_dir", photos, "--batch_size", 2, "--microbatch", 1, "--save_interval", 2, "--log_interval", 1]
    style.image = style(
        "image_train", "image", *IMAGE, *training, "--schedule_sampler", "loss-second-moment",
        DIFFUSION_TRAINING_TEST="1",
    )  # fmt: skip
    style.super_res = style("super_res_train", "super_res", *SUPER_RES, *training, "--lr_anneal_steps", 1)
    return style


def test_a_published_training_script_writes_the_published_files(launched):
    folder, out = launched.image
    # DIFFUSION_TRAINING_TEST ends it after the first save past the first step.
    for name in ("model000000.pt", "ema_0.9999_000002.pt", "model000002.pt", "opt000002.pt", "progress.csv", "log.txt"):
        assert (folder / name).exists(), name
    assert (folder / "log-rank001.txt").exists() == (launched.ranks == 2)
    rows = (folder / "progress.csv").read_text().splitlines()
    columns = dict(zip(rows[0].split(","), rows[3].split(",")))
    assert float(columns["step"]) == 2 and float(columns["samples"]) == 3 * 2 * launched.ranks
    assert {"loss", "mse", "vb", "grad_norm"} <= columns.keys()
    assert out.count("building...") == 1


def test_a_published_sampling_script_draws_from_it(launched):
    args = ["--model_path", launched.image[0] / "ema_0.9999_000002.pt", "--num_samples", 3, "--batch_size", 2]
    folder, out = launched("image_sample", "samples", *IMAGE, *args, "--timestep_respacing", "ddim5", "--use_ddim", "1")
    with np.load(folder / "samples_3x32x32x3.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].shape == (3,)
    assert out.count("sampling complete") == 1


def test_a_published_evaluation_script_measures_it(launched, photos):
    args = ["--model_path", launched.image[0] / "model000002.pt", "--data_dir", photos, "--batch_size", 2]
    folder, out = launched("image_nll", "nll", *IMAGE, *args, "--num_samples", 4, "--timestep_respacing", 4)
    assert "done 4 samples: bpd=" in out
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(folder / f"{name}_terms.npz") as arrays:
            assert arrays["arr_0"].shape == (4,) and np.isfinite(arrays["arr_0"]).all()


def test_published_super_resolution_scripts_train_and_sample(launched, tmp_path):
    trained, _ = launched.super_res
    rng = np.random.default_rng(0)
    base = tmp_path / "base.npz"
    np.savez(base, rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.arange(4))
    args = ["--model_path", trained / "ema_0.9999_000000.pt", "--base_samples", base, "--num_samples", 3]
    respaced = ["--timestep_respacing", 3, "--batch_size", 2]
    folder, _ = launched("super_res_sample", "large", *SUPER_RES, *args, *respaced)
    with np.load(folder / "samples_3x64x64x3.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8


def test_the_published_checkpoints_are_plain_state_dicts(launched):
    folder, _ = launched.image
    state_dict = th.load(folder / "model000002.pt", map_location="cpu", weights_only=True)
    assert all(isinstance(value, th.Tensor) and value.dtype == th.float32 for value in state_dict.values())
    assert state_dict["label_emb.weight"].shape == (1000, 128)
    optimizer = th.load(folder / "opt000002.pt", map_location="cpu", weights_only=True)
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(1e-4)
