"""The classifier that guides: its network, its loss, and its training script."""

import math
import re

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from helpers import make_diffusion, set_golden_weights
from PIL import Image
from script_helpers import TINY_IMAGE, call, write_images
from train_helpers import into

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.loading import load_classifier
from improved_diffusion.config import ClassifierConfig, ProcessConfig, UserError
from improved_diffusion.models.build import build_classifier
from improved_diffusion.models.factories import create_classifier
from improved_diffusion.training.classifier import ClassifierObjective
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.unet import AttentionBlock, AttentionPool2d, EncoderUNetModel, UNetModel

NETWORK = ["--classifier_width", 32, "--classifier_depth", 1, "--channel_mult", "1,1", "--num_workers", 0]
FLAGS = [
    *NETWORK, "--image_size", 8, "--total_batch_size", 16, "--diffusion_steps", 20, "--noise_schedule", "cosine",
    "--lr", 2e-3, "--log_interval", 10,
]  # fmt: skip


def small(image_size=(8, 8), num_classes=3, channel_mult=(1, 2), **kwargs):
    """A small classifier in which every weight counts."""
    model = EncoderUNetModel(
        image_size, 3, 32, num_classes, 1, (1, 2), channel_mult=channel_mult, num_head_channels=64, pool="attention",
        use_scale_shift_norm=True, **kwargs,
    )  # fmt: skip
    return set_golden_weights(model).eval()


def draws(n=4, size=(8, 8), seed=0):
    """(images, timesteps as a network sees them)."""
    generator = th.Generator().manual_seed(seed)
    return th.randn(n, 3, *size, generator=generator), th.rand(n, generator=generator) * 1000


# The network


@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_every_image_has_a_logit_of_each_class(size, num_classes):
    x, t = draws(5, size)
    logits = small(size, num_classes)(x, t)
    assert logits.shape == (5, num_classes) and logits.dtype == th.float32


def test_it_is_the_half_of_the_unet_that_goes_down():
    unet = UNetModel(3, 32, 3, 1, (1, 2), channel_mult=(1, 2), use_scale_shift_norm=True)
    shapes = {key: value.shape for key, value in unet.state_dict().items() if not key.startswith("out")}
    own = {key: value.shape for key, value in small().state_dict().items() if not key.startswith("out")}
    assert own == shapes
    model = set_golden_weights(unet).eval()
    x, t = draws()
    with th.no_grad():
        middle = model.get_feature_vectors(x, t)["middle"]
        assert th.equal(small().out(middle), small()(x, t))


def test_an_image_is_classified_by_itself():
    x, t = draws(6)
    with th.no_grad():
        th.testing.assert_close(small()(x, t)[2:4], small()(x[2:4], t[2:4]), rtol=1e-5, atol=1e-5)


def test_the_noise_level_matters():
    x, t = draws()
    assert (small()(x, t) - small()(x, t + 100)).abs().max() > 1e-3


def test_the_gradient_reaches_every_pixel_and_is_that_of_finite_differences():
    model, (x, t) = small(), draws(2)
    x.requires_grad_()

    def score(x):
        return F.log_softmax(model(x, t), dim=1)[:, 1].sum()

    (grad,) = th.autograd.grad(score(x), x)
    assert (grad != 0).all()
    with th.no_grad():
        step = 0.02 * grad / grad.norm()
        slope = (score(x + step) - score(x - step)) / 0.04
    assert float(slope) == pytest.approx(float(grad.norm()), rel=1e-3)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=re.escape("takes images of (8, 8), not (16, 16)")):
        small()(*draws(size=(16, 16)))


@pytest.mark.parametrize("precision, dtype, close", [("fp16", th.float16, 0.02), ("bf16", th.bfloat16, 0.15)])
def test_its_torso_computes_in_16_bits_and_comes_back(precision, dtype, close):
    model, (x, t) = small(), draws()
    with th.no_grad():
        exact = model(x, t)
        getattr(model, f"convert_to_{precision}")()
        assert model.inner_dtype == dtype and model.out[2].qkv_proj.weight.dtype == th.float32
        rounded = model(x, t)
        assert rounded.dtype == th.float32 and 0 < (rounded - exact).abs().max() < close
        model.convert_to_fp32()
        assert model.inner_dtype == th.float32


