"""Unpickling without the classes that a file names: nothing of it runs, its tensors come out."""

import argparse
import builtins
import collections
import copyreg
import enum
import functools
import io
import pathlib
import pickle
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch as th

from improved_diffusion.config import UserError
from improved_diffusion.utils import stand_ins, torch_files

WEIGHTS = {"a": th.arange(6.0).view(2, 3), "b": th.ones(2, dtype=th.float16)}


def saved(content, **options):
    buffer = io.BytesIO()
    th.save(content, buffer, **options)
    return buffer.getvalue()


def load(data):
    return torch_files.load_tensors(io.BytesIO(data), "a.ckpt")


def assert_weights(found):
    assert found.keys() == WEIGHTS.keys() and all(th.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


class Colour(enum.Enum):
    RED = 1


class Attributes(dict):
    """Like the dicts with attributes of other programs."""


class Slotted:
    __slots__ = ("weights",)


class Hashed:
    def __hash__(self):
        return 1


def attributes():
    held = Attributes(name="x")
    held.extra = 3
    return held


def slotted():
    held = Slotted()
    held.weights = 3
    return held


OTHERS = {
    "argparse.Namespace": argparse.Namespace(lr=1e-4, parts=[argparse.Namespace()]),
    "numpy scalar": np.float64(3),
    "numpy array": np.arange(3),
    "dtype": np.dtype("float32"),
    "path": pathlib.PurePosixPath("a/b"),
    "enum": Colour.RED,
    "dict subclass": attributes(),
    "slots": slotted(),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2]),
    "counter": collections.Counter("aab"),
    "partial": functools.partial(int, base=2),
    "set": {1, 2},
    "bytes": b"abc",
    "class": Colour,
    "function": th.nn.functional.relu,
    "complex": 1j,
    "key": {Hashed(): 1, ("a", 1): 2, 2.5: 3},
    "tensor": th.ones(1),
    "sparse": th.eye(3).to_sparse(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_tensors_come_out_from_beside_any_object(other):
    content = {"hyper_parameters": other, "state_dict": WEIGHTS, "list": [other, th.ones(1)]}
    found, _ = load(saved(content))
    assert_weights(found["state_dict"])
    assert found.keys() == ({"state_dict", "hyper_parameters"} if other is OTHERS["tensor"] else {"state_dict"})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read_and_what_was_left_out_is_named(protocol):
    content = {"args": argparse.Namespace(a=1), "value": np.float32(2), "w": WEIGHTS, "d": collections.OrderedDict(a=1)}
    found, left_out = load(saved(content, pickle_protocol=protocol))
    assert_weights(found["w"])
    assert "argparse.Namespace" in left_out and "numpy scalar" in left_out and "OrderedDict" not in left_out


def test_objects_that_hold_tensors_are_opened_by_the_names_in_them():
    held = Attributes(state=WEIGHTS)
    held.more = WEIGHTS
    found, _ = load(saved({"a": held, "args": argparse.Namespace(net=WEIGHTS)}))
    for each in (found["a"]["state"], found["a"]["more"], found["args"]["net"]):
        assert_weights(each)


def make_module():
    th.manual_seed(0)
    inner = th.nn.Sequential(th.nn.Conv2d(1, 2, 3), th.nn.BatchNorm2d(2))
    inner.register_buffer("table", th.ones(3), persistent=False)
    return th.nn.Sequential(inner, th.nn.Linear(2, 2, bias=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"ema": module}])
def test_a_whole_module_is_its_state_dict(wrap):
    module = make_module()
    found, left_out = load(saved(wrap(module)))
    found = found.get("ema", found)
    expected = module.state_dict()
    assert found.keys() == expected.keys() and all(th.equal(found[name], expected[name]) for name in expected)
    assert "Sequential" in left_out


def test_a_class_that_is_not_installed_is_not_needed(monkeypatch):
    module = types.ModuleType("some_framework")
    module.Config = type("Config", (), {"__module__": "some_framework"})
    monkeypatch.setitem(sys.modules, "some_framework", module)
    data = saved({"config": module.Config(), "state_dict": WEIGHTS})
    monkeypatch.delitem(sys.modules, "some_framework")
    found, left_out = load(data)
    assert_weights(found["state_dict"])
    assert left_out == "some_framework.Config"


def test_tensors_are_copies_with_plain_memory():
    one = th.arange(12.0)
    held = {"a": one[3:7], "b": one, "p": th.nn.Parameter(one.view(3, 4).t()), "args": argparse.Namespace()}
    found, _ = load(saved(held))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in held.items() if name != "args"
    }
    assert all(type(t) is th.Tensor and t.untyped_storage().nbytes() == 4 * t.numel() for t in found.values())


