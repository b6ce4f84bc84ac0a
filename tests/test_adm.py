"""The networks of Dhariwal & Nichol 2021 give the numbers of their published code (tests/golden/adm)."""

import inspect
import json

import numpy as np
import pytest
import torch as th
from adm_helpers import ADM, DESCRIBED, KINDS, build, normal

from improved_diffusion.models.architecture import read_architecture, read_encoder
from improved_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

CASES = DESCRIBED["networks"]
LAYOUTS = json.loads((ADM / "layouts" / "cases.json").read_text())
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def golden():
    with np.load(ADM / "networks.npz") as arrays:
        return dict(arrays)


def inputs(case):
    """(x, timesteps, further arguments) of a case."""
    described = CASES[case]
    arguments, batch = described["arguments"], described["batch"]
    shape = (batch, arguments["in_channels"], arguments["image_size"], arguments["image_size"])
    more = {}
    if described["labels"] is not None:
        more["y"] = th.tensor(described["labels"])
    if described["kind"] == "superres":
        more["low_res"] = th.from_numpy(normal(f"{case}:low_res", (*shape[:2], shape[2] // 2, shape[3] // 2)))
    return th.from_numpy(normal(f"{case}:x", shape)), th.tensor(described["timesteps"]), more


@every_case
def test_outputs_are_the_published_ones(case, golden):
    network = build(CASES[case]["kind"], CASES[case]["arguments"])
    x, timesteps, more = inputs(case)
    with th.no_grad():
        output = network(x, timesteps, **more)
    assert output.shape == golden[case].shape
    np.testing.assert_allclose(output.numpy(), golden[case], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}:grad" in CASES[case]["arrays"]])
def test_gradients_of_classes_are_the_published_ones(case, golden):
    network = build(CASES[case]["kind"], CASES[case]["arguments"])
    x, timesteps, _ = inputs(case)
    x.requires_grad_()
    log_p = th.log_softmax(network(x, timesteps), dim=-1)
    gradient = th.autograd.grad(log_p.diagonal().sum(), x)[0]
    np.testing.assert_allclose(gradient.numpy(), golden[f"{case}:grad"], rtol=0, atol=1e-6)


@every_case
def test_state_dicts_have_the_published_names_and_shapes(case):
    network = KINDS[CASES[case]["kind"]](**CASES[case]["arguments"])
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == LAYOUTS[case]


@pytest.mark.parametrize("name", ["unet_updown", "encoder_attention"])
def test_the_same_parameters_are_converted_to_16_bits(name):
    described = json.loads((ADM / "layouts" / f"fp16_{name}.json").read_text())
    network = KINDS[described["kind"]](**described["arguments"])
    network.convert_to_fp16()
    assert {name: str(t.dtype).removeprefix("torch.") for name, t in network.named_parameters()} == {
        name: dtype.removeprefix("torch.") for name, dtype in described["dtypes"].items()
    }
    network.convert_to_fp32()
    assert {t.dtype for t in network.parameters()} == {th.float32}


def test_a_network_wrapped_in_checkpoints_has_the_same_gradients():
    case = "unet_updown_head_channels_new_order"
    x, timesteps, _ = inputs(case)
    gradients = []
    for use_checkpoint in (False, True):
        network = build("unet", {**CASES[case]["arguments"], "use_checkpoint": use_checkpoint})
        network(x, timesteps).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(th.equal(one, other) for one, other in zip(*gradients, strict=True))


# Read off the shapes

UNSHOWN = {"image_size", "dropout", "conv_resample", "num_heads", "num_heads_upsample", "num_head_channels",
           "use_new_attention_order"}  # fmt: skip
SHOWN = [case for case in CASES if CASES[case]["arguments"]["conv_resample"]]


@pytest.mark.parametrize("case", SHOWN)
def test_shapes_show_the_rest_of_a_network(case):
    kind, arguments = CASES[case]["kind"], CASES[case]["arguments"]
    with th.device("meta"):
        state_dict = KINDS[kind](**arguments).state_dict()
    found = read_encoder(state_dict) if kind == "encoder" else read_architecture(state_dict)
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items() if name not in UNSHOWN}
    if kind == "superres":
        expected["in_channels"] *= 2
    assert {name: found[name] for name in expected} == expected
    if arguments.get("pool") == "attention":
        assert found["image_size"] == arguments["image_size"]


def test_blocks_that_fit_two_depths_are_an_error_unless_the_depth_is_given():
    with th.device("meta"):
        encoder = EncoderUNetModel(
            16, 3, 32, 10, 1, (), channel_mult=(1, 1, 1), resblock_updown=True, num_head_channels=32
        )
    state_dict = encoder.state_dict()
    with pytest.raises(ValueError, match="1 or 2"):
        read_encoder(state_dict)
    assert read_encoder(state_dict, 1)["channel_mult"] == (1, 1, 1)


@pytest.mark.parametrize("other", [{}, {"time_embed.0.weight": th.zeros(4, 1)}, {"input_blocks.x": th.zeros(1)}])
def test_shapes_of_something_else_are_an_error(other):
    for read in (read_architecture, read_encoder):
        with pytest.raises((KeyError, IndexError, ValueError)):
            read(other)


@pytest.mark.parametrize("name", ["output_blocks.999999999.0.x", "input_blocks.x.0", "output_blocks.1" + "0" * 5000])
def test_blocks_with_other_numbers_are_an_error_at_once(name):
    for case, read in (("unet_updown", read_architecture), ("encoder_attention", read_encoder)):
        with th.device("meta"):
            state_dict = KINDS[CASES[case]["kind"]](**CASES[case]["arguments"]).state_dict()
        if name.startswith("output") and read is read_encoder:
            continue  # which does not look at them
        with pytest.raises(KeyError):
            read({**state_dict, name: th.zeros(1)})


@pytest.mark.parametrize("positions", [0, 2**46 + 1])
def test_positions_that_no_image_has_show_no_size(positions):
    with th.device("meta"):
        state_dict = EncoderUNetModel(**CASES["encoder_attention"]["arguments"]).state_dict()
        state_dict["out.2.positional_embedding"] = th.zeros(0, positions)
    if positions:
        with pytest.raises(KeyError):
            read_encoder(state_dict)
    else:
        assert read_encoder(state_dict)["image_size"] is None


# Constructors

GUIDED = (32, 3, 32, 6, 1, (2, 4))  # image_size, in_channels, model_channels, out_channels, num_res_blocks, attention
OURS = GUIDED[1:]


def shapes(network):
    return {name: t.shape for name, t in network.state_dict().items()}


@pytest.mark.parametrize("kind", [UNetModel, SuperResModel])
@pytest.mark.parametrize("positional", range(len(GUIDED) + 1))
def test_image_size_may_come_first(kind, positional):
    names = list(inspect.signature(kind.__init__).parameters) if kind is UNetModel else []
    expected = shapes(kind(*OURS, channel_mult=(1, 2)))
    keywords = dict(zip(("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks",
                         "attention_resolutions"), GUIDED, strict=True))  # fmt: skip
    left = dict(list(keywords.items())[positional:])
    assert shapes(kind(*GUIDED[:positional], **left, channel_mult=(1, 2))) == expected
    assert names[:2] in ([], ["self", "in_channels"])


def test_guided_positional_arguments_mean_what_they_mean_there():
    network = UNetModel(*GUIDED, 0.1, (1, 2), True, 2, 10, True, True, 4, 16, 2, True, True, True)
    attention = network.middle_block[1]
    assert (network.dropout, network.num_classes, network.use_checkpoint) == (0.1, 10, True)
    assert attention.use_new_attention_order and attention.num_heads == 64 // 16
    assert network.input_blocks[2][0].updown and network.image_size == 32


def test_a_subclass_in_the_style_of_guided_diffusion():
    class Twice(UNetModel):
        def __init__(self, image_size, in_channels, *args, **kwargs):
            super().__init__(image_size, in_channels * 2, *args, **kwargs)

    for network in (Twice(*GUIDED), Twice(image_size=32, in_channels=3, model_channels=32, out_channels=6,
                                          num_res_blocks=1, attention_resolutions=(2, 4))):  # fmt: skip
        assert network.in_channels == 6 and network.model_channels == 32


@pytest.mark.parametrize("option", [dict(num_heads=3), dict(num_head_channels=24)])
def test_heads_that_do_not_divide_the_channels_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        UNetModel(*OURS, **option)


@pytest.mark.parametrize("option", [dict(pool="max"), dict(pool="attention")])
def test_an_impossible_pool_is_named(option):
    with pytest.raises(ValueError, match="pool"):
        EncoderUNetModel(*GUIDED[:3], 10, 1, (2,), **option)


def test_an_encoder_takes_images_that_are_not_square():
    network = EncoderUNetModel(
        (16, 32), 3, 32, 10, 1, (2,), channel_mult=(1, 2), num_head_channels=32, pool="attention"
    )
    assert network(th.zeros(2, 3, 16, 32), th.zeros(2)).shape == (2, 10)
    with pytest.raises(ValueError, match="16, 32"):
        network(th.zeros(2, 3, 32, 16), th.zeros(2))