def test_pooling_is_what_the_mean_attends_to():
    pool = set_golden_weights(AttentionPool2d(2, 64, 64, 5))
    x = th.randn(2, 64, 2, 2, generator=th.Generator().manual_seed(0))
    flat = x.reshape(2, 64, 4)
    tokens = th.cat([flat.mean(2, keepdim=True), flat], dim=2) + pool.positional_embedding
    q, k, v = th.einsum("ocx,ncl->nol", pool.qkv_proj.weight, tokens).add(pool.qkv_proj.bias[:, None]).chunk(3, dim=1)
    weights = (th.einsum("nc,ncl->nl", q[:, :, 0], k) / math.sqrt(64)).softmax(dim=1)
    pooled = th.einsum("nl,ncl->nc", weights, v)
    expected = pooled @ pool.c_proj.weight[:, :, 0].T + pool.c_proj.bias
    th.testing.assert_close(pool(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [32 * k for k in range(1, 33)])
def test_heads_share_the_channels_evenly(channels):
    encoder = EncoderUNetModel(8, 3, channels, 2, 1, (1,), channel_mult=(1,), num_head_channels=64)
    heads = next(m.num_heads for m in encoder.modules() if isinstance(m, AttentionBlock))
    assert channels // heads == (64 if channels % 64 == 0 else 32)


def test_a_fresh_classifier_knows_nothing():
    th.manual_seed(0)
    model = create_classifier(
        8, num_classes=10, classifier_width=32, classifier_depth=1, classifier_attention_resolutions="4"
    )
    x, t = draws(32)
    loss = F.cross_entropy(model(x, t), th.arange(32) % 10)
    assert float(loss.detach()) == pytest.approx(math.log(10), abs=0.3)


# The loss


@pytest.mark.parametrize("rescale", [True, False])
def test_the_loss_is_the_cross_entropy_at_x_t(rescale):
    diffusion = make_diffusion(20, rescale=rescale)
    model, (x, _), y = small(), draws(4), th.tensor([0, 2, 1, 1])
    t, noise = th.tensor([0, 5, 12, 19]), th.randn(4, 3, 8, 8, generator=th.Generator().manual_seed(3))
    terms = ClassifierObjective(diffusion).training_losses(model, x, t, {"y": y}, noise)
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod).float()[t].view(-1, 1, 1, 1)
    logits = model(alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise, t * 50.0 if rescale else t)
    by_hand = logits.exp().sum(1).log() - logits[th.arange(4), y]
    th.testing.assert_close(terms["loss"], by_hand, rtol=1e-5, atol=1e-6)
    assert terms["accuracy"].tolist() == (logits.argmax(1) == y).float().tolist()
    assert terms.keys() == {"loss", "accuracy"}


def test_the_five_likeliest_count_where_there_are_ten_classes():
    logits = th.arange(12.0).flip(0).expand(12, 12)  # class 0 is the likeliest
    objective = ClassifierObjective(make_diffusion(20))
    terms = objective.training_losses(
        lambda x, t: logits, th.zeros(12, 3, 8, 8), th.zeros(12).long(), {"y": th.arange(12)}
    )
    assert terms["accuracy"].tolist() == [1] + 11 * [0]
    assert terms["accuracy_top5"].tolist() == 5 * [1] + 7 * [0]


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_classifier_that_cannot_tell_is_not_right(value):
    objective = ClassifierObjective(make_diffusion(20))
    x, y = th.zeros(3, 3, 8, 8), th.arange(3)
    terms = objective.training_losses(lambda x, t: th.full((3, 3), value), x, y, {"y": y})
    assert terms["accuracy"].tolist() == [0, 0, 0]


def test_no_labels_are_an_error():
    with pytest.raises(ValueError, match="must hold y"):
        ClassifierObjective(make_diffusion(20)).training_losses(small(), *draws(), {})


# Training


