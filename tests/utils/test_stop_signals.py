"""Signals before a command has begun and after it has ended."""

import os
import signal
import subprocess
import sys

import pytest
from script_helpers import SCRIPTS, environment

from improved_diffusion.utils import stop_signals

# In place of torch, whose import takes seconds: the signal comes in the midst of it.
TORCH = "import os, signal\nos.kill(os.getpid(), {number})\nos.write(2, b'it lives')\nraise SystemExit(1)\n"
TRAINING = (["-m", "improved_diffusion", "train"], [str(SCRIPTS / "image_train.py")],
            [str(SCRIPTS / "super_res_train.py")], ["-m", "improved_diffusion", "classifier-train"])  # fmt: skip
OTHERS = (["-m", "improved_diffusion", "sample"], [str(SCRIPTS / "image_nll.py")])


def signalled(tmp_path, argv, number):
    """What a command does that gets the signal while it imports torch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH.format(number=int(number)))
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    return subprocess.run([sys.executable, *argv], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("argv", [*TRAINING, *OTHERS], ids=lambda argv: os.path.basename(argv[-1]))
def test_ctrl_c_during_the_imports_ends_any_command_with_a_word(tmp_path, argv):
    result = signalled(tmp_path, argv, signal.SIGINT)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (130, "", 1)
    assert ("nothing new was saved" in result.stderr) == (argv in TRAINING) and result.stderr.startswith("interrupted")


@pytest.mark.parametrize("argv", TRAINING, ids=lambda argv: os.path.basename(argv[-1]))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_training_stops_during_the_imports_as_it_does_before_its_first_step(tmp_path, argv, number):
    result = signalled(tmp_path, argv, number)
    assert result.returncode == 75
    assert result.stderr == f"stopped by {number.name} before the first step: run the same command again\n"


@pytest.mark.parametrize("argv", TRAINING, ids=lambda argv: os.path.basename(argv[-1]))
def test_a_schedulers_warning_does_not_end_a_training_that_imports(tmp_path, argv):
    assert "it lives" in signalled(tmp_path, argv, signal.SIGUSR1).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_commands_end_by_a_signal_as_any_program(tmp_path, number):
    assert signalled(tmp_path, OTHERS[0], number).returncode == -number


def test_signals_that_the_shell_ignores_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_signals.catch_early(trains=True)
    stop_signals.begin()
    assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)} == {signal.SIG_IGN}


@pytest.mark.parametrize("trains", [True, False])
def test_only_ctrl_c_is_left_to_the_command_itself(trains):
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    stop_signals.catch_early(trains)
    stop_signals.begin()
    for number, handler in before.items():
        assert (signal.getsignal(number) is handler) == (number == signal.SIGINT or not trains)


@pytest.mark.parametrize("number", stop_signals.SIGNALS)
def test_signals_to_a_command_that_is_done_change_nothing(number):
    stop_signals.ignore_until_exit()
    os.kill(os.getpid(), number)
