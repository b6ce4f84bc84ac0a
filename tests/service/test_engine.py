"""What the engine promises to those who ask, with workers that are threads."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch as th
from service_helpers import FAST, WAIT, ask, until

import improved_diffusion as idf
from improved_diffusion.config import UserError
from improved_diffusion.service import engine as engines
from improved_diffusion.service import worker
from improved_diffusion.service.engine import Catalogue, Engine, Request
from improved_diffusion.service.errors import Busy, Cancelled, Failed, OutOfMemory, TimedOut


@pytest.fixture(scope="module")
def models(runs):
    return {name: idf.load(runs / name) for name in ("animals", "plain", "nested/large")}


@contextmanager
def held(monkeypatch):
    """Workers wait before they draw, until the block ends."""
    go, draw = threading.Event(), worker.draw
    monkeypatch.setattr(worker, "draw", lambda *args: go.wait(WAIT) and draw(*args))
    try:
        yield
    finally:
        go.set()


def test_twenty_mixed_requests_get_what_they_get_alone(start, models):
    engine = start()
    requests = [
        ask(["animals", "plain"][i % 2], n=1 + i % 5, seed=i % 3, steps=2 + i % 3 // 2,
            **(dict(classes=("dog", 0)) if i % 4 == 0 else {}), **(dict(seeds="4,9-11") if i % 7 == 0 else {}))
        for i in range(20)
    ]  # fmt: skip
    jobs = [engine.submit(request, client=str(i % 6)) for i, request in enumerate(requests)]
    for request, job in zip(requests, jobs):
        which = {} if "seeds" in request.options else {"n": request.n}
        alone = models[request.model].sample(
            **which, seed=request.seed, classes=request.classes or None, **request.options, progress=False
        )
        found = job.result(WAIT)
        assert np.array_equal(found.array, alone.array) and list(found.numbers) == list(alone.numbers)
        assert found.labels is None if alone.labels is None else np.array_equal(found.labels, alone.labels)
        assert found.class_names == alone.class_names and job.state == "done"
    health = engine.health()
    assert health.images == sum(len(job.numbers) for job in jobs) and health.done == 20 and health.waiting == 0
    assert set(health.models) == {"animals", "plain"} and health.state == "ready"


def test_an_average_and_a_large_request_in_parts(start, models, runs):
    engine = start()
    raw = idf.load(runs / "animals", average="raw").sample(20, seed=5, **FAST, progress=False)
    job = engine.submit(ask("animals", n=20, seed=5, average="raw"))
    assert np.array_equal(job.result(WAIT).array, raw.array)
    assert engine.health().batches == 3


def test_requests_of_equal_settings_are_one_batch(start, monkeypatch):
    engine = start()
    with held(monkeypatch):
        first = engine.submit(ask("animals"))
        until(lambda: first.state == "running")
        jobs = [engine.submit(ask(n=2, seed=i), client=str(i)) for i in range(4)]
        other = engine.submit(ask(n=2, steps=3))
    for job in (first, *jobs, other):
        job.result(WAIT)
    health = engine.health()
    assert health.batches == 3 and health.batch_sizes == {1: 1, 2: 1, 8: 1} and health.gpu_memory == {}


def test_a_client_with_many_images_does_not_hold_back_another(start, monkeypatch):
    engine = start()
    with held(monkeypatch):
        large = engine.submit(ask(n=200), client="a")
        small = engine.submit(ask("animals", n=4), client="b")
    small.result(WAIT)
    assert large.state == "running" and len(large.drawn) < 200
    large.cancel()
    with pytest.raises(Cancelled):
        large.result(WAIT)


def test_edits_and_upscaling_are_those_of_the_python_api(start, models):
    engine, animals, large = start(), models["animals"], models["nested/large"]
    images = animals.sample(2, classes=["cat"], **FAST, progress=False).array
    mask = np.zeros((8, 8), bool)
    mask[2:5] = True
    short = dict(jump_length=1, resamplings=2, steps=4)
    expected = {
        "inpaint": animals.inpaint(images, mask, 10, classes=["dog"], seed=3, batch_size=3, progress=False, **short),
        "variations": animals.variations(images, 3, 0.5, classes=["dog"], seed=3, progress=False, **FAST),
        "interpolate": animals.interpolate(*images, 3, classes=["dog"], progress=False, steps=3),
        "transform": animals.decode(animals.encode(images, classes=["cat"], steps=3), classes=["dog"], progress=False),
        "upscale": large.upscale(images, seed=3, progress=False, **FAST),
    }
    asked = {
        "inpaint": dict(n=10, mask=mask, options=short),
        "variations": dict(n=3, options=dict(FAST, strength=0.5)),
        "interpolate": dict(n=3, options=dict(steps=3)),
        "transform": dict(n=0, options=dict(steps=3, image_classes=["cat"])),
        "upscale": dict(n=0, options=FAST),
    }
    jobs = {}
    for kind, arguments in asked.items():
        which = dict(model="nested/large") if kind == "upscale" else dict(model="animals", classes=("dog",))
        jobs[kind] = engine.submit(Request(kind, images=images, seed=3, **which, **arguments))
    seeds = engine.submit(Request("interpolate", "animals", n=3, classes=("cat",), options=dict(FAST, seeds=[3, 5])))
    for kind, job in jobs.items():
        assert np.array_equal(job.result(WAIT).array, expected[kind].array), kind
    assert np.array_equal(
        seeds.result(WAIT).array, animals.interpolate(3, 5, 3, classes=["cat"], **FAST, progress=False).array
    )


def test_what_happens_is_told_in_order(start):
    engine = start()
    job = engine.submit(ask(n=3, sampler="ancestral", steps=0), previews=True)
    heard = []
    job.add_listener(heard.append)
    kinds = [event.kind for event in job.events(WAIT)]
    assert kinds[-1] == heard[-1].kind == "done" and kinds.count("done") == 1
    progress = [event for event in heard if event.kind == "progress"]
    assert progress[-1].done == progress[-1].total == 3 * 20
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert [event.kind for event in job.events(WAIT)] == ["done"]  # also for those who come late


def test_previews_are_images_on_their_way(start, monkeypatch):
    monkeypatch.setattr(worker, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(worker, "PROGRESS_SECONDS", 0)
    engine = start()
    with held(monkeypatch):
        plain = engine.submit(ask(n=2, steps=5))
        watched = engine.submit(ask(n=2, seed=4, steps=5), previews=True, client="b")
        seen = {plain: [], watched: []}
        for job, events in seen.items():
            job.add_listener(events.append)
    for job in seen:
        job.result(WAIT)
    previews = [event.preview for event in seen[watched] if event.kind == "preview"]
    assert len(previews) == 5 and not [event for event in seen[plain] if event.kind == "preview"]
    assert all(each.array.shape == (2, 8, 8, 3) and list(each.numbers) == [0, 1] for each in previews)
    assert np.array_equal(previews[-1].array, watched.result().array)  # the last prediction is the image


def test_a_listener_that_fails_stops_nothing(start):
    engine = start()
    told = []

    def fail(event):
        told.append(event)
        if len(told) > 1:
            raise RuntimeError("the loop is closed")

    job = engine.submit(ask(steps=20))
    job.add_listener(fail)
    assert len(job.result(WAIT)) == 1


def test_cancelling_what_waits_and_what_runs(start, monkeypatch):
    engine = start()
    with held(monkeypatch):
        running = engine.submit(ask("animals", steps=20))
        until(lambda: running.state == "running")
        waiting, others = engine.submit(ask()), engine.submit(ask(seed=1))
        for job in (waiting, running):
            job.cancel()
            with pytest.raises(Cancelled):
                job.result(WAIT)
        assert [job.state for job in (waiting, running)] == ["cancelled"] * 2
    assert len(others.result(WAIT)) == 1
    assert engine.health().cancelled == 2 and engine.health().batches == 1  # the other one was stopped
    others.cancel()
    assert others.state == "done"


def test_memory_that_is_full_halves_the_batch_and_refuses_one_image_alone(start, models, monkeypatch):
    draw = worker.draw

    def small(model, work, on_step):
        if work.count > 2 or work.pieces[0].request.seed == 9:
            raise [th.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                   RuntimeError("DefaultCPUAllocator: can't allocate memory")][work.number % 3]  # fmt: skip
        return draw(model, work, on_step)

    monkeypatch.setattr(worker, "draw", small)
    engine = start()
    jobs = [engine.submit(ask(n=7, seed=i), client=str(i)) for i in range(2)]
    large = engine.submit(ask("animals", seed=9))
    for i, job in enumerate(jobs):
        assert np.array_equal(job.result(WAIT).array, models["plain"].sample(7, seed=i, **FAST, progress=False).array)
    with pytest.raises(OutOfMemory):
        large.result(WAIT)
    assert engine.health().memory_full == 3  # at 8, at 4, and the image that never fits
    assert engine.health().state == "ready"


def test_a_request_that_fails_fails_alone(start, monkeypatch):
    draw = worker.draw

    def poison(model, work, on_step):
        if any(piece.request.seed == 9 for piece in work.pieces):
            raise ZeroDivisionError
        return draw(model, work, on_step)

    monkeypatch.setattr(worker, "draw", poison)
    engine = start()
    with held(monkeypatch):
        jobs = [engine.submit(ask(seed=seed), client=str(seed)) for seed in (0, 9, 1)]
    for job in (jobs[0], jobs[2]):
        assert len(job.result(WAIT)) == 1
    with pytest.raises(Failed, match="ZeroDivisionError"):
        jobs[1].result(WAIT)


def test_what_only_the_model_knows_is_the_users_error_too(start):
    engine = start()
    with pytest.raises(UserError, match=r"guidance_scale 2\.0: animals was never trained"):  # and not its path
        engine.submit(ask("animals", guidance_scale=2)).result(WAIT)
    with pytest.raises(UserError, match="cannot go from an image"):
        images = np.zeros((2, 8, 8, 3), np.uint8)
        engine.submit(Request("interpolate", "plain", n=3, images=images, options={"sampler": "unipc"})).result(WAIT)


def test_a_full_queue_refuses_and_says_when_to_come_back(start, monkeypatch):
    engine = start(max_queue=3)
    with held(monkeypatch):
        first = engine.submit(ask())
        until(lambda: first.state == "running")
        jobs = [engine.submit(ask(seed=i)) for i in range(3)]
        with pytest.raises(Busy) as refused:
            engine.submit(ask())
        assert 1 <= refused.value.retry_after <= 120
        assert [next(iter(job.events())).position for job in jobs] == [0, 1, 2]
    for job in (first, *jobs):
        job.result(WAIT)
    engine.submit(ask()).result(WAIT)


def test_a_request_that_takes_too_long_ends(start, monkeypatch):
    engine = start(time_limit=1.5)
    with held(monkeypatch):
        jobs = [engine.submit(ask()), engine.submit(ask())]
        for job in jobs:
            with pytest.raises(TimedOut, match=r"1\.5 seconds"):
                job.result(WAIT)


def test_stopping_finishes_what_runs_and_refuses_what_waits(start, monkeypatch):
    engine = start()
    with held(monkeypatch):
        running = engine.submit(ask(n=12))
        until(lambda: running.state == "running")
        waiting = engine.submit(ask("animals"))
        stopping = threading.Thread(target=engine.stop, args=(WAIT,))
        stopping.start()
        with pytest.raises(Failed, match="stopping"):
            waiting.result(WAIT)
        with pytest.raises(Busy):
            engine.submit(ask())
    assert len(running.result(WAIT)) == 12
    stopping.join(WAIT)
    assert engine.health().state == "stopped"
    with pytest.raises(Busy):
        engine.submit(ask())
    engine.start()
    assert len(engine.submit(ask()).result(WAIT)) == 1


def test_an_engine_outlives_a_machine_without_room_for_a_worker(start, monkeypatch):
    refusals, begin = [OSError(24, "Too many open files"), MemoryError()], engines.WorkerProcess._start

    def refuse(self, *args):
        if refusals:
            raise refusals.pop()
        return begin(self, *args)

    monkeypatch.setattr(engines.WorkerProcess, "_start", refuse)
    monkeypatch.setattr(engines, "FIRST_PAUSE", 0.01)
    assert start().submit(ask("plain")).result(WAIT).array.any()
    assert not refusals


def test_requests_end_where_no_worker_can_be_started(start, monkeypatch):
    def refuse(self, *args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(engines.WorkerProcess, "_start", refuse)
    monkeypatch.setattr(engines, "FIRST_PAUSE", 0.001)
    engine = start()
    for _ in range(2):
        with pytest.raises(Failed, match="workers cannot start"):
            engine.submit(ask("plain")).result(WAIT)
    assert engine.health().state == "starting"


def test_idle_models_leave_the_memory(start):
    engine = start(idle_minutes=0.01, max_models=1)
    engine.submit(ask()).result(WAIT)
    engine.submit(ask("animals")).result(WAIT)
    until(lambda: engine.health().models == ())
    engine.submit(ask()).result(WAIT)


IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
FORBIDDEN = (
    "model_path", "guide_path", "classifier_path", "base_samples", "data_dir", "out_dir", "images", "mask", "on_step",
    "compile", "print_steps", "batch_size", "image_size",
)  # fmt: skip


@pytest.mark.parametrize(("request_", "named"), [
    (Request("paint", "plain"), "paint"),
    (Request("sample", "../plain"), "unknown model"),
    (Request("sample", "plain", average="0.5"), r"0\.5"),
    (Request("sample", "plain", n=0), "0 images"),
    (Request("sample", "plain", n=10**9), "1,000"),
    (Request("sample", "plain", n=-1), "n -1"),
    (Request("sample", "plain", seed=-1), "seed"),
    (Request("sample", "plain", seed=2**63), "seed"),
    (Request("sample", "plain", classes=("cat",)), "without classes"),
    (Request("sample", "animals", classes=("cow",)), "cow"),
    (Request("sample", "animals", classes="cat"), "list"),
    (Request("sample", "animals", classes=(2,)), "2"),
    (Request("sample", "plain", options={"stepz": 3}), "did you mean steps"),
    (Request("sample", "plain", options={"steps": "many"}), "steps"),
    (Request("sample", "plain", options={"sampler": "unknown"}), "sampler"),
    (Request("sample", "plain", options={"seeds": "1,1"}), "twice"),
    (Request("sample", "plain", options={"seeds": "0-999999"}), "1,000"),
    (Request("sample", "plain", options={"seeds": {"a": 1}}), "seeds"),
    *((Request("sample", "plain", options={name: "/etc/passwd"}), "unknown option") for name in FORBIDDEN),
    (Request("sample", "nested/large"), "sample needs an image model, but nested/large is a super-resolution model"),
    (Request("upscale", "plain", images=IMAGES), "super-resolution"),
    (Request("upscale", "nested/large"), "needs images"),
    (Request("sample", "plain", images=IMAGES), "takes none"),
    (Request("variations", "plain", images=IMAGES.astype(float)), "float64"),
    (Request("variations", "plain", images=IMAGES[0]), "expected uint8"),
    (Request("variations", "plain", images=IMAGES[:0]), "expected uint8"),
    (Request("variations", "plain", images=IMAGES, options={"strength": 2}), "strength"),
    (Request("inpaint", "plain", images=IMAGES), "mask"),
    (Request("inpaint", "plain", images=IMAGES, mask=IMAGES[0]), "mask"),
    (Request("interpolate", "plain", images=IMAGES, n=3), "two images"),
    (Request("interpolate", "plain", n=1, options={"seeds": [1, 2]}), "frames"),
    (Request("interpolate", "plain", n=3, options={"seeds": [1]}), "seeds"),
    (Request("interpolate", "plain", n=3), "needs images"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_work_is_refused_at_once(request_, named, runs):
    engine = Engine(Catalogue(str(runs)))
    with pytest.raises(UserError, match=named) as refused:
        engine.submit(request_)
    assert str(runs) not in str(refused.value)