class Stripes:
    """Stripes across or along: classes that are easy to tell where there is little noise."""

    def __init__(self):
        self.step = 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        rng = np.random.RandomState(self.step)
        self.step += 1
        y = rng.randint(0, 2, 16)
        stripe = np.sign(np.sin(np.arange(8) * np.pi / 2 + 0.3))
        across = np.broadcast_to(stripe, (8, 8))
        batch = np.stack([across if label else across.T for label in y])[:, None].repeat(3, axis=1)
        return th.from_numpy(batch.astype(np.float32)), {"y": th.from_numpy(y)}


def trained(folder, steps, **kwargs):
    into(folder)
    th.manual_seed(0)
    arguments = dict(
        model=create_classifier(
            8, num_classes=2, classifier_width=32, classifier_depth=1, classifier_attention_resolutions="4",
            channel_mult="1,1",
        ),
        diffusion=ClassifierObjective(make_diffusion()), data=Stripes(), batch_size=16, microbatch=-1, lr=2e-3,
        ema_rate="0.9", log_interval=100, save_interval=10**6, resume_checkpoint="", max_steps=steps, seed=0,
    )  # fmt: skip
    loop = TrainLoop(**{**arguments, **kwargs})
    loop.run_loop()
    return loop


def losses(model, seed=0):
    """The mean loss in each half of the noise levels."""
    th.manual_seed(seed)
    data, objective = Stripes(), ClassifierObjective(make_diffusion())
    batch, kwargs = next(data)
    with th.no_grad():
        return [
            float(
                objective.training_losses(model.eval(), batch, th.randint(low, low + 5, (16,)), kwargs)["loss"].mean()
            )
            for low in (0, 5)
        ]


