"""The tab that draws samples."""

import asyncio
import dataclasses
import os
import shutil
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from model_helpers import STUDENT, save_checkpoint, tiny_settings
from web_helpers import ASKING, Place, drawn_of, png_files, run, run_command, run_python, status_of

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.sampling.images import Images
from improved_diffusion.service.errors import Busy, Failed, OutOfMemory
from improved_diffusion.service.job import Event, Job
from improved_diffusion.utils.images import decode_png, load_npz
from improved_diffusion.web import kept
from improved_diffusion.web.picker import MOST_UPLOADS
from improved_diffusion.web.pictures import data_url


@pytest.fixture(scope="module")
def drawn(app_state):
    return drawn_of(Place(app_state).draw(n=3, classes=("3", "5")))


def shown(drawn):
    """{name: bytes} of the pictures that the page shows."""
    return {Path(path).name: Path(path).read_bytes() for path in drawn.downloads.pngs}


def test_draws_the_classes_that_are_asked_for(drawn):
    assert drawn.images.labels.tolist() == [3, 5, 3]
    assert list(shown(drawn)) == ["3_000000.png", "5_000001.png", "3_000002.png"]


def test_the_shown_command_draws_the_same_bytes(drawn, tmp_path):
    run_command(drawn.codes()[0], tmp_path)
    assert png_files(tmp_path / "images") == shown(drawn)


def test_the_shown_python_draws_the_same_bytes(drawn, tmp_path):
    run_python(drawn.codes()[1], tmp_path)
    assert png_files(tmp_path / "images") == shown(drawn)


@pytest.mark.parametrize("form", [0, 1])
def test_a_selected_image_is_drawn_again_alone(drawn, tmp_path, form):
    (run_command, run_python)[form](drawn.codes(1)[form], tmp_path)
    assert png_files(tmp_path / "images") == {"5_000001.png": shown(drawn)["5_000001.png"]}


def test_the_downloads_hold_the_images(drawn):
    with zipfile.ZipFile(drawn.downloads.zip) as archive:
        assert [archive.read(name) for name in archive.namelist()] == list(shown(drawn).values())
    assert np.array_equal(load_npz(drawn.downloads.npz), drawn.images.array)
    assert np.array_equal(decode_png(shown(drawn)["3_000000.png"]), drawn.images.array[0])


def test_images_are_shown_while_they_are_drawn(app_state):
    """An engine that tells of the second of two images, and then waits until that is seen."""
    half, whole = np.full((1, 8, 8, 1), 77, np.uint8), np.zeros((2, 8, 8, 1), np.uint8)

    class Half:
        def submit(self, request, **_):
            self.job = Job(request, "file.pt", "", True, 1e9)
            self.job.tell(Event("preview", preview=Images(half, numbers=[1])))
            return self.job

    engine = Half()
    tab = Place(dataclasses.replace(app_state, engine=engine)).sample

    async def seen():
        async for values in tab.draw(ASKING, "digits", "", [], 2, 0, "ancestral", 20, 1):
            yield values
            for number in (0, 1):
                engine.job.drawn[number] = Images(whole[:1], numbers=[number])
            engine.job.finish()

    first, *_, last = run(seen())
    assert first[4]["value"].count("data:image/png") == 1 and data_url(half[0]) in first[4]["value"]
    assert np.array_equal(drawn_of([last]).images.array, whole)


def test_a_tab_that_is_closed_cancels_its_drawing(app_state):
    class Slow:
        def submit(self, request, **_):
            self.job = Job(request, "file.pt", "", True, 1e9)
            return self.job

    engine = Slow()
    tab = Place(dataclasses.replace(app_state, engine=engine)).sample

    async def close():
        drawing = tab.draw(ASKING, "digits", "", [], 2, 0, "ancestral", 20, 1)
        yield await anext(drawing)
        assert not engine.job.wants_cancel
        await drawing.aclose()  # as Gradio does where the browser leaves
        for _ in range(100):  # the generators within are closed by the loop
            await asyncio.sleep(0.01 * (not engine.job.wants_cancel))

    assert len(run(close())) == 1 and engine.job.wants_cancel


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "/tmp/x"), UserError("cannot write /tmp/x")])
def test_a_full_disk_is_a_message_without_paths(place, monkeypatch, error):
    monkeypatch.setattr("improved_diffusion.web.result.Downloads", mock.Mock(side_effect=error))
    *_, last = place.draw(n=1)
    assert kept.NO_ROOM in status_of(last) and "/tmp" not in status_of(last)


def test_the_files_of_a_session_go_with_it(place):
    found = drawn_of(place.draw(n=1))
    assert os.path.isdir(found.downloads.folder)
    place.sample.result.drawn.delete_callback(found)
    assert not os.path.exists(found.downloads.folder)
    place.sample.result.drawn.delete_callback(None)


def test_options_at_their_defaults_are_left_out_of_the_command(place):
    order = place.sample.order("digits", "", [], 1, 0, {})
    words = order.recipe.command().split()
    assert {word for word in words if word.startswith("--")} == {"--model_path", "--num_samples", "--seed", "--out_dir"}


# What is said where there are no images


