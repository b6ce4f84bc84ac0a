"""Pipelines for diffusers: the library itself loads them and computes the same numbers."""

import json
import re
import sys

import diffusers
import pytest
import torch as th
from model_helpers import CLASSES, STUDENT, save_checkpoint, tiny_settings
from script_helpers import ROOT, call, contents, refused

import improved_diffusion as idf
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.gaussian_diffusion import noise_from
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.sampling.timestep_grids import timestep_grid
from improved_diffusion.utils import files

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

MODELS = {
    "learned variance": {},
    "classes": dict(class_cond=True),
    "added embedding": dict(use_scale_shift_norm=False, learn_sigma=False),
    "heads": dict(num_heads=2, num_res_blocks=2),
    "levels": dict(num_heads=1, channel_mult="1,2,1.5", num_channels=64, attention_resolutions="8,4"),
    "attention in the middle only": dict(attention_resolutions=""),
    "4000 cosine steps": dict(diffusion_steps=4000),
    "timesteps not rescaled": dict(rescale_timesteps=False),
    "heads of 16 channels": dict(
        num_head_channels=16, channel_mult="1,2", attention_resolutions="8,4", use_new_attention_order=True
    ),
    "new attention order": dict(num_heads=4, use_new_attention_order=True),
    "residual blocks between levels": dict(resblock_updown=True, channel_mult="1,2,1", attention_resolutions="4"),
    "residual blocks, added embedding": dict(resblock_updown=True, use_scale_shift_norm=False),
    "details of DDPM's code": dict(norm_eps=1e-3, downsample_padding=0, time_freq_shift=1),
    "details of DDPM's code, 4000 steps": dict(time_freq_shift=1, diffusion_steps=4000),
    "grey, not square": dict(channels=1, image_size="8x16"),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function from options to a model with random weights."""

    def load(**options):
        settings = tiny_settings(**options)
        names = CLASSES if settings.model.class_cond else None
        path = save_checkpoint(
            tmp_path_factory.mktemp("model") / "model000003.pt", settings, class_names=names, steps=0
        )
        return idf.load(path)

    return load


def exported(model, folder, **options):
    """The pipeline that diffusers loads from what is exported of a model."""
    model.to_diffusers(folder, **options)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


def noise(model, n=2, seed=0):
    config = model.settings.model
    height, width = (8, 16) if config.image_size == "8x16" else (8, 8)
    return th.randn(n, config.channels, height, width, generator=th.Generator().manual_seed(seed))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_student_of_progressive_distillation_draws_the_same_in_its_steps(learn_sigma, tmp_path):
    facts = {**STUDENT, "method": "progressive", "sampler": "ddim", "timestep_grid": "trailing", "steps": 4}
    settings = tiny_settings(predict_v=True, learn_sigma=learn_sigma)
    model = idf.load(save_checkpoint(tmp_path / "student.pt", settings, distilled=facts))
    pipeline = exported(model, tmp_path / "out", drop_variance=learn_sigma)
    unet, scheduler, x = pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config), noise(model)
    few = model.diffusion.respaced(timestep_grid("trailing", 4, model.diffusion.base_alphas_cumprod))
    expected = few.ddim_sample_loop(model.network.eval(), x.shape, noise=x, device="cpu")
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        with th.no_grad():
            x = scheduler.step(unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    th.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("facts, said", [
    (dict(sampler="ddim", timestep_grid="trailing"), "num_inference_steps=3"),
    (dict(sampler="renoise"), "renoise in 3 steps, which diffusers does not have"),
])  # fmt: skip
def test_how_a_student_samples_is_said(facts, said, tmp_path, capfd):
    model = idf.load(save_checkpoint(tmp_path / "student.pt", tiny_settings(), distilled={**STUDENT, **facts}))
    model.to_diffusers(tmp_path / "out")
    assert said in "".join(capfd.readouterr())


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_networks_agree_at_every_part_of_the_schedule(load, options, tmp_path):
    model = load(**options)
    unet = exported(model, tmp_path).unet
    x, steps = noise(model, 4), model.settings.diffusion.diffusion_steps
    t = th.tensor([0, 1, steps // 2 + 1, steps - 1])
    labels = th.tensor([0, 1, 0, 1]) if options.get("class_cond") else None
    with th.no_grad():
        ours = model.diffusion._wrap_model(model.network)(x, t, **({} if labels is None else {"y": labels}))
        theirs = unet(x, t, class_labels=labels).sample
    assert ours.std() > 0.05
    th.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {}, dict(predict_v=True), dict(predict_xstart=True), dict(diffusion_steps=4000), dict(schedule_shift=2.0),
        dict(noise_schedule="linear", diffusion_steps=1000), dict(noise_schedule="sigmoid"),
    ],
    ids=str,
)  # fmt: skip
def test_a_ddim_trajectory_is_the_same(load, options, tmp_path):
    model = load(**options)
    pipeline = exported(model, tmp_path, drop_variance=True)
    assert isinstance(pipeline, diffusers.DDIMPipeline)
    diffusion = build_diffusion(model.settings.replace(timestep_respacing="ddim5").diffusion)
    ours = diffusion.ddim_sample_loop(model.network, (2, 3, 8, 8), noise=noise(model))
    theirs = pipeline(
        batch_size=2, generator=th.Generator().manual_seed(0), num_inference_steps=5, use_clipped_model_output=True,
        output_type="pt",
    ).images  # fmt: skip
    th.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_schedule_that_ends_in_noise_starts_there(load, tmp_path):
    model = load(predict_v=True, zero_terminal_snr=True)
    scheduler = exported(model, tmp_path, drop_variance=True).scheduler
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [19, 15, 11, 7, 3]
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(learn_sigma=False),
        dict(learn_sigma=False, sigma_small=True),
        dict(predict_v=True, zero_terminal_snr=True),
    ],
    ids=str,
)
def test_an_ancestral_step_is_the_same_given_the_noise(load, options, tmp_path):
    model = load(**options)
    pipeline = exported(model, tmp_path)
    assert isinstance(pipeline, diffusers.DDPMPipeline)
    x = noise(model)
    for step in (19, 10, 1, 0):
        t = th.full((2,), step)
        with th.no_grad(), noise_from(lambda _: noise(model, seed=1)):
            ours = model.diffusion.p_sample(model.network, x, t)["sample"]
            output = pipeline.unet(x, t).sample
        theirs = pipeline.scheduler.step(output, step, x, generator=th.Generator().manual_seed(1)).prev_sample
        th.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def test_the_pipeline_draws_images(load, tmp_path):
    pipeline = exported(load(), tmp_path)
    images = pipeline(batch_size=2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and images.std() > 0.01


def test_ddim_takes_the_model_without_its_variance_only(load, tmp_path):
    model = load()
    whole = exported(model, tmp_path / "whole").unet
    mean = exported(model, tmp_path / "mean", drop_variance=True).unet
    x = noise(model)
    assert th.equal(mean(x, 3).sample, whole(x, 3).sample[:, :3])
    with pytest.raises(UserError, match="drop_variance"):
        load(learn_sigma=False).to_diffusers(tmp_path / "x", drop_variance=True)
    with pytest.raises(UserError, match="drop_variance"):
        model.export(tmp_path / "x.pt", drop_variance=True)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (dict(num_heads=2, channel_mult="1,2", attention_resolutions="8,4"), "--num_heads 2"),
        (dict(num_heads=1, num_heads_upsample=2), "--num_heads_upsample 2"),
        (dict(channel_mult="2,1"), "--channel_mult 2,1"),
    ],
    ids=str,
)
def test_a_network_that_diffusers_cannot_express_is_refused(load, options, culprit, tmp_path):
    with pytest.raises(UserError, match=re.escape(culprit)):
        load(**options).to_diffusers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_super_resolution_model_is_refused(tmp_path):
    settings = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    model = idf.load(save_checkpoint(tmp_path / "model000003.pt", settings))
    with pytest.raises(UserError, match="super-resolution"):
        model.to_diffusers(tmp_path / "out")


@pytest.mark.parametrize("there", ["a file", "a folder with a file", "another network"])
def test_other_files_are_left_alone(load, there, tmp_path):
    out = tmp_path / "out"
    places = {"a file": out, "a folder with a file": out / "notes.txt", "another network": out / "unet/model.bin"}
    other = places[there]
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("mine")
    if there == "another network":
        (out / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(str(out))):
        load().to_diffusers(out)
    assert other.read_text() == "mine"


def test_an_export_replaces_an_export_and_says_so(load, tmp_path, capfd):
    exported(load(), tmp_path / "out")
    assert "replaces the pipeline" not in "".join(capfd.readouterr())
    assert exported(load(class_cond=True), tmp_path / "out").unet.config.num_class_embeds == 2
    assert f"{tmp_path / 'out'}: replaces the pipeline" in "".join(capfd.readouterr())


@pytest.mark.parametrize("written", [0, 3])
def test_an_export_that_breaks_off_changes_nothing_and_can_be_repeated(load, written, tmp_path, monkeypatch):
    load().to_diffusers(tmp_path / "old")
    before, real, left = contents(tmp_path / "old"), files._write_file, written

    def breaks_off(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*args)

    for name in ("old", "new"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "_write_file", breaks_off)
            load(class_cond=True).to_diffusers(tmp_path / name)
        left = written
    assert contents(tmp_path / "old") == before and contents(tmp_path / "new") == {}
    load(class_cond=True).to_diffusers(tmp_path / "new")
    assert idf.load(tmp_path / "new").class_names == CLASSES


@pytest.mark.parametrize("replaces", [False, True])
def test_an_export_that_was_killed_can_be_repeated(load, replaces, tmp_path):
    if replaces:
        load().to_diffusers(tmp_path)
    for name in ("unet/.diffusion_pytorch_model.safetensors.123.tmp", "scheduler/.scheduler_config.json.123.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    load(class_cond=True).to_diffusers(tmp_path)
    assert idf.load(tmp_path).class_names == CLASSES and not list(tmp_path.rglob(".*"))


def test_the_pipeline_that_is_read_is_not_replaced(load, tmp_path):
    load().to_diffusers(tmp_path / "out")
    for read in ("out", "out/unet"):
        with pytest.raises(UserError, match="pipeline to read"):
            idf.load(tmp_path / read).to_diffusers(tmp_path / "out", drop_variance=True)


def test_the_command_writes_the_same_files_and_says_what_is_lost(load, tmp_path, capfd):
    model = load(class_cond=True, label_drop=0.1)
    model.to_diffusers(tmp_path / "mine")
    said = capfd.readouterr().out
    assert all(word in said for word in ("DDIMPipeline", "class_labels", "hidden class"))
    words = ["--model_path", model.path, "--to", "diffusers", "--out", tmp_path / "theirs"]
    call("export", *words, cwd=tmp_path).succeed()
    for path in sorted((tmp_path / "mine").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "theirs" / path.relative_to(tmp_path / "mine")).read_bytes()
    pt = [*words[:3], "pt", "--out", tmp_path / "x.pt", "--drop_variance", "True"]
    refused(call("export", *pt, cwd=tmp_path), "drop_variance")


def test_the_loop_in_the_docs_draws_the_classes(load, tmp_path, monkeypatch):
    model = load(class_cond=True)
    model.to_diffusers(tmp_path / "pipelines/classes")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/exchange.md").read_text(), flags=re.S)
    (loop,) = [block for block in blocks if "class_labels=labels" in block]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(loop.replace("250", "20"), names)

    generator = th.Generator().manual_seed(0)
    x = th.randn(2, 3, 8, 8, generator=generator)
    noise = lambda like: th.randn(like.shape, generator=generator)  # noqa: E731
    ours = model.diffusion.p_sample_loop(
        model.network, x.shape, noise=x, noise_fn=noise, model_kwargs={"y": th.tensor([0, 1])}
    )
    th.testing.assert_close(names["x"], ours, rtol=0, atol=1e-3)
    assert (tmp_path / "first.png").exists()


def test_without_the_package_the_extra_is_named(load, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"improved_diffusion\[diffusers\]"):
        load().to_diffusers(tmp_path / "out")
    assert not (tmp_path / "out").exists()
