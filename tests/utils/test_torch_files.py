"""Reading files of torch.save: what is plain comes back with memory of its own, all else is one message."""

import io
import os
import pickle
import pickletools
import struct
import tarfile
import tracemalloc
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch as th

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.utils import torch_files

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])


def saved(content, zipped=True):
    buffer = io.BytesIO()
    th.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def load(data):
    return torch_files.load(io.BytesIO(data), "a.pt", map_location="cpu")


def refusal(data):
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as error:
        load(data)
    message = str(error.value)
    assert message.startswith("cannot load a.pt (") and message.isprintable() and len(message) < 400
    for word in ("torch.load", "weights_only", "PytorchStreamReader", "Unpickler", "BadZipFile"):
        assert word not in message
    return message


# What is plain


@BOTH_FORMATS
def test_tensors_numbers_and_text_come_back(zipped):
    state = {
        "step": 3,
        "names": ["a", None],
        "betas": (0.9, 0.999),
        "state": {0: {"moment": th.arange(6.0).view(2, 3)}},
    }
    found = load(saved(state, zipped))
    moment = found["state"][0].pop("moment")
    assert th.equal(moment, state["state"][0].pop("moment")) and found == state


@pytest.mark.parametrize("dtype", [*torch_files.FLOATS, *torch_files.INTEGERS, th.bool])
@BOTH_FORMATS
def test_every_type_of_a_checkpoint_comes_back(zipped, dtype):
    tensor = th.tensor([0, 1, 1]).to(dtype)
    found = load(saved({"a": tensor}, zipped))["a"]
    assert found.dtype == dtype and th.equal(found, tensor)


def test_a_module_keeps_what_torch_notes_of_its_layers():
    state_dict = th.nn.BatchNorm1d(2).state_dict()
    assert load(saved(state_dict))._metadata == state_dict._metadata


@BOTH_FORMATS
def test_no_two_tensors_share_memory(zipped):
    one = th.arange(12.0)
    held = {
        "a": one,
        "b": one,
        "part": one[3:7],
        "across": one.view(3, 4).t(),
        "p": th.nn.Parameter(one),
        "list": [one],
    }
    found = load(saved(held, zipped))
    tensors = [*(value for name, value in found.items() if name != "list"), *found["list"]]
    for tensor, before in zip(tensors, [*(value for name, value in held.items() if name != "list"), one]):
        assert th.equal(tensor, before) and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_the_tensors_of_a_mapped_file_are_the_same(tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({"a": th.arange(5.0)}))
    assert torch_files.load_mapped(str(tmp_path / "a.pt"))["a"].tolist() == [0, 1, 2, 3, 4]


# What is not


@BOTH_FORMATS
@pytest.mark.parametrize("shape", [(2,), (1000, 1000), (2**20, 2**20)])
def test_a_tensor_that_is_expanded_from_fewer_numbers_is_refused_without_its_memory(zipped, shape):
    data = saved({"state": {0: {"exp_avg": th.zeros(1).expand(shape)}}}, zipped)
    tracemalloc.start()
    assert "state.0.exp_avg of the shape" in refusal(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@BOTH_FORMATS
def test_a_tensor_that_overlaps_itself_is_refused(zipped):
    assert "memory for fewer numbers" in refusal(saved([th.as_strided(th.arange(6.0), (3, 3), (1, 1))], zipped))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: th.eye(3).to_sparse(),
        lambda: th.eye(3).to_sparse_csr(),
        lambda: th.quantize_per_tensor(th.ones(3), 0.1, 0, th.qint8),
        lambda: th.nested.nested_tensor([th.ones(2), th.ones(3)]),
        lambda: th.ones(3, dtype=th.complex64),
        lambda: th.ones(3, device="meta"),
        lambda: th.ones(3)._neg_view(),
        lambda: th.ones(3).to(th.float8_e4m3fn),
        lambda: bytearray(10),
        lambda: {1, 2},
    ],
    ids=["sparse", "csr", "quantised", "nested", "complex", "meta", "negated", "float8", "bytearray", "set"],
)
def test_what_is_not_a_plain_tensor_is_refused(make):
    assert "plain tensors" in (message := refusal(saved({"a": make()}))) or "special kind" in message


def test_many_views_of_one_memory_are_refused():
    one = th.ones(10_000)
    assert "larger than the file" in refusal(saved([one[:] for _ in range(1000)]))


