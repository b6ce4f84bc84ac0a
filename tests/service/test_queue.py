"""Whose turn it is, and what is drawn together."""

from pathlib import Path

import pytest

from improved_diffusion.service.job import Job
from improved_diffusion.service.queue import FairQueue
from improved_diffusion.service.requests import Request


def job(n, client="", file="a", kind="sample", **options):
    request = Request(kind, "model", n=n, options={"steps": 2, **options})
    return Job(request, file, client, False, float("inf"))


def take(queue, most=8):
    return [(job, len(numbers)) for job, numbers in queue.take(lambda _: most)]


def queue_of(*jobs):
    queue = FairQueue()
    for each in jobs:
        queue.add(each)
    return queue


def test_an_empty_queue_gives_nothing():
    assert take(FairQueue()) == [] and len(FairQueue()) == 0


def test_a_large_request_does_not_hold_back_a_small_one():
    large, small = job(200, "a"), job(4, "b")
    queue = queue_of(large, small)
    assert dict(take(queue)) == {large: 4, small: 4}
    assert list(queue) == [large] and take(queue) == [(large, 8)] and len(large.todo) == 188


def test_clients_with_other_settings_take_turns():
    large, other, third = job(100, "a"), job(20, "b", sampler="ddim"), job(3, "c", file="b")
    queue = queue_of(large, other, third)
    turns = [take(queue)[0][0] for _ in range(7)]
    assert turns == [large, other, third, large, other, large, other]


def test_requests_of_equal_settings_share_a_batch_whoever_asks():
    jobs = [job(1, client) for client in "aabbc"]
    other = job(1, "a", steps=3)
    queue = queue_of(other, *jobs)
    assert take(queue) == [(other, 1)]
    assert {each for each, _ in take(queue)} == set(jobs) and len(queue) == 0


@pytest.mark.parametrize(("counts", "shares"), [((5, 5, 5), (3, 3, 2)), ((1, 20, 20), (1, 4, 3)), ((2, 1), (2, 1)),
                                                ((1,) * 12, (1,) * 8)])  # fmt: skip
def test_a_batch_is_full_and_shared_evenly(counts, shares):
    jobs = [job(count, str(i)) for i, count in enumerate(counts)]
    taken = dict(take(queue_of(*jobs)))
    assert sorted(taken.values()) == sorted(shares) and sum(taken.values()) == min(8, sum(counts))


def test_what_was_not_drawn_comes_next_in_its_order():
    first, second = job(10, "a"), job(3, "b", steps=5)
    queue = queue_of(first, second)
    ((_, numbers),) = queue.take(lambda _: 4)
    queue.put_back(first, numbers)
    assert first.todo == list(range(10)) and queue.take(lambda _: 4)[0] == (first, (0, 1, 2, 3))


def test_jobs_alone_and_edits_share_no_batch():
    alone, other = job(2, "a"), job(2, "b")
    alone.alone = True
    edits = [job(2, "c", kind="variations"), job(2, "d", kind="variations")]
    queue = queue_of(alone, other, *edits)
    assert [take(queue) for _ in range(4)] == [[(each, 2)] for each in (alone, other, *edits)]


def test_a_job_that_is_removed_is_not_drawn():
    first, second = job(2, "a"), job(2, "a")
    queue = queue_of(first, second)
    queue.remove(first)
    queue.remove(first)
    assert take(queue) == [(second, 2)] and len(queue) == 0


def test_no_module_of_the_engine_imports_a_door():
    folder = Path(__file__).parents[2] / "improved_diffusion/service"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert "fastapi" not in text and "gradio" not in text