# Hostile files


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Reduced:
    """Pickled as (a callable, its arguments, ...)."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def zip_of(pickled):
    """A file of torch.save whose pickle is this one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as before, zipfile.ZipFile(buffer, "w") as archive:
        for info in before.infolist():
            archive.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else before.read(info))
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_called(tmp_path, protocol):
    marks = [tmp_path / f"mark{i}" for i in range(6)]
    hostile = {
        "a": Runs(pathlib.Path.touch, marks[0]),
        "b": Runs(exec, f"open({str(marks[1])!r}, 'w')"),
        "c": Runs(builtins.open, str(marks[2]), "w"),
        "d": Runs(getattr(sys.modules["os"], "system"), f"touch {marks[3]}"),  # noqa: B009
        "e": Runs(th.save, {}, str(marks[4])),
        "f": Runs(functools.partial(open, str(marks[5]), "w")),
        "state_dict": WEIGHTS,
    }
    data = saved(hostile, pickle_protocol=protocol)
    for path in marks:  # pickling has none of these made
        assert not path.exists()
    found, left_out = load(data)
    assert_weights(found["state_dict"])
    assert "builtins.exec" in left_out or "exec" in left_out
    with pytest.raises(UserError, match="plain tensors"):
        torch_files.load(io.BytesIO(data), "a.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", [argparse.Namespace(a=1), np.float32(1), make_module()])
def test_a_file_from_before_torch_1_6_with_other_objects_is_refused(other):
    with pytest.raises(UserError, match=r"before 1\.6"):
        load(saved({"other": other, "state_dict": WEIGHTS}, _use_new_zipfile_serialization=False))
    found, _ = load(saved({"state_dict": WEIGHTS}, _use_new_zipfile_serialization=False))
    assert_weights(found["state_dict"])


def test_what_a_file_writes_onto_classes_stays_in_its_own_load():
    """The pickle sets attributes of what it names, as BUILD with slots does."""
    before = {name: vars(collections.OrderedDict).get(name) for name in ("items", "__setitem__")}
    torch_before = th._utils._rebuild_tensor_v2.__defaults__
    for module, name in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("os", "path")):
        pickled = f"c{module}\n{name}\n".encode() + b"(N}(X\x05\x00\x00\x00itemsK\x01utb."
        try:
            load(zip_of(b"\x80\x02" + pickled))
        except UserError as error:
            assert "a.ckpt" in str(error)
    assert {name: vars(collections.OrderedDict).get(name) for name in before} == before
    assert th._utils._rebuild_tensor_v2.__defaults__ == torch_before and not hasattr(
        th._utils._rebuild_tensor_v2, "items"
    )


HUGE_MEMO = b"\x80\x02}r\xff\xff\xff\xff."
DEEP = b"\x80\x02" + b"(" * 10**5 + b"l" * 10**5 + b"."


def forked(depth):
    held = {"w": th.ones(1)}
    for _ in range(depth):
        held = {"a": held, "b": held}
    return saved({"args": argparse.Namespace(), "held": held})


@pytest.mark.parametrize(
    "make, culprit",
    [
        (lambda: zip_of(HUGE_MEMO), "too many objects"),
        (lambda: zip_of(b"\x80\x02c" + b"a\nb\0c\n."), None),
        (lambda: zip_of(b"\x80\x02N."), None),
        (lambda: zip_of(DEEP), None),
        (lambda: zip_of(b"\x80\x02\x82\x01."), None),
        (lambda: zip_of(b"\x80\x02}(X\x01\x00\x00\x00au."), "damaged"),
        (lambda: saved({"a": Reduced(th.Size, (th.zeros(1).expand(2**40),))}), "damaged"),
        (lambda: zip_of(b"cos\nsystem\n(S'x'\ntR."), None),
        (lambda: pickle.dumps(WEIGHTS), "pickle of another program"),
        (lambda: saved(WEIGHTS)[:200], "damaged"),
        (lambda: b"", "empty"),
        (lambda: forked(39), "too many objects"),
    ],
)
def test_bad_files_are_one_error_or_hold_nothing(make, culprit):
    if culprit is None:
        assert load(make())[0] == {}
    else:
        with pytest.raises(UserError, match=culprit) as error:
            load(make())
        assert str(error.value).startswith("cannot load a.ckpt (") and str(error.value).isprintable()


def test_a_dict_that_holds_itself_is_left_out_of_itself():
    held = {"w": WEIGHTS, "args": argparse.Namespace()}
    held["self"] = held
    found, _ = load(saved(held))
    assert_weights(found["w"])


def test_a_tar_archive_under_the_old_format_is_not_unpacked(tmp_path, monkeypatch):
    """Before torch 0.1.10 files were tar archives, whose first bytes are a name that may be any."""
    monkeypatch.chdir(tmp_path)
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    info = tarfile.TarInfo("x")
    info.name = magic.decode("latin1")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin1") as archive:
        archive.addfile(info)
    assert buffer.getvalue().startswith(magic)
    with pytest.raises(UserError, match=r"a\.ckpt"):
        load(buffer.getvalue())
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_expanded_from_fewer_numbers_is_refused():
    with pytest.raises(UserError, match="of the shape"):
        load(saved({"a": th.zeros(1).expand(2**20, 2**20), "b": argparse.Namespace()}))


