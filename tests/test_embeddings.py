"""The embeddings of all residual blocks in one product, as on GPUs: the same numbers, and nobody's code is left out."""

import pytest
import torch as th
from helpers import set_golden_weights
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from improved_diffusion import embeddings, unet
from improved_diffusion.models.acceleration import checkpoint_levels

FORMS = {
    "plain": {},
    "scale and shift": dict(use_scale_shift_norm=True),
    "resampling blocks": dict(use_scale_shift_norm=True, resblock_updown=True),
    "classes": dict(num_classes=3),
}


class Products(TorchDispatchMode):
    """Counts the products with a bias: those of the embeddings, and of nothing else on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is th.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def network(**kwargs):
    return set_golden_weights(unet.UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_heads=2, **kwargs))


def encoder():
    model = unet.EncoderUNetModel(8, 3, 32, 5, 1, (2,), channel_mult=(1, 2), use_scale_shift_norm=True)
    return set_golden_weights(model)


def run(model):
    """(output, gradients of the images and the trained parameters, number of products)."""
    x = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(0)).requires_grad_()
    y = {"y": th.tensor([2, 0])} if getattr(model, "num_classes", None) else {}
    with Products() as products:
        out = model(x, th.tensor([700, 3]), **y)
    grad = th.linspace(-1, 1, out.numel()).view(out.shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), th.autograd.grad(out, [x, *trained], grad), products.count


def assert_same(found, expected):
    th.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1], expected[1], strict=True):
        th.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    return lambda: monkeypatch.setattr(embeddings, "pays", lambda device: True)


@pytest.mark.parametrize("make", [lambda kwargs=kwargs: network(**kwargs) for kwargs in FORMS.values()] + [encoder],
                         ids=[*FORMS, "encoder"])  # fmt: skip
def test_outputs_and_gradients_are_the_same(make, as_on_a_gpu):
    model = make()
    blocks = sum(isinstance(module, unet.ResBlock) for module in model.modules())
    separate = run(model)
    assert separate[2] == blocks + 2  # and those of the timesteps' embedding
    as_on_a_gpu()
    joined = run(model)
    assert joined[2] == 3
    assert_same(joined, separate)


@pytest.mark.parametrize("levels, products", [((0, 1), 10), ((0,), 6)])
def test_blocks_with_activation_checkpointing_take_the_embedding_itself(levels, products, as_on_a_gpu):
    """Code may replace `checkpoint` by the published function, whose arguments are tensors."""
    model = network(use_scale_shift_norm=True)
    separate = run(model)
    checkpoint_levels(model, levels)
    as_on_a_gpu()
    found = run(model)
    assert found[2] == products
    assert_same(found, separate)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16], ids=str)
def test_torsos_in_16_bits_take_the_same_embeddings(dtype, as_on_a_gpu):
    model = network(use_scale_shift_norm=True)
    model.convert_to_bf16() if dtype == th.bfloat16 else model.convert_to_fp16()
    emb = th.randn(2, 128, generator=th.Generator().manual_seed(0))
    layers = [module.emb_layers for module in model.modules() if isinstance(module, unet.ResBlock)]
    as_on_a_gpu()
    found = model._embeddings(emb)[model.middle_block]
    assert found.keys() == set(layers)
    for each in layers:
        th.testing.assert_close(found[each], each(emb), rtol=1e-6, atol=1e-6)
        assert found[each].dtype == th.float32


def test_a_network_without_gradients_joins_them_too(as_on_a_gpu):
    model = network().requires_grad_(False)
    separate = run(model)
    as_on_a_gpu()
    assert_same(run(model), separate)
    assert run(model)[2] == 3


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Module):
    """A linear layer and what somebody adds to it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 2)
        self.up = nn.Linear(2, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class DoubledBlock(unet.ResBlock):
    def forward(self, x, emb):
        return super().forward(x, 2 * emb)


def doubled_forward(forward):
    return lambda self, x, emb: forward(self, x, 2 * emb)


def change(model, how, monkeypatch):
    """One of the ways in which published code is extended, which takes the embedding as a tensor."""
    part = model.input_blocks[1]
    block = part[0]
    linear = block.emb_layers[1]
    if how == "hook of a linear layer":
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "hook of the layers":
        block.emb_layers.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "hook of a block":
        block.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    elif how == "hook of a part":
        part.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    elif how == "another layer":
        block.emb_layers[1] = Doubled(linear.in_features, linear.out_features)
    elif how == "a low-rank layer":
        block.emb_layers[1] = LowRank(linear)
    elif how == "other layers":
        block.emb_layers = nn.Linear(linear.in_features, linear.out_features)
    elif how == "a parametrized layer":
        parametrizations.spectral_norm(linear)
    elif how == "no bias":
        linear.bias = None
    elif how == "one layer more":
        block.emb_layers.append(nn.Tanh())
    elif how == "a subclass":
        block.__class__ = DoubledBlock
    elif how == "method of a block":
        block._forward = doubled_forward(unet.ResBlock._forward).__get__(block)
    elif how == "compiled block":
        block._compiled_call_impl = lambda x, emb: block.forward(x, 2 * emb)
    else:
        kind, name = {
            "method of the class": (unet.ResBlock, "_forward"), "forward of the class": (unet.ResBlock, "forward"),
            "forward of the parts": (unet.TimestepEmbedSequential, "forward"),
        }[how]  # fmt: skip
        monkeypatch.setattr(kind, name, doubled_forward(getattr(kind, name)))


@pytest.mark.parametrize("how", [
    "hook of a linear layer", "hook of the layers", "hook of a block", "hook of a part", "another layer",
    "a low-rank layer", "other layers", "a parametrized layer", "no bias", "one layer more", "a subclass",
    "method of a block", "compiled block", "method of the class", "forward of the class", "forward of the parts",
])  # fmt: skip
def test_code_that_somebody_changed_gets_the_embedding(how, as_on_a_gpu, monkeypatch):
    model = network(use_scale_shift_norm=True)
    published = run(model)[0]
    th.manual_seed(0)
    change(model, how, monkeypatch)
    model.eval()  # spectral norms change with each call in training
    separate = run(model)
    assert not th.equal(separate[0], published)
    as_on_a_gpu()
    found = run(model)
    assert_same(found, separate)
    assert found[2] < separate[2] or "class" in how or "parts" in how  # the other parts are joined


def test_where_some_of_the_layers_are_frozen_none_are_joined(as_on_a_gpu):
    model = network()
    model.input_blocks[1][0].emb_layers[1].bias.requires_grad_(False)
    separate = run(model)
    as_on_a_gpu()
    found = run(model)
    assert_same(found, separate)
    assert found[2] == separate[2]


def test_layers_of_several_types_are_not_joined(as_on_a_gpu):
    model, emb = network(), th.randn(2, 128)
    model.input_blocks[1][0].emb_layers[1].bfloat16()
    as_on_a_gpu()
    assert all(each is emb for each in model._embeddings(emb).values())


def test_on_cpus_nothing_is_joined():
    model, emb = network(), th.randn(2, 128)
    assert all(each is emb for each in model._embeddings(emb).values())


def test_exported_networks_have_the_same_outputs(as_on_a_gpu):
    model, x, t = network().eval(), th.randn(2, 3, 8, 8), th.tensor([700.0, 3.0])
    expected = model(x, t)
    as_on_a_gpu()
    exported = th.export.export(model, (x, t)).module()
    th.testing.assert_close(exported(x, t), expected, rtol=1e-6, atol=1e-6)


def test_a_block_by_itself_takes_the_embedding(as_on_a_gpu):
    as_on_a_gpu()
    block = set_golden_weights(unet.ResBlock(32, 64, 0.0))
    assert block(th.randn(1, 32, 4, 4), th.randn(1, 64)).shape == (1, 32, 4, 4)
