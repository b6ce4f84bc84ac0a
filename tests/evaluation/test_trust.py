"""Which feature programs are loaded: pinned ones and those that the user allowed, by their content."""

import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from feature_helpers import write_script
from script_helpers import call, refused, write_images

from improved_diffusion.config import UserError
from improved_diffusion.evaluation import features, trust
from improved_diffusion.evaluation.features import FeatureNetwork
from improved_diffusion.logs import logger
from improved_diffusion.utils import files

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def nothing_trusted(tmp_path, monkeypatch):
    """A user who has allowed nothing yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program that another user made."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
        return write_script(tmp_path / "f.pt")


@pytest.fixture
def log(tmp_path):
    """What is logged."""
    logger.configure(dir=str(tmp_path / "log"), format_strs=["log"])
    return tmp_path / "log/log.txt"


class Hostile:
    """What makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def write_hostile(path, trace):
    """An exported program whose sample inputs run code when torch loads it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/models/model.json", "{}")
        archive.writestr("f/data/sample_inputs/model.pt", pickle.dumps(Hostile(trace)))
        archive.writestr("f/archive_format", "pt2")
    return str(path)


class Writes(th.nn.Module):
    """TorchScript that writes a file when it runs."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        th.save(x, self.path)
        return x.float().flatten(1)


def test_a_program_that_is_not_known_is_refused_before_anything_of_it_is_read(tmp_path, monkeypatch):
    path = write_hostile(tmp_path / "f.pt2", tmp_path / "trace")
    for reader in ("zipfile.ZipFile", "torch.export.load", "torch.jit.load", "torch.load"):
        monkeypatch.setattr(reader, lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(UserError) as caught:
        FeatureNetwork(path)
    for part in (f"--features {path} was not loaded", files.sha256(path), "can run any code", "--trust_features"):
        assert part in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_torchscript_that_writes_files_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.jit.script(Writes(str(tmp_path / "trace"))).save(str(tmp_path / "f.pt"))
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(str(tmp_path / "f.pt"))(IMAGES)
    assert not (tmp_path / "trace").exists()


def test_the_flag_allows_that_content_under_any_name_from_then_on_and_says_so(program, tmp_path, log):
    first = FeatureNetwork(program, trust=True)(IMAGES)
    assert f"trusting {program} (SHA-256 {files.sha256(program)})" in log.read_text()
    copy = shutil.copy(program, tmp_path / "copy.pt")
    np.testing.assert_array_equal(FeatureNetwork(str(copy))(IMAGES).features, first.features)
    before = trust.trusted_list().read_bytes()
    FeatureNetwork(program, trust=True)
    assert trust.trusted_list().read_bytes() == before  # it is remembered once


def test_content_that_changed_after_it_was_allowed_is_refused(program):
    FeatureNetwork(program, trust=True)
    with open(program, "ab") as f:
        f.write(b"\0")
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(program)


def test_each_program_is_allowed_by_itself(program, tmp_path):
    FeatureNetwork(program, trust=True)
    other = write_hostile(tmp_path / "logits.pt2", tmp_path / "trace")
    with pytest.raises(UserError, match=r"--logits .*logits\.pt2 was not loaded"):
        FeatureNetwork(program, logits=other)


def test_a_note_that_comes_with_a_program_allows_nothing(program):
    Path(f"{program}.trusted").write_text(files.sha256(program))
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(program)


def test_pinned_content_needs_no_flag(program, monkeypatch):
    monkeypatch.setattr(trust, "PINNED", {files.sha256(program)})
    FeatureNetwork(program)
    assert not trust.trusted_list().exists()


def test_a_download_is_refused_by_its_url_and_by_what_it_holds_now(program, tmp_path, monkeypatch):
    url = "https://nowhere.invalid/f.pt"
    monkeypatch.setattr(features, "fetch", lambda *args: str(program))
    with pytest.raises(UserError, match=rf"--features {url} \(.*f\.pt\) was not loaded"):
        FeatureNetwork(url)
    FeatureNetwork(url, trust=True)
    FeatureNetwork(url)
    write_hostile(program, tmp_path / "trace")
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(url)
    Path(program).write_text("<html>log in</html>")
    with pytest.raises(UserError, match=rf"remove {program} and {program}\.sha256 to download it again"):
        FeatureNetwork(url, trust=True)


def test_a_list_that_cannot_be_written_is_a_warning(program, tmp_path, log):
    (tmp_path / "config").write_text("in the way")
    FeatureNetwork(program, trust=True)
    assert "is trusted for this run only" in log.read_text()
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(program)


def both_kinds(path, trace):
    """An archive with the parts of TorchScript and of an exported program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.jit.script(Writes(str(trace))).save(str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("f/models/model.json", "{}")
        archive.writestr("f/data/sample_inputs/model.pt", pickle.dumps(Hostile(trace)))
    return str(path)


def checkpoint(path, trace):
    """A checkpoint whose pickle runs code."""
    th.save({"a": Hostile(trace)}, path)
    return str(path)


@pytest.mark.parametrize("make", [both_kinds, checkpoint, write_hostile])
@pytest.mark.parametrize("name", ["f.pt", "f.pt2", "f.zip", "f"])
def test_no_name_and_no_mixture_makes_a_program_known(tmp_path, make, name):
    path = make(tmp_path / name, tmp_path / "trace")
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(path)
    assert not (tmp_path / "trace").exists()


def test_a_link_is_what_it_points_to_now(program, tmp_path):
    link = tmp_path / "link.pt"
    link.symlink_to(program)
    FeatureNetwork(str(link), trust=True)
    FeatureNetwork(str(program))
    link.unlink()
    link.symlink_to(write_hostile(tmp_path / "other.pt2", tmp_path / "trace"))
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(str(link))
    assert not (tmp_path / "trace").exists()


def test_two_files_of_one_name_are_two(program, tmp_path):
    FeatureNetwork(program, trust=True)
    (tmp_path / "other").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(write_hostile(tmp_path / "other" / Path(program).name, tmp_path / "trace"))


@pytest.mark.parametrize("damage", [b"\xff" * 99, b"\n\n", b"\0" * 99, b"*", b"x" * 10**6])
def test_a_damaged_list_allows_nothing_and_keeps_working(program, damage):
    trust.trusted_list().parent.mkdir(parents=True)
    trust.trusted_list().write_bytes(damage)
    with pytest.raises(UserError, match="was not loaded"):
        FeatureNetwork(program)
    FeatureNetwork(program, trust=True)
    FeatureNetwork(program)


def test_a_list_that_is_no_file_is_named(program):
    trust.trusted_list().mkdir(parents=True)
    with pytest.raises(UserError, match=r"trusted_features is a folder"):
        FeatureNetwork(program)


def test_the_list_is_in_the_home_folder_unless_told(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.trusted_list() == tmp_path / ".config/improved_diffusion/trusted_features"


def test_the_command_takes_the_flag(program, tmp_path):
    real, fakes = (write_images(tmp_path / name, 40, size=(8, 8), seed=k) for k, name in enumerate(("real", "fakes")))
    args = ["--samples", fakes, "--reference", real, "--features", program, "--out_dir", tmp_path / "out"]
    refused(call("evaluate", *args, cwd=tmp_path), f"--features {program} was not loaded", "--trust_features")
    assert not (tmp_path / "out").exists()
    assert "trusting" in call("evaluate", *args, "--trust_features", cwd=tmp_path).succeed().out
    call("evaluate", *args, cwd=tmp_path).succeed()
