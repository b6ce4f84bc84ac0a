"""Signals become a flag; two ranks see it after the same step (the scripts' tests show that)."""

import os
import signal
import threading

import pytest
from script_helpers import run

from improved_diffusion.training import signals as training_signals
from improved_diffusion.training.signals import EXIT_RESUME, SIGNALS, Agreement, Stopped, StopSignals
from improved_diffusion.utils import stop_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else_happens(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_the_first_signal_counts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1


def test_a_second_ctrl_c_interrupts_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_a_warning_that_comes_before_the_loop_is_kept_for_it():
    with StopSignals(starting=True) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.begin()
        assert signals.received == signal.SIGUSR1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_before_the_loop_a_signal_stops_at_once(number):
    with pytest.raises(Stopped) as ended, StopSignals(starting=True):
        os.kill(os.getpid(), number)
    assert ended.value.code == EXIT_RESUME and "before the first step" in str(ended.value)


@pytest.mark.parametrize("starting", [True, False])
def test_a_hang_up_that_nohup_ignores_stays_ignored(starting):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals(starting=starting) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        signals.begin()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_warning_that_came_while_python_imported_is_kept_for_the_loop_once():
    stop_signals.catch_early(trains=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    with StopSignals(starting=True) as signals:
        assert signals.received == signal.SIGUSR1
    with StopSignals() as signals:
        assert signals.received == 0


def test_before_the_loop_the_first_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt, match="nothing new was saved"), StopSignals(starting=True):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_caught():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals() as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_a_platform_without_usr1_and_hup_has_the_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(training_signals, "SIGNALS", (signal.SIGTERM, signal.SIGINT))
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_a_script_that_does_not_catch_the_stop_ends_with_its_code(tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text(
        "import signal\n"
        "from improved_diffusion import distributed\n"
        "from improved_diffusion.training.signals import Stopped\n"
        "distributed.setup_dist()\n"
        "raise Stopped(signal.SIGTERM, 7)\n"
    )
    result = run("mpiexec", 2, script, cwd=tmp_path)
    assert result.code == EXIT_RESUME and "Traceback" not in result.err


def test_one_rank_agrees_with_itself_at_once():
    agreement = Agreement()
    assert [agreement.exchange(n) for n in (0, 15, 0)] == [0, 15, 0]
    agreement.finish()
