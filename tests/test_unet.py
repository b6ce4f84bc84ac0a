"""The networks: golden outputs, published layouts, and the invariances they must have."""

import math

import pytest
import torch as th
from helpers import GOLDEN, golden, golden_json, set_golden_weights
from torch import nn

from improved_diffusion.config.published import model_and_diffusion_defaults, sr_model_and_diffusion_defaults
from improved_diffusion.models.architecture import read_architecture
from improved_diffusion.models.factories import create_model, create_model_and_diffusion, sr_create_model_and_diffusion
from improved_diffusion.unet import (
    AttentionBlock,
    Downsample,
    QKVAttention,
    ResBlock,
    SuperResModel,
    TimestepBlock,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

G = golden("networks")
NETWORKS = sorted({key.split("/")[0] for key in G})
LAYOUTS = sorted(path.stem for path in (GOLDEN / "layouts").glob("*.json"))


def build(flags, superres=False, device="cpu"):
    defaults = sr_model_and_diffusion_defaults() if superres else model_and_diffusion_defaults()
    create = sr_create_model_and_diffusion if superres else create_model_and_diffusion
    with th.device(device):
        return create(**{**defaults, **flags})[0]


def golden_network(name):
    """(network, inputs) of networks.npz."""
    flags = golden_json(f"model_{name}")
    model = set_golden_weights(build(flags, "large_size" in flags))
    inputs = {key: th.from_numpy(G[f"{name}/{key}"]) for key in ("x", "t", "y", "low_res") if f"{name}/{key}" in G}
    inputs["timesteps"] = inputs.pop("t")
    if not flags.get("class_cond"):
        del inputs["y"]
    return model, inputs


def small(**kwargs):
    """A small network whose output is not zero."""
    arguments = dict(
        in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
        channel_mult=(1, 2),
    )  # fmt: skip
    return set_golden_weights(UNetModel(**{**arguments, **kwargs}))


@pytest.mark.parametrize("name", NETWORKS)
def test_output_is_the_published_networks(name):
    model, inputs = golden_network(name)
    with th.no_grad():
        out = model(**inputs)
    th.testing.assert_close(out, th.from_numpy(G[f"{name}/out"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_the_published_networks(name):
    layout = golden_json(f"layouts/{name}")
    model = build(layout["flags"], layout["superres"], device="meta")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == layout["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == layout["num_parameters"]


def test_a_fresh_network_gives_zeros():
    for p in (model := build(golden_json("model_uncond32"))).out[-1].parameters():
        assert (p == 0).all()
    assert (model(th.randn(1, 3, 32, 32), th.tensor([5])) == 0).all()


# Sizes and channels


@pytest.mark.parametrize("size", ["32x48", "48x32", 20, 28, "12x20", 8, 96, "36x100"])
def test_any_size_that_the_levels_divide(size):
    model = create_model(size, 32, 1, False, False, False, "16,8", 4, -1, True, 0.0)
    height, width = (size, size) if isinstance(size, int) else map(int, size.split("x"))
    with th.no_grad():
        assert model(th.randn(1, 3, height, width), th.tensor([3])).shape == (1, 3, height, width)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_one_to_four_channels(channels, learn_sigma):
    model = create_model(16, 32, 1, learn_sigma, False, False, "8", 1, -1, True, 0.0, channels=channels)
    with th.no_grad():
        out = model(th.randn(2, channels, 16, 16), th.tensor([3, 900]))
    assert out.shape == (2, channels * (2 if learn_sigma else 1), 16, 16)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("conv_resample", [True, False])
def test_signals_of_one_to_three_dimensions(dims, conv_resample):
    model = small(dims=dims, conv_resample=conv_resample)
    x = th.randn(2, 3, *[4] * dims)
    with th.no_grad():
        assert model(x, th.tensor([1, 2])).shape == x.shape


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("ratio", [2, 4])
def test_low_res_is_upsampled_bilinearly(size, ratio):
    model = SuperResModel(3, 32, 3, 1, (), channel_mult=(1,))
    assert model.in_channels == 6
    seen = []
    model.input_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, low_res = th.randn(2, 3, size * ratio, size * ratio), th.randn(2, 3, size, size)
    model(x, th.tensor([1, 2]), low_res=low_res)
    th.testing.assert_close(seen[0][:, :3], x)
    expected = nn.functional.interpolate(low_res, scale_factor=ratio, mode="bilinear", align_corners=False)
    th.testing.assert_close(seen[0][:, 3:], expected)


def test_missing_low_res_is_an_error():
    model = SuperResModel(3, 32, 3, 1, (), channel_mult=(1,))
    with pytest.raises(ValueError, match="low_res"):
        model(th.zeros(1, 3, 8, 8), th.tensor([1]))


# Conditions


def test_labels_must_fit_the_network():
    plain, conditional = small(), small(num_classes=5)
    x, t = th.zeros(2, 3, 8, 8), th.tensor([1, 2])
    with pytest.raises(ValueError, match="if and only if"):
        plain(x, t, th.tensor([0, 1]))
    with pytest.raises(ValueError, match="if and only if"):
        conditional(x, t)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        conditional(x, t, th.tensor([0, 1, 2]))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_timestep_and_label_change_the_output(scale_shift):
    model = small(num_classes=5, use_scale_shift_norm=scale_shift)
    x = th.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    with th.no_grad():
        out = model(x, th.tensor([1, 1, 500]), th.tensor([0, 4, 0]))
    assert (out[0] - out[1]).abs().max() > 1e-3 and (out[0] - out[2]).abs().max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other():
    model = small().eval()
    x, t = th.randn(3, 3, 8, 8), th.tensor([1, 50, 900])
    with th.no_grad():
        alone = th.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
        th.testing.assert_close(model(x, t), alone, rtol=1e-4, atol=1e-5)


def test_dropout_acts_while_training_only():
    model = small(dropout=0.5)
    x, t = th.randn(1, 3, 8, 8), th.tensor([1])
    with th.no_grad():
        assert (model(x, t) != model(x, t)).any()
        model.eval()
        th.testing.assert_close(model(x, t), model(x, t), rtol=0, atol=0)


# Blocks


def test_attention_is_that_of_the_paper_head_by_head():
    block = AttentionBlock(64, num_heads=4)
    set_golden_weights(block)
    x = th.randn(2, 64, 3, 5)
    flat = x.reshape(2, 64, 15)
    normed = nn.functional.group_norm(flat, 32, block.norm.weight, block.norm.bias)
    qkv = nn.functional.conv1d(normed, block.qkv.weight, block.qkv.bias)
    heads = []
    for head in range(4):  # each holds its q, then k, then v
        q, k, v = qkv[:, 48 * head : 48 * head + 48].split(16, dim=1)
        weights = th.softmax(th.einsum("nct,ncs->nts", q, k) / math.sqrt(16), dim=-1)
        heads.append(th.einsum("nts,ncs->nct", weights, v))
    expected = flat + nn.functional.conv1d(th.cat(heads, dim=1), block.proj_out.weight, block.proj_out.bias)
    th.testing.assert_close(block(x), expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_qkv_attention_shapes():
    assert QKVAttention()(th.randn(6, 12, 7)).shape == (6, 4, 7)


def test_heads_that_do_not_divide_the_channels_are_named():
    with pytest.raises(ValueError, match=r"num_heads 3.*64"):
        AttentionBlock(64, num_heads=3)


def test_upsampling_blocks_may_have_other_heads():
    model = small(num_heads=2, num_heads_upsample=4)
    heads = {name: m.num_heads for name, m in model.named_modules() if isinstance(m, AttentionBlock)}
    assert {n for name, n in heads.items() if name.startswith("output")} == {4}
    assert {n for name, n in heads.items() if not name.startswith("output")} == {2}


def test_upsample_and_downsample():
    x = th.arange(16.0).view(1, 1, 4, 4)
    up = Upsample(1, use_conv=False)(x)
    assert up[0, 0, :2, :2].tolist() == [[0, 0], [0, 0]] and up.shape == (1, 1, 8, 8)
    down = Downsample(1, use_conv=False)(x)
    assert down[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert Downsample(1, use_conv=True)(x).shape == (1, 1, 2, 2)
    assert Upsample(1, use_conv=True, dims=3)(th.zeros(1, 1, 3, 4, 4)).shape == (1, 1, 3, 8, 8)
    assert Downsample(1, use_conv=True, dims=3)(th.zeros(1, 1, 3, 4, 4)).shape == (1, 1, 3, 2, 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_downsampling_without_padding_looks_at_the_far_sides_only(dims):
    x = th.randn(1, 32, *[6] * dims)
    layer = Downsample(32, True, dims, padding=0)
    shifted = Downsample(32, True, dims)
    shifted.load_state_dict(layer.state_dict())
    # A window that begins at the image rather than a pixel before it: that of the image moved by a pixel.
    moved = x.roll([-1] * min(dims, 2), dims=[*range(-min(dims, 2), 0)])
    ours, theirs = layer(x), shifted(moved)
    inside = (..., *[slice(1, -1)] * min(dims, 2))
    assert ours.shape == theirs.shape == (1, 32, *([6, 3, 3] if dims == 3 else [3] * dims))
    th.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-6)


def test_every_norm_has_the_networks_eps():
    network = create_model(8, 32, 1, True, False, False, "4", 1, -1, True, 0, channel_mult="1,1", norm_eps=1e-3)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 10 and {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("use_conv, kernel", [(False, 1), (True, 3)])
def test_res_block_changes_the_width_on_its_skip(use_conv, kernel):
    block = ResBlock(32, 16, 0.0, out_channels=64, use_conv=use_conv)
    assert block.skip_connection.weight.shape == (64, 32, kernel, kernel)
    x = th.randn(2, 32, 4, 4)
    th.testing.assert_close(block(x, th.randn(2, 16)), block.skip_connection(x))  # the rest starts at zero


def test_embedding_is_handed_to_the_blocks_that_take_it():
    class Add(TimestepBlock):
        def forward(self, x, emb):
            return x + emb

    assert TimestepEmbedSequential(nn.Identity(), Add(), nn.ReLU())(th.tensor([-3.0]), th.tensor([5.0])).item() == 2


# Features


@pytest.mark.parametrize("name", NETWORKS)
def test_feature_vectors_are_the_blocks_activations(name):
    model, inputs = golden_network(name)
    with th.no_grad():
        features = model.get_feature_vectors(**inputs)
        assert set(features) == {"down", "middle", "up"}
        assert len(features["down"]) == len(model.input_blocks) and len(features["up"]) == len(model.output_blocks)
        th.testing.assert_close(model.out(features["up"][-1]), model(**inputs))
        assert features["middle"].shape[1] == features["down"][-1].shape[1]


# Architecture


@pytest.mark.parametrize(
    "arguments",
    [
        dict(in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2,)),
        dict(
            in_channels=1, model_channels=64, out_channels=1, num_res_blocks=2, attention_resolutions=(1, 4),
            channel_mult=(1, 1, 2),
        ),
        dict(
            in_channels=4, model_channels=64, out_channels=8, num_res_blocks=3, attention_resolutions=(),
            channel_mult=(0.5, 1.5), num_classes=7, use_scale_shift_norm=True,
        ),
        dict(in_channels=2, model_channels=32, out_channels=2, num_res_blocks=1, attention_resolutions=(8,)),
    ],
)  # fmt: skip
def test_architecture_is_read_off_the_shapes(arguments):
    with th.device("meta"):
        model = UNetModel(**arguments)
    defaults = dict(channel_mult=(1, 2, 4, 8), num_classes=None, use_scale_shift_norm=False, resblock_updown=False)
    assert read_architecture(model.state_dict()) == {**defaults, **arguments}


@pytest.mark.parametrize("name", LAYOUTS)
def test_architecture_read_off_a_published_model_builds_it_again(name):
    layout = golden_json(f"layouts/{name}")
    shapes = {key: th.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}
    with th.device("meta"):
        model = UNetModel(**read_architecture(shapes))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == layout["state_dict"]


def test_architecture_of_something_else_is_an_error():
    with pytest.raises((KeyError, IndexError, ValueError)):
        read_architecture(nn.Linear(2, 2).state_dict())


# Memory and precision


def test_checkpointing_gives_the_same_gradients():
    x, t, y = th.randn(2, 3, 8, 8), th.tensor([1, 700]), th.tensor([0, 3])
    outputs, gradients = [], []
    for use_checkpoint in (False, True):
        model = small(num_classes=5, use_checkpoint=use_checkpoint, dropout=0.3)
        th.manual_seed(1)
        out = model(x, t, y)
        outputs.append(out)
        gradients.append(th.autograd.grad((out**2).sum(), list(model.parameters())))
    th.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    for one, other in zip(*gradients):
        th.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind, dtype", [("fp16", th.float16), ("bf16", th.bfloat16)])
def test_conversion_touches_the_torsos_convolutions_only(kind, dtype):
    model = small(num_classes=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, args = th.randn(2, 3, 8, 8), (th.tensor([1, 700]), th.tensor([0, 3]))
    with th.no_grad():
        full = model(x, *args)
    getattr(model, f"convert_to_{kind}")()
    assert model.inner_dtype == dtype
    convolutions = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not name.startswith("out.")
        for part in ("weight", "bias")
    }
    assert convolutions == {name for name, p in model.named_parameters() if p.dtype == dtype}
    assert all(p.dtype == th.float32 for name, p in model.named_parameters() if name not in convolutions)
    with th.no_grad():
        half = model(x, *args)
    assert half.dtype == th.float32
    assert (half - full).abs().max() < (0.02 if kind == "fp16" else 0.15) * full.abs().max()
    model.convert_to_fp32()
    assert model.inner_dtype == th.float32
    for name, p in model.named_parameters():
        th.testing.assert_close(p.detach(), before[name].to(dtype).float() if name in convolutions else before[name])
