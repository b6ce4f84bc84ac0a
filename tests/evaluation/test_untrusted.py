"""Hostile programs: each would leave a file behind if torch loaded it, and none does."""

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch as th
from feature_helpers import export_module, write_program, write_script

from improved_diffusion.config import UserError
from improved_diffusion.evaluation.feature_network import FeatureNetwork
from improved_diffusion.evaluation.untrusted import clean_script


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The members of a harmless exported program, by name."""
    path = tmp_path_factory.mktemp("programs") / "f.pt2"
    write_program(path, 8, spatial=True, logits=True)
    return members_of(path)


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path, members):
    """Write (name, content) pairs, of which several may have one name."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return str(path)


class Hostile:
    """What leaves a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def saved(content):
    buffer = io.BytesIO()
    th.save(content, buffer)
    return buffer.getvalue()


def refused(tmp_path, members, *culprits):
    """The program is refused, and nothing in it ran."""
    path = write_archive(tmp_path / "hostile.pt2", members.items() if isinstance(members, dict) else members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as caught:
            FeatureNetwork(path)(np.zeros((2, 8, 8, 3), np.uint8))
    assert not (tmp_path / "trace").exists()
    for culprit in ("--features", path, "could run code when loaded; it was not loaded", *culprits):
        assert culprit in str(caught.value)


def change(program, member, edit):
    """The program's members, a JSON member changed by a function."""
    name = next(name for name in program if name.endswith(member))
    content = json.loads(program[name])
    edit(content)
    return {**program, name: json.dumps(content).encode()}


def test_the_attack_of_these_tests_works_on_torch_itself(tmp_path, program):
    content = saved((Hostile(tmp_path / "trace"),))
    path = write_archive(tmp_path / "f.pt2", {**program, "f/data/sample_inputs/model.pt": content}.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            th.export.load(path)
    assert (tmp_path / "trace").exists()


def test_what_is_packed_anew_is_the_program(tmp_path, program):
    path = write_archive(tmp_path / "again.pt2", program.items())
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    ours = FeatureNetwork(path)(images)
    theirs = th.export.load(path).module()(th.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_array_equal(ours.features, theirs["features"].numpy())
    np.testing.assert_array_equal(ours.spatial, theirs["spatial"].numpy())


@pytest.mark.parametrize("name", ["model.pt", "MODEL.PT"])
@pytest.mark.parametrize("form", ["torch", "plain"])
def test_sample_inputs_are_not_unpickled(tmp_path, program, name, form):
    hostile = (Hostile(tmp_path / "trace"),)
    content = saved(hostile) if form == "torch" else pickle.dumps(hostile, 2)
    del (members := dict(program))["f/data/sample_inputs/model.pt"]
    # torch finds members whatever their case
    refused(tmp_path, {**members, f"f/data/sample_inputs/{name}": content}, f"data/sample_inputs/{name}")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "Model.pt"])
def test_members_of_one_name_do_not_hide_each_other(tmp_path, program, first, name):
    hostile = [(f"f/data/sample_inputs/{name}", saved((Hostile(tmp_path / "trace"),)))]
    members = list(program.items())
    members = members[:1] + hostile + members[1:] if first else members + hostile
    refused(tmp_path, members, "members of one name")


