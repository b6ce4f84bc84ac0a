"""Which run a command continues, and where."""

import os
import shutil

import pytest
from script_helpers import contents, write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints.sets import complete_sets
from improved_diffusion.config import UserError

TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", attention_resolutions="4",
    diffusion_steps=20, noise_schedule="cosine", num_workers=0, batch_size=2, max_steps=1,
)  # fmt: skip
NEXT = dict(num_workers=0, max_steps=2)
DEFAULT = "runs/image_train"

# How a run is named: the option, and the path below the run's folder.
NAMED = [
    ("resume", ""), ("resume", "model000000.pt"), ("resume", "ema_0.9999_000000.pt"), ("resume", "opt000000.pt"),
    ("resume_checkpoint", "model000000.pt"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    write_images(place / "photos", 4)
    for name in ("one", "two"):
        idf.train(place / "photos", out_dir=str(place / name), **TINY)
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of two finished runs and their images, as the present folder."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def resume(option, path, **options):
    return idf.train("photos", **{option: str(path)}, **{**NEXT, **options})


@pytest.mark.parametrize("option, name", NAMED)
def test_a_run_continues_in_its_own_folder(option, name, place, capsys):
    for run in ("one", "two"):
        before = contents(place / run)
        resume(option, os.path.join(run, name))
        assert f"its own folder, {run}" in capsys.readouterr().out
        assert complete_sets(run, ["0.9999"]) == [0, 2]
        assert contents(place / run)["model000000.pt"] == before["model000000.pt"]
    assert not os.path.exists(DEFAULT)


@pytest.mark.parametrize("option, name", NAMED[::4])
@pytest.mark.parametrize("chosen", ["out_dir", "OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"])
def test_a_folder_that_was_chosen_wins_unless_it_holds_another_run(option, name, chosen, place, monkeypatch):
    options = {}
    if chosen == "out_dir":
        options["out_dir"] = "two"
    else:
        monkeypatch.setenv(chosen, str(place / "two"))
    before = contents(place)
    with pytest.raises(UserError, match=r"two holds checkpoints of an earlier run.*--out_dir"):
        resume(option, os.path.join("one", name), **options)
    assert contents(place) == before
    shutil.rmtree("two")
    resume(option, os.path.join("one", name), **options)
    assert complete_sets("two", ["0.9999"]) == [2] and complete_sets("one", ["0.9999"]) == [0]


@pytest.mark.parametrize("option, name", NAMED[::4])
def test_checkpoints_of_the_published_code_stay_as_they_are(option, name, place):
    """It writes no config.json: such a run continues in the usual folder, which must not hold another run."""
    for path in [place / "one/config.json", *(place / "one").glob("manifest*"), *(place / "one").glob("progress*")]:
        path.unlink()
    before = contents(place / "one")
    resume(option, os.path.join("one", name))
    assert contents(place / "one") == before and complete_sets(DEFAULT, ["0.9999"]) == [2]
    after = contents(place / DEFAULT)
    with pytest.raises(UserError, match="image_train holds checkpoints of an earlier run"):
        resume(option, os.path.join("one", name), max_steps=3)
    assert contents(place / DEFAULT) == after


@pytest.mark.parametrize("option", ["resume", "resume_checkpoint"])
@pytest.mark.parametrize(
    "names", [["model_index.json"], ["config.json", "diffusion_pytorch_model.safetensors"]], ids=["pipeline", "network"]
)
def test_a_model_of_diffusers_is_a_start_and_nothing_to_resume(option, names, place):
    folder = place / "theirs"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match="--init_checkpoint theirs"):
        resume(option, "theirs")
    assert sorted(os.listdir(folder)) == sorted(names)
