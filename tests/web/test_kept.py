"""The files that the page keeps for its users stay within bounds."""

import os
from types import SimpleNamespace

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.web.kept import DRAWN, MODELS, new_folder, require_room


@pytest.fixture
def place(tmp_path):
    return SimpleNamespace(work_dir=str(tmp_path), options=SimpleNamespace(max_kept_mb=1))


def fill(place, kind, size, age=0):
    folder = new_folder(place, kind)
    path = os.path.join(folder, "x")
    with open(path, "wb") as f:
        f.truncate(size)
    os.utime(folder, (1e9 - age, 1e9 - age))
    return path


def test_what_was_drawn_first_goes_first(place):
    paths = [fill(place, DRAWN, 400_000, age) for age in (3, 1, 2)]
    assert [os.path.exists(path) for path in paths] == [True, True, True]
    require_room(place)
    assert [os.path.exists(path) for path in paths] == [False, True, True]
    require_room(place, coming=500_000)
    assert [os.path.exists(path) for path in paths] == [False, True, False]


def test_models_are_not_removed_but_nothing_more_is_taken(place):
    paths = [fill(place, MODELS, 700_000) for _ in range(2)]
    for ask in (lambda: require_room(place), lambda: new_folder(place, DRAWN), lambda: new_folder(place, MODELS)):
        with pytest.raises(UserError, match="no room"):
            ask()
    assert all(map(os.path.exists, paths))


def test_an_upload_larger_than_the_place_is_refused(place):
    with pytest.raises(UserError, match="no room"):
        require_room(place, coming=10**6 + 1)
    require_room(place, coming=10**6)


def test_a_folder_that_cannot_be_made_is_a_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no room"):
        new_folder(SimpleNamespace(work_dir=str(tmp_path / "file"), options=SimpleNamespace(max_kept_mb=1)), DRAWN)
