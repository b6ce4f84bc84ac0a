"""Files that survive a crash and describe themselves."""

import errno
import io
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch as th
from torch import nn

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError
from improved_diffusion.utils import files

METADATA = {"config": {"lr": 1e-4, "name": "ä"}, "class_names": ["cat", "dog"], "step": 7}


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def saved(tmp_path):
    path, model = tmp_path / "model000007.pt", network()
    checkpoint.save_state_dict(model.state_dict(), str(path), METADATA)
    return path, model


def assert_same(state_dict, other):
    assert list(state_dict) == list(other)
    for name in state_dict:
        th.testing.assert_close(state_dict[name], other[name], rtol=0, atol=0)


# Format


@pytest.mark.parametrize("weights_only", [True, False])
def test_published_code_loads_our_files(saved, weights_only):
    path, model = saved
    state_dict = th.load(path, map_location="cpu", weights_only=weights_only)
    assert isinstance(state_dict, OrderedDict) and all(isinstance(v, th.Tensor) for v in state_dict.values())
    other = network()
    other.load_state_dict(state_dict)
    assert_same(other.state_dict(), model.state_dict())


def test_description_survives_weights_only_and_what_torch_keeps_is_kept(saved):
    state_dict = th.load(saved[0], weights_only=True)
    assert checkpoint.METADATA_KEY in state_dict._metadata
    assert state_dict._metadata["1"] == {"version": 2}  # BatchNorm's own


def test_load_gives_the_tensors_and_the_description(saved):
    path, model = saved
    state_dict, metadata = checkpoint.load(str(path))
    assert metadata == METADATA
    assert_same(state_dict, model.state_dict())


def test_saving_leaves_the_given_state_dict_as_it_was(tmp_path):
    state_dict = network().state_dict()
    before = dict(state_dict._metadata)
    checkpoint.save_state_dict(state_dict, str(tmp_path / "a.pt"), METADATA)
    assert dict(state_dict._metadata) == before


def test_a_foreign_file_has_no_description(tmp_path):
    model = network()
    th.save(model.state_dict(), tmp_path / "a.pt")
    th.save(dict(model.state_dict()), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        state_dict, metadata = checkpoint.load(str(tmp_path / name))
        assert metadata == {}
        assert_same(state_dict, model.state_dict())


def test_a_file_of_the_older_torch_format_is_read(tmp_path):
    model = network()
    th.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(checkpoint.load(str(tmp_path / "old.pt"))[0], model.state_dict())


# Damaged and hostile files


def one_message(path):
    """The message of the one UserError that loading gives."""
    with pytest.raises(UserError) as error:
        checkpoint.load(str(path))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_one_error(saved, share):
    path, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert ("damaged" if share else "empty") in one_message(path)


@pytest.mark.parametrize("cut", [1, 22, 100])
def test_a_file_whose_end_is_missing_is_one_error(saved, cut):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-cut])
    assert "damaged" in one_message(path)


def test_a_flipped_bit_is_one_error(saved):
    path, _ = saved
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    data[entry.header_offset + 30 + len(entry.filename) + 80] ^= 0xFF
    path.write_bytes(data)
    one_message(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}"])
def test_a_file_of_something_else_is_one_error(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    one_message(tmp_path / "x.pt")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "inside a state dict"])
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(tmp_path, kind):
    target, path = tmp_path / "harm", tmp_path / "model000000.pt"
    hostile = Hostile(str(target))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        th.save(hostile if kind == "torch" else {**network().state_dict(), "x": hostile}, path)
    message = one_message(path)
    assert not target.exists()
    if kind != "pickle":
        assert "could run code" in message


@pytest.mark.parametrize("content", [th.zeros(3), [1, 2], {"a": 1}, {"generator": {"w": th.zeros(2)}}, 5])
def test_a_file_that_is_no_state_dict_is_one_error(tmp_path, content):
    th.save(content, tmp_path / "x.pt")
    assert "not a model's state dict" in one_message(tmp_path / "x.pt")