def test_weights_and_constants_are_not_unpickled(tmp_path, program):
    def pickled(content):
        next(iter(content["config"].values()))["use_pickle"] = True

    members = change(program, "model_weights_config.json", pickled)
    refused(tmp_path, {**members, "f/data/weights/weight_0": saved(Hostile(tmp_path / "trace"))}, "weight_0")
    for name, hostile in (
        ("opaque_obj_0", pickle.dumps(Hostile(tmp_path / "trace"))), ("custom_obj_0", b""),
        ("tensor_0", saved(Hostile(tmp_path / "trace"))),
    ):  # fmt: skip

        def objects(content, name=name):
            content["config"] = {
                "thing": {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
            }

        members = change(program, "model_constants_config.json", objects)
        refused(tmp_path, {**members, f"f/data/constants/{name}": hostile}, name)


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_weights_of_a_middle_aged_format_are_not_unpickled(tmp_path, program, folder):
    content = saved({"weights": Hostile(tmp_path / "trace")})
    refused(tmp_path, {**program, f"f/data/{folder}/model.pt": content}, f"data/{folder}/model.pt")


def older(program, **changed):
    """The program in the format of torch up to 2.7."""
    members = {
        "version": b"8.0", "serialized_exported_program.json": program["f/models/model.json"],
        "serialized_state_dict.pt": saved({"weights": th.zeros(48, 11)}), "serialized_constants.pt": saved({}),
        "serialized_example_inputs.pt": saved(((th.zeros(2, 3, 8, 8, dtype=th.uint8),), {})),
    }  # fmt: skip
    return {**members, **changed}


def test_the_older_format_is_read(tmp_path, program):
    weights = np.frombuffer(program["f/data/weights/weight_0"], np.float32).reshape(48, 11)
    state = saved({"weights": th.from_numpy(weights.copy())})
    members = older(program, **{"serialized_state_dict.pt": state})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    try:
        found = FeatureNetwork(write_archive(tmp_path / "older.pt2", members.items()))(images)
    except UserError as error:
        pytest.skip(f"this torch no longer reads it: {error}")
    now = FeatureNetwork(write_archive(tmp_path / "now.pt2", program.items()))(images)
    np.testing.assert_array_equal(found.features, now.features)


@pytest.mark.parametrize("name", ["serialized_state_dict", "serialized_constants", "serialized_example_inputs"])
@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_pickles_in_the_older_format_are_not_run(tmp_path, program, name, suffix):
    hostile = {f"{name}.{suffix}": saved({"weights": Hostile(tmp_path / "trace")})}
    refused(tmp_path, older(program, **hostile), f"{name}.{suffix}")


def test_machine_code_is_refused(tmp_path, program):
    refused(tmp_path, {**program, "f/data/aotinductor/model/model.so": b"\x7fELF"}, "data/aotinductor/model/model.so")


def test_a_member_outside_the_programs_folder_is_refused(tmp_path, program):
    refused(tmp_path, {**program, "g/models/model.json": b"{}"}, "g/models/model.json")


# Text that torch runs as Python


def nodes(content):
    return content["graph_module"]["graph"]["nodes"]


def python(tmp_path):
    return f"__import__('os').mkdir('{tmp_path / 'trace'}')"


def as_expression(content, text):
    content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text


@pytest.mark.parametrize("text", [
    "{python}", "Symbol('s0', positive={python})", "exec(chr(48))", "Symbol('s0').__class__", "lambda: 0",
    "(lambda: 1)()", "[0 for x in range(9)]", "Function('__import__')", "sympify('1')", "Symbol('s0 + x()')",
])  # fmt: skip
def test_sizes_are_not_evaluated(tmp_path, program, text):
    text = text.replace("{python}", python(tmp_path))
    members = change(program, "model.json", lambda content: as_expression(content, text))
    refused(tmp_path, members, "expr_str")


def test_a_name_is_not_written_into_source(tmp_path, program):
    name = next(name for name in program if name.endswith("model.json"))
    text = program[name].decode().replace('"name": "x"', json.dumps({"name": "x=" + python(tmp_path)})[1:-1])
    refused(tmp_path, {**program, name: text.encode()}, "x=__import__")


@pytest.mark.parametrize("target", [
    "torch.os.mkdir", "_operator.methodcaller", "_operator.call", "torch.ops.aten.from_file.default",
    "torch.ops.higher_order.flat_apply", "torch.ops.somebody.op.default", "#somebody:thing",
])  # fmt: skip
def test_a_node_calls_plain_operators_alone(tmp_path, program, target):
    def call(content):
        argument = {"name": "path", "arg": {"as_string": str(tmp_path / "trace")}, "kind": 1}
        nodes(content).insert(0, {**nodes(content)[0], "target": target, "inputs": [argument], "outputs": []})

    refused(tmp_path, change(program, "model.json", call), f"target '{target}'")


def test_operators_are_not_arguments(tmp_path, program):
    def call(content):
        nodes(content)[0]["inputs"][0]["arg"] = {"as_operator": "torch.os.mkdir"}

    refused(tmp_path, change(program, "model.json", call), "as_operator")


@pytest.mark.parametrize("tree", [
    {"type": "collections.defaultdict", "context": {"default_factory_module": "antigravity"}, "children_spec": []},
    {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "antigravity:x", "name": "y"}]'},
    {"type": "builtins.dict", "context": '["x=print()"]', "children_spec": []},
    {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "collections.deque", "context": "null"}]},
])  # fmt: skip
def test_a_tree_imports_nothing(tmp_path, program, tree):
    def plant(content):
        content["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])

    refused(tmp_path, change(program, "model.json", plant), "out_spec")


def test_guards_and_notes_are_dropped(tmp_path, program):
    def plant(content):
        content["guards_code"] = [python(tmp_path)]
        nodes(content)[0]["metadata"]["stack_trace"] = f"File x\n{python(tmp_path)}\n"

    path = write_archive(tmp_path / "f.pt2", change(program, "model.json", plant).items())
    assert FeatureNetwork(path)(np.zeros((2, 8, 8, 3), np.uint8)).features.shape == (2, 6)
    assert not (tmp_path / "trace").exists()


# What is harmless is not refused


class Typical(th.nn.Module):
    """Layers and size arithmetic that a classifier has."""

    def __init__(self):
        super().__init__()
        self.body = th.nn.ModuleDict({"layer-1": th.nn.Conv2d(3, 8, 3, 2, 1), "norm": th.nn.BatchNorm2d(8)})
        self.attention = th.nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mean", th.full((3, 1, 1), 127.5))

    def forward(self, x):
        n, _, height, width = x.shape
        x = self.body["norm"](self.body["layer-1"]((x - self.mean) / 127.5)).relu()
        x = th.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        tokens = x.reshape(n, 8, -1).transpose(1, 2)
        tokens = th.nn.functional.gelu(self.attention(tokens, tokens, tokens)[0], approximate="tanh")
        scores = th.einsum("nld,nl->nd", tokens, tokens.mean(2))
        return {"features": scores, "logits": scores[:, : min(5, 3)] * (height * width // 64)}


@pytest.mark.parametrize("any_size", [False, True])
def test_typical_layers_pass(tmp_path, any_size):
    module, images = Typical().eval(), np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    x = th.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if any_size:
        dims = {0: th.export.Dim("n", min=1), 2: 8 * th.export.Dim("h", min=1, max=8),
                3: 8 * th.export.Dim("w", min=1, max=8)}  # fmt: skip
        th.export.save(th.export.export(module, (x,), dynamic_shapes=(dims,)), tmp_path / "f.pt2")
    else:
        export_module(tmp_path / "f.pt2", module, 16)
    with th.no_grad():
        expected = module(x)["features"].numpy()
    found = FeatureNetwork(str(tmp_path / "f.pt2"))(images)
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)


# TorchScript


class Writes(th.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        th.save(x, self.path)
        return x.float().flatten(1)


class MapsFile(th.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x.float().flatten(1) + th.from_file(self.path, True, 4)[0]


@pytest.mark.parametrize("module, what", [(Writes, "save"), (MapsFile, "from_file")])
def test_torchscript_that_writes_files_is_refused(tmp_path, module, what):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.jit.script(module(str(tmp_path / "trace"))).save(str(tmp_path / "f.pt"))
    with pytest.raises(UserError, match=rf"--features .*f\.pt holds more than .*\({what} in code/.*not loaded"):
        FeatureNetwork(str(tmp_path / "f.pt"))(np.zeros((2, 8, 8, 3), np.uint8))
    assert not (tmp_path / "trace").exists()


def test_python_pickles_in_torchscript_are_not_run(tmp_path):
    members = members_of(write_script(tmp_path / "whole.pt"))
    name = next(name for name in members if name.endswith("/data.pkl"))
    path = write_archive(tmp_path / "f.pt", {**members, name: pickle.dumps(Hostile(tmp_path / "trace"), 2)}.items())
    with pytest.raises(UserError, match=r"f\.pt cannot be loaded"):
        FeatureNetwork(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("spelled", ['"\\163ave"', '"sa" "ve"', "'save'", '"save"'])
def test_names_of_operators_cannot_be_spelled_out(tmp_path, spelled):
    """TorchScript reads escapes in strings and joins those that stand together."""
    members = members_of(write_script(tmp_path / "whole.pt"))
    name = next(name for name, content in members.items() if name.endswith(".py") and b"def forward" in content)
    code = members[name].decode()
    start = code.index("Tensor:\n", code.index("def forward")) + len("Tensor:\n")
    call = f'    _0 = getattr(torch, {spelled})(x, "{tmp_path / "trace"}")\n'
    path = write_archive(tmp_path / "f.pt", {**members, name: (code[:start] + call + code[start:]).encode()}.items())
    with pytest.raises(UserError, match=r"getattr of a spelled-out name|save in"):
        FeatureNetwork(path)
    assert not (tmp_path / "trace").exists()


def test_parts_of_a_sequence_are_got_by_their_numbers(tmp_path):
    nested = th.nn.Sequential(th.nn.Sequential(th.nn.Flatten(), th.nn.Linear(12, 4)), th.nn.ReLU())
    x = th.randn(2, 3, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.jit.script(nested).save(str(tmp_path / "f.pt"))
        assert any(b"getattr(" in content for content in members_of(tmp_path / "f.pt").values())
        cleaned = th.jit.load(io.BytesIO(clean_script((tmp_path / "f.pt").read_bytes(), "--features f.pt")))
        th.testing.assert_close(cleaned(x), nested(x))