def nested(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


def branching(depth):
    inner = []
    for _ in range(depth):
        inner = [inner] * 10
    return inner


def holding_itself():
    inner = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize("content", [nested(200), holding_itself(), {("a",): 1}, 2**70, {"a": {2.5: 1}}])
def test_other_structures_than_dicts_and_lists_of_numbers_are_refused(content):
    refusal(saved(content))


def test_lists_that_multiply_each_other_have_an_end(monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_OBJECTS", 10**4)
    assert "too many objects" in refusal(saved(branching(20)))


def rewritten(data, compression=zipfile.ZIP_STORED, **more):
    """The archive with other members, or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w", compression) as archive:
        for info in before.infolist():
            archive.writestr(info.filename, more.pop(info.filename.rpartition("/")[2], None) or before.read(info))
    return buffer.getvalue()


def test_an_archive_that_is_stored_anew_loads():
    assert th.equal(load(rewritten(saved({"a": th.arange(9)})))["a"], th.arange(9))


def test_a_compressed_archive_is_refused():
    for tensor in (th.zeros(10**6), th.rand(10**4)):
        assert "compressed" in refusal(rewritten(saved({"a": tensor}), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL", "Data.pkl", "data/0", "Data/0"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_parts_of_one_name_is_refused(name, first):
    data = saved({"a": th.zeros(3)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w") as archive:
        parts = [(info.filename, before.read(info)) for info in before.infolist()]
        for part in [("archive/" + name, b"}."), *parts] if first else [*parts, ("archive/" + name, b"}.")]:
            archive.writestr(*part)
    assert "there twice" in refusal(buffer.getvalue())


def test_an_archive_with_two_directories_is_refused():
    data, other = saved({"a": th.zeros(3)}), saved({"a": th.ones(3)})
    stored, hidden = rewritten(data), rewritten(other)
    for forged in (
        other + data,
        hidden + stored,
        data + b"\0" * 30,
        data[:-2] + b"\x05\0after",
        stored[:-22] + bytes(20) + stored[-22:],
        data[:-42] + bytes(20) + data[-22:],
        data[:-34] + (0).to_bytes(8, "little") + data[-26:],
        data[:-98] + bytes(56) + data[-42:],
    ):
        assert "damaged" in refusal(forged)


def test_an_archive_that_names_fewer_parts_than_it_lists_is_refused():
    data = rewritten(saved({"a": th.zeros(3)}))
    count = data[-12:-10]
    assert "directory" in refusal(
        data[:-14] + (int.from_bytes(count, "little") - 1).to_bytes(2, "little") * 2 + data[-10:]
    )


def test_a_tensor_that_claims_more_than_its_member_is_refused():
    data = saved({"a": th.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    claimed = b"J" + struct.pack("<i", 10**5)
    forged = pickled.replace(b"K\x04t", claimed + b"t").replace(b"K\x04\x85", claimed + b"\x85")
    assert forged.count(claimed) == 2
    refusal(rewritten(data, **{"data.pkl": forged}))


# Pickles that take torch long, or leave memory as it was


def stored_pickle(pickled):
    return rewritten(saved({}), **{"data.pkl": b"\x80\x02" + pickled + b"."})


def memo(i):
    return b"r" + struct.pack("<I", i)


def recall(i):
    return b"j" + struct.pack("<I", i)


# A tuple of a tuple twice, of a tuple twice, ... : its hash takes 2**40 steps.
DEEP = b")" + memo(100) + b"".join(2 * recall(i) + b"\x86" + memo(i + 1) for i in range(100, 140))
TUPLE = recall(140)


def whole(number):
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


ORDERED, COUNTER = b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n"
LONG_LIST = b"](" + b"](X\1\0\0\0aNe" * 10**4 + b"eq\0"
LONG_DICT = b"}(" + b"".join(whole(i) + b"N" for i in range(10**4)) + b"uq\0"


@pytest.mark.parametrize(
    "pickled",
    [
        DEEP + b"}" + TUPLE + b"Ns",
        DEEP + b"}(" + TUPLE + b"Nu",
        DEEP + ORDERED + b")R" + TUPLE + b"Ns",
        DEEP + ORDERED + b"]" + TUPLE + b"N\x86a\x85R",
        DEEP + COUNTER + b"]" + TUPLE + b"a\x85R",
        DEEP + ORDERED + b")R]" + TUPLE + b"N\x86ab",
        DEEP + b"(X\7\0\0\0storagectorch\nFloatStorage\n" + TUPLE + b"X\3\0\0\0cpuK\1tQ",
        DEEP + TUPLE + b"Q",
        b"}(" + b"".join(whole(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u",
        b"}" + b"".join(whole(i * 2**40) + b"Ns" for i in range(1, 20_000)),
        b"]" + LONG_LIST + (ORDERED + b"h\0\x85Ra") * 10**4,
        b"]" + LONG_DICT + (ORDERED + b")Rh\0ba") * 10**4,
        b"]" + LONG_DICT + (COUNTER + b"h\0\x85Ra") * 10**4,
        b"N" + memo(2**32 - 1),
    ],
    ids=["key", "keys", "ordered key", "ordered", "counter", "attributes", "storage", "persistent", "hashes",
         "large", "calls", "builds", "counters", "memo"],
)  # fmt: skip
def test_a_pickle_that_would_take_torch_hours_is_refused_before_it_reads_it(pickled, monkeypatch):
    monkeypatch.setattr(th, "load", lambda *args, **kwargs: pytest.fail("torch reads it"))
    refusal(stored_pickle(pickled))


def test_keys_of_whole_numbers_load():
    for keys in (range(5000), [140_000_000_000_000 + 64 * i for i in range(1000)], [-1, -2, 0]):
        assert load(saved({"state": dict.fromkeys(keys, 1.5)})) == {"state": dict.fromkeys(keys, 1.5)}


def test_dicts_of_every_kind_load():
    dicts = {"ordered": OrderedDict(a=1, b=th.ones(2)), "counter": Counter("aab"), "plain": {"a": {0: ()}}}
    found = load(saved(dicts))
    assert (
        found["counter"] == {"a": 2, "b": 1}
        and list(found["ordered"]) == ["a", "b"]
        and found["plain"] == {"a": {0: ()}}
    )
    python2 = ORDERED + b"](" + b"](U\1aK\1e" + b"](U\1bK\2e" + b"e\x85R"
    assert load(stored_pickle(python2)) == {"a": 1, "b": 2}


def pickles_of_old(data):
    """The five pickles of a file from before torch 1.6, and what follows."""
    f, parts = io.BytesIO(data), []
    for _ in range(5):
        start = f.tell()
        for _ in pickletools.genops(f):
            pass
        parts.append(data[start : f.tell()])
    return parts, data[f.tell() :]


@pytest.mark.parametrize("kept", [(), (0,), (0, 0), (0, 1, 1), (1, 0, 0), (1, 2)])
def test_an_old_file_without_the_numbers_of_a_tensor_is_refused(kept):
    parts, numbers = pickles_of_old(saved({name: th.full((2,), 0.5) for name in "abc"}, zipped=False))
    keys, size = pickle.loads(parts[4]), len(numbers) // 3
    forged = b"".join(
        [*parts[:4], pickle.dumps([keys[i] for i in kept], 2), *(numbers[size * i :][:size] for i in kept)]
    )
    assert "numbers of all" in refusal(forged)


def test_the_order_of_an_old_files_storages_does_not_matter():
    parts, numbers = pickles_of_old(saved({"a": th.zeros(2), "b": th.ones(2), "c": th.ones(0)}, zipped=False))
    assert load(b"".join([*parts, numbers]))["b"].tolist() == [1, 1]
    keys = pickle.loads(parts[4])
    chunks, rest = [], numbers
    for _ in keys:
        length = 8 + 4 * int.from_bytes(rest[:8], "little")
        chunks.append(rest[:length])
        rest = rest[length:]
    back = load(b"".join([*parts[:4], pickle.dumps(keys[::-1], 2), *chunks[::-1]]))
    assert back["a"].tolist() == [0, 0] and back["b"].tolist() == [1, 1] and back["c"].numel() == 0


@pytest.mark.parametrize("part", [0, 1])
def test_an_old_file_with_another_magic_number_or_version_is_refused(part):
    parts, numbers = pickles_of_old(saved({"a": th.zeros(2)}, zipped=False))
    parts[part] = b"\x80\x02" + DEEP + b"."
    refusal(b"".join([*parts, numbers]))


def test_of_a_large_file_of_something_else_little_is_read(tmp_path):
    path = tmp_path / "film.pt"
    path.write_bytes(b"\0\0\0\x20ftypisom")
    os.truncate(path, 2**40)  # takes no space on the disk
    with pytest.raises(UserError, match=r"film\.pt.*not a checkpoint"):
        distributed.load_state_dict(str(path))


# Files of something else


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros(3))
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return buffer.getvalue()


def a_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    th.jit.save(th.jit.script(th.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def exported():
    buffer = io.BytesIO()
    th.export.save(th.export.export(th.nn.Linear(2, 2), (th.ones(1, 2),)), buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, culprit",
    [
        (lambda: b"", "empty"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
        (lambda: b"\xff\xd8\xff" + bytes(100), "JPEG"),
        (lambda: b"\n<!DOCTYPE html><title>Log in</title>", "web page"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (lambda: "läuft\n".encode(), "not a checkpoint"),
        (lambda: b"a text", "text file"),
        (lambda: b'{"a": 1}', "text file"),
        (lambda: struct.pack("<Q", 2) + b"{}", "safetensors"),
        (lambda: pickle.dumps({"a": 1}), "pickle"),
        (lambda: pickle.dumps({"ema": "torch_utils.persistence"}), "EDM"),
        (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (lambda: b"\x1f\x8b" + bytes(9), "gzip"),
        (npz, "npz"),
        (tar, "tar"),
        (a_zip, "zip"),
        (torchscript, "TorchScript"),
        (exported, "exported program"),
    ],
)
def test_a_file_of_something_else_is_named(make, culprit):
    message = refusal(make())
    assert culprit in message and "not a checkpoint" in message


@BOTH_FORMATS
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_one_message(zipped, share):
    data = saved({"a": th.arange(300.0)}, zipped)
    assert "damaged" in refusal(data[: int(share * len(data))])


@BOTH_FORMATS
def test_a_file_with_another_byte_loads_or_is_one_message(zipped):
    data = saved({"a": th.arange(3.0), "b": [1, "x"]}, zipped)
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        try:
            load(bytes(changed))
        except UserError as error:
            assert str(error).startswith("cannot load a.pt (") and len(str(error)) < 500