def test_it_learns_what_the_noise_leaves_to_be_learnt(tmp_path):
    little, much = losses(trained(tmp_path, 40).model)
    assert little < 0.1 < much < math.log(2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_microbatch_changes_memory_alone(tmp_path, precision):
    def parameters(microbatch):
        loop = trained(tmp_path / str(microbatch), 3, microbatch=microbatch, adam_eps=1e-4, precision=precision)
        return th.cat([p.detach().flatten() for p in loop.master_params])

    close = 1e-5 if precision == "fp32" else 2e-3
    th.testing.assert_close(parameters(5), parameters(16), rtol=0, atol=close)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"classifier_width": 48}, "--classifier_width 48 must be a multiple of 32"),
        ({"classifier_depth": 0}, "--classifier_depth 0 must be at least 1"),
        ({"classifier_attention_resolutions": "8,x"}, "--classifier_attention_resolutions '8,x'"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ClassifierConfig(**values)


# The script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def striped(place):
    """24 images, across and along in turn."""
    (place / "striped").mkdir()
    stripe = np.where(np.sin(np.arange(8) * np.pi / 2 + 0.3) > 0, 255, 0).astype(np.uint8)
    across = np.broadcast_to(stripe, (8, 8))
    for i in range(24):
        Image.fromarray(np.ascontiguousarray(across if i % 2 else across.T)).convert("RGB").save(
            place / "striped" / f"{('along', 'across')[i % 2]}_{i:02d}.png"
        )
    return place / "striped"


@pytest.fixture(scope="module")
def classifier(place, striped):
    """(folder of a run of 20 steps, in two parts; the output of each part)."""
    args = ["--data_dir", striped, *FLAGS, "--out_dir", place / "classifier", "--resume", "auto"]
    watched = ["--val_dir", striped, "--val_interval", 10, "--ema_rate", "0.9"]
    parts = [call("classifier_train", *args, *watched, "--max_steps", n, cwd=place).succeed() for n in (10, 20)]
    return place / "classifier", parts


@pytest.fixture(scope="module")
def diffusion_model(place, striped):
    """The checkpoint of a diffusion model."""
    args = ["--data_dir", striped, *TINY_IMAGE, "--batch_size", 2, "--max_steps", 2, "--out_dir", place / "model"]
    call("image_train", *args, cwd=place).succeed()
    return place / "model/ema_0.9999_000002.pt"


def test_the_script_trains_a_classifier_that_describes_itself(classifier, striped):
    loaded = load_classifier(str(classifier[0] / "ema_0.9_000020.pt"))
    model, options, names = loaded.classifier, loaded.config, loaded.class_names
    assert names == ["across", "along"] and model.out_channels == 2 and not model.training
    assert (options["image_size"], options["noise_schedule"], options["diffusion_steps"]) == (8, "cosine", 20)
    found = []
    for path in sorted(striped.iterdir()):
        x = th.from_numpy(np.asarray(Image.open(path)) / 127.5 - 1).float().permute(2, 0, 1)[None]
        found.append(names[int(model(x, th.zeros(1)).argmax())])
    assert found == 12 * ["across"] + 12 * ["along"]


def test_validation_watches_loss_and_accuracy(classifier):
    header, *rows = (classifier[0] / "progress.csv").read_text().splitlines()
    row = dict(zip(header.split(","), rows[-1].split(",")))
    assert float(row["val_accuracy_ema_0.9"]) > 0.6 and float(row["val_loss"]) < math.log(2)
    assert float(row["accuracy_q0"]) > float(row["accuracy_q3"])
    line = r"validation after 20 steps: loss 0\.\d+, accuracy \d+\.\d%; EMA 0.9 loss 0\.\d+, accuracy \d+\.\d%"
    assert re.search(line, classifier[1][1].out)
    assert load_classifier(str(classifier[0] / "best.pt")).classifier.out_channels == 2


def test_a_run_in_two_parts_is_the_run_in_one(classifier, place, striped):
    args = ["--data_dir", striped, *FLAGS, "--ema_rate", "0.9", "--max_steps", 20, "--out_dir", place / "whole"]
    call("classifier_train", *args, cwd=place).succeed()
    one, two = (th.load(folder / "model000020.pt", weights_only=True) for folder in (place / "whole", classifier[0]))
    assert one.keys() == two.keys() and all(th.equal(one[key], two[key]) for key in one)


def test_the_noise_can_be_that_of_the_model_to_be_guided(diffusion_model, striped, tmp_path):
    args = ["--data_dir", striped, "--model_path", diffusion_model, *NETWORK, "--batch_size", 2, "--max_steps", 2]
    result = call("classifier_train", *args, "--out_dir", "run", cwd=tmp_path).succeed()
    assert f"to guide {diffusion_model}: channels=3, diffusion_steps=20, image_size=8" in result.out
    options = load_classifier(str(tmp_path / "run/model000002.pt")).config
    assert (options["image_size"], options["noise_schedule"], options["diffusion_steps"]) == (8, "cosine", 20)
    again = call("classifier_train", *args, "--resume", "auto", "--max_steps", 3, "--out_dir", "run", cwd=tmp_path)
    assert "model000003.pt" in again.succeed().out
    for wrong, culprit in (
        (["--noise_schedule", "linear"], "noise_schedule linear"),
        (["--channels", 1], "channels 1"),
    ):
        refused = call("classifier_train", *args, *wrong, "--out_dir", "other", cwd=tmp_path)
        assert refused.code == 1 and f"--{culprit} contradicts {diffusion_model}" in refused.err


def test_a_model_older_than_an_option_has_its_default(diffusion_model, striped, tmp_path):
    state_dict, metadata = checkpoint.load(str(diffusion_model))
    del metadata["config"]["schedule_shift"]
    checkpoint.save_state_dict(state_dict, str(tmp_path / "old.pt"), metadata)
    args = ["--data_dir", striped, "--model_path", "old.pt", *NETWORK, "--schedule_shift", 2, "--out_dir", "run"]
    result = call("classifier_train", *args, cwd=tmp_path)
    assert result.code == 1 and "contradicts old.pt, which was trained with --schedule_shift 1.0" in result.err


def test_checkpoints_of_the_wrong_kind_are_named(classifier, diffusion_model, striped, tmp_path):
    own = classifier[0] / "model000020.pt"
    with pytest.raises(UserError, match=r"ema_0.9999_000002.pt is an image model, not a classifier"):
        load_classifier(str(diffusion_model))
    plain = tmp_path / "plain.pt"
    th.save(dict(th.load(own, weights_only=True)), plain)
    assert load_classifier(str(plain)).config["classifier_width"] == 32
    data = ["--data_dir", striped, "--num_workers", 0]
    for script, args, message in (
        ("image_sample", ["--model_path", own], "model000020.pt is a classifier: it makes no images"),
        ("image_sample", ["--model_path", plain], "plain.pt is a classifier: it makes no images"),
        ("image_train", [*data, "--init_checkpoint", own], "model000020.pt is a classifier"),
        ("classifier_train", [*data, "--init_checkpoint", diffusion_model], "is an image model"),
        ("classifier_train", [*data, "--model_path", own], "is a classifier: a classifier guides an image model"),
        ("classifier_train", [*data, "--model_path", plain], "has no description: leave it out, and give --channels"),
    ):
        result = call(script, *args, "--out_dir", "run", cwd=tmp_path)
        assert result.code == 1 and message in result.err and len(result.err.strip().splitlines()) == 1, result.err


def head_by_head_pool(state_dict, heads):
    """The state dict with the names and the order that the pool had before it took ADM's."""
    old = {name.replace("qkv_proj", "qkv").replace("c_proj", "proj_out"): t for name, t in state_dict.items()}
    for name in ("out.2.qkv.weight", "out.2.qkv.bias"):
        old[name] = old[name].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return old


@pytest.mark.parametrize("width", [32, 128])
def test_a_file_from_before_adms_names_is_the_same_classifier(width, tmp_path):
    options = dict(
        image_size=8, num_classes=3, classifier_width=width, classifier_depth=1, channel_mult="1,1",
        classifier_attention_resolutions="4", classifier_resblock_updown=False,
    )  # fmt: skip
    model = set_golden_weights(build_classifier(ClassifierConfig(**options))).eval()
    del options["classifier_resblock_updown"]
    old = head_by_head_pool(model.state_dict(), heads=max(1, width // 64))
    config = {**options, **vars(ProcessConfig())}
    checkpoint.save_state_dict(old, str(tmp_path / "old.pt"), {"config": config, "class_names": ["a", "b", "c"]})
    loaded = load_classifier(str(tmp_path / "old.pt"))
    x, t = draws()
    assert th.equal(loaded.classifier(x, t), model(x, t)) and loaded.config["classifier_resblock_updown"] is False


def test_weights_of_another_classifier_can_be_started_from(classifier, striped, tmp_path):
    args = ["--data_dir", striped, "--init_checkpoint", classifier[0] / "model000020.pt", "--max_steps", 2]
    call("classifier_train", *args, "--num_workers", 0, "--out_dir", "run", cwd=tmp_path).succeed()
    state_dict, metadata = checkpoint.load(str(tmp_path / "run/model000002.pt"))
    assert state_dict.keys() == checkpoint.load(str(classifier[0] / "model000020.pt"))[0].keys()
    assert metadata["config"]["classifier_width"] == 32 and metadata["class_names"] == ["across", "along"]


def test_one_class_is_too_few(tmp_path):
    write_images(tmp_path / "cats", 4, size=(8, 8), classes=("cat",))
    result = call(
        "classifier_train",
        "--data_dir",
        tmp_path / "cats",
        *FLAGS,
        "--batch_size",
        1,
        "--total_batch_size",
        1,
        cwd=tmp_path,
    )
    assert result.code == 1 and "the one class cat: " in result.err and "a classifier needs two" in result.err


def test_a_dry_run_says_what_training_needs(striped, tmp_path):
    args = ["--data_dir", striped, *FLAGS, "--max_steps", 20, "--dry_run", "--out_dir", "run"]
    result = call("classifier_train", *args, cwd=tmp_path).succeed()
    assert "largest microbatch" in result.out and not (tmp_path / "run").exists()


def test_help_names_the_classifiers_options_and_the_process(tmp_path):
    text = call("classifier_train", "--help-all", cwd=tmp_path).succeed().out
    flags = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert {"classifier_width", "model_path", "noise_schedule", "image_size", "resume", "val_dir"} <= flags
    assert not {"class_cond", "num_channels", "sample_interval"} & flags
