"""Folders that are opened to others: what is in them is named, and no name leads out."""

import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.service.folders import LONGEST_NAME, DataRoot, Root


@pytest.fixture
def root(tmp_path):
    for name in ("data/cats/a.png", "data/cats/b.png", "data/dogs/small/c.png", "data/.hidden/d.png", "secret/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "data" / "birds.zip", "w") as archive:
        archive.write(tmp_path / "secret" / "e.png", "e.png")
    np.savez(tmp_path / "data" / "fish.npz", np.zeros((3, 8, 8, 1), np.uint8))
    (tmp_path / "data" / "classes.csv").write_text("name,class\n")
    return DataRoot(tmp_path / "data")


def test_sets_are_folders_with_images_zips_and_npz(root):
    found = {each.name: each.count for each in root.sets()}
    assert found == {".": 3, "birds.zip": None, "cats": 2, "dogs": 1, "dogs/small": 1, "fish.npz": None}
    assert root.label_files() == ["classes.csv"]


def test_the_outputs_of_runs_are_no_sets(root):
    for name in ("log.txt", "progress.csv"):
        (open(f"{root.path}/cats/{name}", "w")).close()
    assert "cats" not in {each.name for each in root.sets()}


def test_links_out_of_the_root_are_not_listed(root, tmp_path):
    os.symlink(tmp_path / "secret", f"{root.path}/away")
    os.symlink(tmp_path / "secret" / "e.png", f"{root.path}/cats/away.png")
    os.symlink(root.path, f"{root.path}/cats/round")
    assert {each.name: each.count for each in root.sets()}["cats"] == 2
    assert not any("away" in each.name or "round" in each.name for each in root.sets())


@pytest.mark.parametrize("name", ["cats", "birds.zip", "fish.npz", "."])
def test_thumbnails_show_a_few_images_of_a_set(root, name):
    seen = root.thumbnails(name, count=2, side=10)
    assert 1 <= len(seen) <= 2 and all(max(image.size) <= 10 for image in seen)


def test_thumbnails_leave_out_what_is_unreadable_or_behind_a_link(root, tmp_path):
    os.symlink(tmp_path / "secret" / "e.png", f"{root.path}/cats/away.png")
    with open(f"{root.path}/cats/broken.png", "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\nno")
    assert len(root.thumbnails("cats", count=9)) == 2


@pytest.mark.parametrize("name", ["", "..", "../secret", "/", "cats/../..", "no", "cats\0", "https://x/y", "away"])
def test_no_name_leads_out(root, tmp_path, name):
    os.symlink(tmp_path / "secret", f"{root.path}/away")
    for call in (lambda: root.path_of(name, "--data_dir"), lambda: root.thumbnails(name)):
        with pytest.raises(UserError, match="--data_dir"):
            call()


@pytest.mark.parametrize("name", ["cats", "dogs/small", "birds.zip", "."])
def test_a_path_has_its_name_and_a_name_its_path(root, name):
    assert root.name_of(root.path_of(name, "x")) == name


@pytest.mark.parametrize(
    "like", ["cats", "../..", "", "/etc/passwd", "a b\n\0", "ä" * 500, "--flag", ".hidden", "x.zip"]
)
def test_a_free_name_will_do(tmp_path, like):
    root = Root(tmp_path)
    for _ in range(3):
        folder = root.new_folder(root.free_name(like))
        assert os.path.dirname(folder) == root.path and len(os.path.basename(folder)) <= LONGEST_NAME
        os.mkdir(folder)


def test_a_root_has_to_be_a_folder(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        Root(tmp_path / "none")
