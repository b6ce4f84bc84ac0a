"""The watchdog of one process. What several ranks do to each other is in test_dist_util.py and test_hosts.py."""

import os
import threading
import time

import pytest

from improved_diffusion.distributed import watchdog
from improved_diffusion.distributed.watchdog import Watchdog, watched, working


class Ended(BaseException):
    pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(watchdog, "INTERVAL", 0.05)
    monkeypatch.setattr(watchdog, "SILENCE", 0.4)


@pytest.fixture
def said(monkeypatch):
    """(thread, what it said) of each watchdog that ended its process, by the name of the thread."""
    words = {}

    def say(text):
        words[threading.current_thread().name] = text

    def end_process(code):
        words.setdefault(threading.current_thread().name, "")
        raise Ended(code)

    monkeypatch.setattr(watchdog, "_say", say)
    monkeypatch.setattr(watchdog, "end_process", end_process)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    return words


@pytest.mark.parametrize(
    ("rank", "ranks", "in_time", "expected"),
    [
        (0, [1, 2], False, "rank 1 on nodea and rank 2 on nodeb did not answer for 0 s: the host is down"),
        (0, [2], True, "lost contact with another rank: rank 2 on nodeb ended; without a message if it was killed"),
        (1, [0], False, "rank 0 on nodea did not answer for 0 s: the host is down, the network is cut"),
        (1, [0], True, "lost contact with another rank: rank 0 on nodea ended; its own message says why"),
    ],
)
def test_ranks_that_are_missing_are_named_with_their_hosts(rank, ranks, in_time, expected, said):
    watch = Watchdog(rank, ["nodea", "nodea", "nodeb"])
    with pytest.raises(Ended):
        watch._lost(ranks, in_time)
    (text,) = said.values()
    assert text.startswith(expected) and text.endswith(
        "rerun the same command to continue (training: with --resume auto)"
    )


def test_torchs_message_tells_which_ranks_are_missing():
    watch = Watchdog(0, ["nodea", "nodea", "nodeb"])
    assert watch._missing("[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 400 ms") == [1, 2]
    assert watch._missing("[Rank 0]: Rank 2 failed to pass monitoredBarrier in 400 ms") == [2]
    message = "Rank 1 successfully reached monitoredBarrier, but received errors while waiting for rank 0."
    assert Watchdog(1, ["nodea", "nodea"])._missing(message) == [0]


def test_the_main_threads_report_of_an_error_takes_the_place_of_the_threads(said, monkeypatch):
    watch = Watchdog(0, ["nodea", "nodeb"])
    monkeypatch.setattr(watchdog._process, "watch", watch)
    assert watchdog.report_by_main(lost_peer=False) == ""
    watch._lost([1], in_time=True)
    assert not said
    assert "rank 1 on nodeb ended" in watchdog.report_by_main(lost_peer=True)


def test_a_lone_process_that_waits_too_long_says_where(said):
    with working("the next batch of /data", 0.3):
        watch = watchdog._process.watch
        watch.name = "alone"
        watch.join(5)
    assert not watch.is_alive()
    watchdog._process.watch = None
    assert said["alone"].startswith("waited 0 s for the next batch of /data; rerun the same command")
    assert "test_a_lone_process_that_waits_too_long_says_where" in said["alone"]


def test_the_limit_is_of_one_wait_and_not_of_all_together(said):
    for _ in range(10):
        with working("a batch", 0.4):
            time.sleep(0.1)
    assert not said


def test_each_item_that_is_waited_for_has_its_own_limit(said):
    def slow():
        for i in range(5):
            time.sleep(0.1)
            yield i
        time.sleep(1)

    items = watched(slow(), "an image", 0.4)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4] and not said
    assert list(items) == [] and any("for an image" in text for text in said.values())
    watchdog._process.watch = None


def test_an_inner_wait_has_its_own_limit(said):
    with working("outer", 0.3):
        with working("inner", 30):
            time.sleep(0.8)
        assert watchdog._process.work.what == "outer"
    assert watchdog._process.work is None and not said


def test_a_lone_process_that_waits_for_nothing_has_no_thread():
    with working("a file"):
        watch = watchdog._process.watch
    watch.join(5)
    assert not watch.is_alive() and watchdog._process.watch is None
    with working("another file"):
        assert watchdog._process.watch.is_alive()
    watchdog.leave()
    assert watchdog._process.watch is None


def test_a_wait_costs_about_a_microsecond():
    with working("a file"):
        started = time.perf_counter()
        for _ in range(10_000):
            with working("a batch"):
                pass
        assert (time.perf_counter() - started) / 10_000 < 2e-5
    watchdog.leave()


def test_a_process_that_reads_images_has_no_watchdog():
    with working("a batch"):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write_end, repr((watchdog._process.watch, watchdog._process.work)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read_end, 100) == b"(None, None)" and watchdog._process.watch.is_alive()
    watchdog.leave()
