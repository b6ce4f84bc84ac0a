"""Models by name: nothing in a request leads out of the folders that the operator named."""

import os
import shutil

import pytest
import torch as th
from model_helpers import CLASSES, STUDENT, save_checkpoint, tiny_settings

from improved_diffusion.config import UserError
from improved_diffusion.service.catalogue import Catalogue


def test_runs_are_named_by_their_place(runs):
    catalogue = Catalogue(str(runs))
    assert catalogue.names() == ["animals", "nested/large", "plain"]
    assert catalogue.path("nested/large") == str(runs / "nested/large")
    assert catalogue.file("animals") == str(runs / "animals/ema_0.9_000005.pt")
    assert catalogue.file("animals", "raw") == str(runs / "animals/model000005.pt")
    assert Catalogue(str(runs / "plain")).names() == ["plain"]
    assert Catalogue().names() == []


def test_what_a_model_is(runs):
    catalogue = Catalogue(str(runs))
    animals, large = catalogue.describe("animals"), catalogue.describe("nested/large")
    assert (animals.kind, animals.size, animals.channels, animals.class_names) == ("image", (8, 8), 3, tuple(CLASSES))
    assert animals.averages == ("0.9", "raw") and animals.num_classes == 2 and not animals.hides_classes
    assert (large.kind, large.size, large.small_size, large.num_classes) == ("super_res", (16, 16), (8, 8), 0)
    assert catalogue.describe("animals") is animals


@pytest.mark.parametrize("name", [
    "..", "../runs/plain", "/etc/passwd", "plain/../plain", "plain/", "./plain", "", "plain/ema_0.99_000001.pt",
    "plain\0", "file:///etc/passwd", "~", None, "PLAIN",
])  # fmt: skip
def test_a_name_is_never_a_path(runs, name):
    catalogue = Catalogue(str(runs))
    for method in (catalogue.path, catalogue.file, catalogue.describe):
        with pytest.raises(UserError, match="unknown model"):
            method(name)


def test_absolute_paths_of_models_are_no_names(runs):
    with pytest.raises(UserError, match="unknown model"):
        Catalogue(str(runs)).path(str(runs / "plain"))


def test_links_do_not_lead_out_of_the_runs(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs / "plain", root / "own")
    os.symlink(runs / "animals", root / "elsewhere")
    os.mkdir(root / "linked")
    os.symlink(runs / "plain/ema_0.99_000001.pt", root / "linked/ema_0.99_000001.pt")
    catalogue = Catalogue(str(root))
    assert catalogue.names() == ["linked", "own"]
    with pytest.raises(UserError, match="link"):
        catalogue.file("linked")
    with pytest.raises(UserError, match="link"):
        catalogue.describe("linked")


def test_names_that_collide_are_told_apart(runs, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(runs / "plain/ema_0.99_000001.pt", tmp_path / folder / "plain.pt")
    given = [str(tmp_path / "a/plain.pt"), str(tmp_path / "b/plain.pt")]
    catalogue = Catalogue(str(runs), given)
    assert catalogue.names() == ["plain", "plain-2", "animals", "nested/large", "plain-3"]
    assert [catalogue.path(name) for name in ("plain", "plain-2")] == given
    assert catalogue.path("plain-3") == str(runs / "plain")


def test_a_distilled_model_has_steps_of_its_own(tmp_path):
    save_checkpoint(tmp_path / "student.pt", tiny_settings(), distilled=STUDENT)
    save_checkpoint(tmp_path / "teacher.pt", tiny_settings())
    catalogue = Catalogue("", [str(tmp_path / "student.pt"), str(tmp_path / "teacher.pt")])
    assert [catalogue.describe(name).own_steps for name in ("student", "teacher")] == [3, 0]


def test_what_the_operator_names_is_checked_at_once(tmp_path, runs):
    with pytest.raises(UserError, match="not a folder"):
        Catalogue(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"missing\.pt"):
        Catalogue("", [str(tmp_path / "missing.pt")])


def test_a_new_checkpoint_of_a_run_is_found(tmp_path):
    save_checkpoint(tmp_path / "run/model000001.pt", tiny_settings())
    catalogue = Catalogue(str(tmp_path))
    assert catalogue.file("run").endswith("model000001.pt") and catalogue.describe("run").step == 0
    save_checkpoint(tmp_path / "run/ema_0.9_000002.pt", tiny_settings())
    save_checkpoint(tmp_path / "run/model000002.pt", tiny_settings())
    assert catalogue.file("run").endswith("ema_0.9_000002.pt") and catalogue.describe("run").averages == ("0.9", "raw")


def test_an_upload_has_a_secret_name_and_ends_with_its_file(runs, tmp_path):
    path = shutil.copy(runs / "plain/ema_0.99_000001.pt", tmp_path / "theirs.pt")
    catalogue = Catalogue(str(runs))
    name = catalogue.add_upload(str(path), "their model")
    assert name not in catalogue.names() and len(name) > 20 and "theirs" not in name
    assert catalogue.describe(name).title == "their model" and catalogue.file(name) == str(path)
    catalogue.drop_uploads(3600)
    assert os.path.exists(path)
    catalogue.drop_uploads()
    assert not os.path.exists(path)
    with pytest.raises(UserError, match="unknown model"):
        catalogue.path(name)


def test_uploads_that_are_no_models_are_refused(runs, tmp_path):
    catalogue = Catalogue(str(runs))
    th.save({"x": th.zeros(2)}, tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("import os")
    (tmp_path / "code.pt").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    for name in ("tensor.pt", "text.pt", "code.pt"):
        with pytest.raises(UserError):
            catalogue.add_upload(str(tmp_path / name), name)
        assert os.path.exists(tmp_path / name)
    assert not os.path.exists(tmp_path / "ran")