@pytest.mark.parametrize(
    "asked, named", [({"n": None}, "Num samples"), ({"n": 65}, "65"), ({"seed": -1}, "Seed"), ({"steps": 99}, "99"),
                     ({"classes": ("cat",)}, "cat"), ({"model": None}, "no model"), ({"model": "digit"}, "digits")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_and_draws_nothing(place, asked, named):
    *_, last = place.draw(**asked)
    assert "bad" in status_of(last) and named in status_of(last)
    assert "--" not in status_of(last)


@pytest.mark.parametrize(
    "error, said",
    [(Busy("full", 90), "1 min 30 s"), (OutOfMemory("no"), "does not fit"), (Failed("the worker died"), "worker died")],
)
def test_the_engines_errors_are_messages(app_state, error, said):
    engine = mock.Mock(submit=mock.Mock(side_effect=error))
    *_, last = Place(dataclasses.replace(app_state, engine=engine)).draw()
    assert said in status_of(last)


def test_a_cancelled_request_ends_without_images(place):
    async def cancelled():
        async for values in place.sample.draw(ASKING, "digits", "", [], 64, 0, "ancestral", 20, 1):
            if values[1] is not None:
                values[1].cancel()
            yield values

    *_, last = run(cancelled())
    assert "Cancelled" in status_of(last)


def test_two_users_draw_at_once(place):
    async def one(seed):
        return [v async for v in place.sample.draw(ASKING, "digits", "", ["3"], 2, seed, "dpmpp_2m", 4, 1)]

    async def both():
        return await asyncio.gather(one(0), one(1))

    first, second = map(drawn_of, asyncio.get_event_loop().run_until_complete(both()))
    assert not np.array_equal(first.images.array, second.images.array)
    assert first.recipe.seed == 0 and second.recipe.seed == 1


# Controls


def test_titles_and_help_are_those_of_the_command(place):
    known = ImageSampling.options()
    controls = {"sampler": place.sample.sampler, "steps": place.sample.steps, "seed": place.sample.seed}
    for name, control in controls.items():
        assert control.label.lower().replace(" ", "_") == name
        assert control.info == known[name].metadata["help"]


@pytest.mark.parametrize("model, can", [("digits", True), ("plain", False)])
def test_a_model_without_classes_says_so(place, model, can):
    classes, guidance, go = place.sample.fit(model, [])
    assert classes["interactive"] is can and go["interactive"]
    assert not guidance["interactive"] and ("no classes" in guidance["info"]) is not can


def test_what_is_chosen_stays_unless_the_model_lacks_it(place):
    assert "value" not in place.sample.fit("digits", ["3"])[0]
    assert place.sample.fit("plain", ["3"])[0]["value"] == []


def test_a_super_resolution_model_is_for_the_other_tab(place):
    assert not place.sample.fit("super", [])[2]["interactive"]
    assert place.upscale.fit("super", [])[1]["interactive"] and not place.upscale.fit("digits", [])[1]["interactive"]


def test_a_distilled_model_draws_in_its_own_steps(place, runs):
    save_checkpoint(runs / "student/model000010.pt", tiny_settings(channels=1), distilled=STUDENT)
    try:
        sampler, steps = place.sample.fit_steps("student", "dpmpp_2m_sde")
        assert (sampler["value"], steps["value"]) == ("auto", 0)
        assert "3 steps: 3 evaluations" in place.sample.cost("student", "", 1, "auto", 0, 1)
        assert "samples in 3 steps" in place.picker._about("student") and "samples in" not in place.picker._about(
            "plain"
        )
        assert "value" not in place.sample.fit_steps("student", "auto")[0]
        assert [each["value"] for each in place.upscale.fit_steps("plain", "auto")] == ["dpmpp_2m_sde", 20]
        assert "value" not in place.sample.fit_steps("plain", "heun")[0]
    finally:
        shutil.rmtree(runs / "student")


@pytest.mark.parametrize(
    "sampler, steps, each", [("ancestral", 0, "20 evaluations"), ("dpmpp_2m", 4, "4 evaluations"), ("heun", 4, "7 ev")]
)
def test_the_evaluations_are_those_of_the_sampler(place, sampler, steps, each):
    assert each in place.sample.cost("digits", "", 1, sampler, steps, 1)


def test_steps_that_cannot_work_are_said_before_drawing(place):
    assert "bad" in place.sample.cost("digits", "", 1, "dpmpp_2m", 21, 1)


# Uploaded weights


def test_uploaded_weights_draw(place, runs, tmp_path):
    copy = tmp_path / "mine.pt"
    copy.write_bytes((runs / "digits" / "model000010.pt").read_bytes())
    menu, uploads = place.picker.take_upload(str(copy), "digits", [])
    assert uploads[0][1] == menu["value"] and uploads[0][1] not in place.app_state.catalogue.names()
    assert len(drawn_of(place.draw(model=menu["value"], n=1)).images) == 1


def test_a_user_keeps_a_few_uploads(place, runs, tmp_path):
    uploads, catalogue = [], place.app_state.catalogue
    for i in range(MOST_UPLOADS + 2):
        copy = tmp_path / f"{i}.pt"
        copy.write_bytes((runs / "digits" / "model000010.pt").read_bytes())
        before = uploads
        _, uploads = place.picker.take_upload(str(copy), "digits", before)
    assert [title[0] for title, _ in uploads] == [str(i) for i in range(2, MOST_UPLOADS + 2)]
    assert all(os.path.exists(catalogue.path(name)) for _, name in uploads)
    with pytest.raises(UserError, match="unknown model"):
        catalogue.path(before[0][1])


def test_an_upload_that_cannot_be_kept_is_a_message(place, tmp_path):
    with mock.patch("improved_diffusion.web.picker.warn") as warn:
        _, uploads = place.picker.take_upload(str(tmp_path / "gone.pt"), "digits", [])
    (error,) = warn.call_args.args
    assert str(error) == kept.NO_ROOM and uploads == []


def test_a_file_that_is_no_model_is_refused_by_its_name(place, tmp_path):
    wrong = tmp_path / "evil.pt"
    wrong.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with mock.patch("improved_diffusion.web.picker.warn") as warn:
        _, uploads = place.picker.take_upload(str(wrong), "digits", [])
    (error,) = warn.call_args.args
    assert isinstance(error, UserError) and "evil.pt" in str(error) and str(tmp_path) not in str(error)
    assert uploads == []