def test_registered_codes_are_not_looked_up():
    copyreg.add_extension("builtins", "exec", 200)
    try:
        found, _ = load(zip_of(b"\x80\x02" + b"\x82\xc8" + b"X\x01\x00\x00\x001\x85R."))
    finally:
        copyreg.remove_extension("builtins", "exec", 200)
    assert found == {}


# Small files that ask for much work


def nested(depth):
    """A tuple of which hashing takes 2**depth steps."""
    held = ()
    for _ in range(depth):
        held = (held, held)
    return held


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns"), (b"}(", b"Nu"), (b"(", b"Nd"), (b"\x8f(", b"\x90"), (b"(", b"\x91"),
        (b"c__builtin__\nset\n]", b"a\x85R"), (b"ccollections\nOrderedDict\n]", b"N\x86a\x85R"),
    ],
)  # fmt: skip
def test_keys_that_are_not_text_are_left_out_unhashed(before, after):
    assert load(zip_of(b"\x80\x04" + before + pickle.dumps(nested(99), 2)[2:-1] + after + b"."))[0] == {}


def test_the_key_of_a_storage_is_text():
    before, after = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n", b"X\x03\x00\x00\x00cpuK\x01tQ."
    with pytest.raises(UserError, match="damaged"):
        load(zip_of(b"\x80\x02" + before + pickle.dumps(nested(99), 2)[2:-1] + after))


class Other:
    pass


LIST, DICT, TUPLE = ["x"] * 100, dict.fromkeys(map(str, range(100)), 1), ("x",) * 100
MUCH_WORK = {
    "sizes of one list": lambda: Reduced(th.Size, (LIST,)),
    "sets of one list": lambda: Reduced(set, (LIST,)),
    "ordered dicts of one dict": lambda: Reduced(collections.OrderedDict, (DICT,)),
    "the same arguments": lambda: Reduced(Other, TUPLE),
    "one state": lambda: Reduced(Other, (), DICT),
    "one state in slots": lambda: Reduced(Other, (), (None, DICT)),
    "one state of dicts": lambda: Reduced(collections.OrderedDict, (), DICT),
    "through a subclass": lambda: Reduced(th._tensor._rebuild_from_type_v2, (th.Size, None, (LIST,), None)),
}


@pytest.mark.parametrize("make", MUCH_WORK.values(), ids=MUCH_WORK)
def test_a_pickle_that_makes_far_more_than_it_holds_is_refused(monkeypatch, make):
    data = saved([make() for _ in range(100)])
    assert len(data) < 10_000 and load(data)[0] == {}
    monkeypatch.setattr(stand_ins, "MAX_OBJECTS", 5000)
    with pytest.raises(UserError, match="too many objects"):
        load(data)


@pytest.mark.parametrize("each", [b"ca\nB\n)R", b"ca\nB\n)\x81", b"(ia\nB\n", b"(ca\nB\no", b"\x8f", b"(\x91"])
def test_objects_of_a_few_bytes_are_counted(monkeypatch, each):
    data = zip_of(b"\x80\x04](" + each * 200 + b"e.")
    assert load(data)[0] == {}
    monkeypatch.setattr(stand_ins, "MAX_OBJECTS", 100)
    with pytest.raises(UserError, match="too many objects"):
        load(data)


@pytest.mark.parametrize("made", [b"ca\nB\n)R", b"ca\nB\n)\x81", b"ca\nB\n)}\x92", b"(K\x01ia\nB\n", b"(ca\nB\nK\x01o"])
def test_objects_made_in_any_way_hold_what_they_are_given(made):
    weights = pickle.dumps({"a": 1}, 2)[2:-1]
    found = stand_ins.load(io.BytesIO(b"\x80\x04]" + made + weights + b"ba."))
    assert found == [{"a": 1}] and isinstance(found[0], stand_ins.StandIn)


def module_of(parameters=(), modules=(), passing=frozenset()):
    state = dict(_parameters=dict(parameters), _buffers={}, _modules=dict(modules), _non_persistent_buffers_set=passing)
    return Reduced(Other, (), state)


def test_modules_around_one_other_are_refused(monkeypatch):
    shared = module_of({str(i): th.ones(1) for i in range(30)})
    data = saved({str(i): module_of(modules={"a": shared}) for i in range(30)})
    assert len(load(data)[0]) == 30
    monkeypatch.setattr(stand_ins, "MAX_OBJECTS", 500)  # with fewer it is refused when it is read
    with pytest.raises(UserError, match="too many objects"):
        load(data)


def test_a_module_with_very_long_names_is_refused():
    module = module_of({"w": th.ones(1)})
    for _ in range(20):
        module = module_of(modules={"x" * 20: module})
    with pytest.raises(UserError, match="too many objects"):
        load(saved(module))


def test_buffers_that_a_list_leaves_out_are_not_looked_for_in_it():
    found, _ = load(saved(module_of({"a": th.ones(1)}, passing=["a"])))
    assert list(found) == ["a"]