@pytest.mark.parametrize("entry", [{"json": "{"}, {"json": 3}, {"json": "[1]"}, {"json": '{"config": 5}'}, "text"])
def test_a_damaged_description_is_one_error(tmp_path, entry):
    state_dict = network().state_dict()
    state_dict._metadata[checkpoint.METADATA_KEY] = entry
    th.save(state_dict, tmp_path / "x.pt")
    assert "damaged description" in one_message(tmp_path / "x.pt")


def test_a_missing_file_and_a_folder_are_one_error(tmp_path):
    assert "No such file" in one_message(tmp_path / "nowhere.pt")
    one_message(tmp_path)


# Fitting a model


def test_a_state_dict_that_does_not_fit_names_the_first_difference():
    model = nn.Sequential(nn.Linear(3, 4))
    good = model.state_dict()
    checkpoint.load_into(model, good, "a.pt")
    cases = {
        r"a\.pt.*lacks 0\.bias": {"0.weight": good["0.weight"]},
        r"a\.pt.*has, and the model lacks, 1\.weight": {**good, "1.weight": th.zeros(1)},
        r"a\.pt.*0\.weight is \(4, 2\) there and \(4, 3\) in the model": {**good, "0.weight": th.zeros(4, 2)},
    }
    for message, state_dict in cases.items():
        with pytest.raises(UserError, match=message):
            checkpoint.load_into(model, state_dict, "a.pt")


# Writing


class FullDisk(io.FileIO):
    """A file that a full disk stops half way."""

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_leaves_the_older_file_whole(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(str(path), mode.replace("b", "")), raising=False)
    with pytest.raises(UserError, match=r"cannot write .*model000007\.pt.*No space left.*untouched"):
        checkpoint.save_state_dict(network().state_dict(), str(path), METADATA)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]  # and nothing lies about


def test_a_crash_before_the_rename_leaves_the_older_file_whole(saved, monkeypatch):
    path, model = saved

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state_dict(network().state_dict(), str(path), METADATA)
    assert_same(checkpoint.load(str(path))[0], model.state_dict())
    assert [name for name in os.listdir(path.parent) if name.endswith(".pt")] == [path.name]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere.*--out_dir"):
        checkpoint.save({}, str(tmp_path / "nowhere" / "x.pt"))


def test_files_replace_each_other(tmp_path):
    path = tmp_path / "x"
    for durable in (True, False):
        for data in (b"one", b"two", b""):
            files.write_bytes(path, data, durable=durable)
            assert files.read_bytes(path) == data and os.listdir(tmp_path) == ["x"]


# Names


def test_names_are_the_published_ones():
    assert checkpoint.model_name(0) == "model000000.pt" and checkpoint.model_name(1234567) == "model1234567.pt"
    assert checkpoint.ema_name(0.9999, 50) == checkpoint.ema_name("0.9999", 50) == "ema_0.9999_000050.pt"
    assert checkpoint.optimizer_name(50) == "opt000050.pt"


@pytest.mark.parametrize(
    "path, step",
    [("runs/a/model000050.pt", 50), ("model1234567.pt", 1234567), ("gs://bucket/model000003.pt", 3), ("model7", 7),
     ("runs/model000050/ema_0.9999_000060.pt", 0), ("weights.pt", 0), ("", 0), ("model.pt", 0)],
)  # fmt: skip
def test_step_is_read_off_the_file_name(path, step):
    assert checkpoint.parse_resume_step_from_filename(path) == step


def test_a_missing_part_of_a_set_is_named(saved):
    path, _ = saved
    assert checkpoint.find_in_set(str(path), path.name, "the model") == str(path)
    with pytest.raises(UserError, match=r"model000007\.pt.*the optimizer's state .*opt000007\.pt is missing.*--init"):
        checkpoint.find_in_set(str(path), "opt000007.pt", "the optimizer's state")
