"""Commands and groups of commands: which one runs, and what is answered otherwise."""

import os
import subprocess
import sys

import pytest
from script_helpers import environment

from improved_diffusion.cli.command import Command, CommandGroup, run_logged
from improved_diffusion.cli.image_edit import COMMAND as EDIT
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Decoding, Encoding
from improved_diffusion.utils.stop_signals import SIGNALS


@pytest.fixture
def ran():
    """(name, parsed) of each command that ran."""
    return []


def group(ran, default=""):
    commands = {
        "one": Command("First.", Encoding, lambda parsed: ran.append(("one", parsed)), first=("images",)),
        "two": Command("Second.", Decoding, lambda parsed: ran.append(("two", parsed)), first=("latents",)),
    }
    return CommandGroup("Both.", commands, default)


def test_the_first_word_names_the_command_which_has_its_own_flags(ran):
    group(ran).main(["two", "--latents", "a", "--seed=3"], "prog")
    ((name, parsed),) = ran
    assert name == "two" and parsed.settings.latents.latents == "a" and parsed.given == {"latents", "seed"}
    with pytest.raises(UserError, match="'--latents'"):
        group(ran).main(["one", "--latents", "a"], "prog")
    assert len(ran) == 1


def test_help_lists_the_commands_and_each_has_its_own(ran, capsys):
    group(ran).main(["--help"], "prog")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "First."] in lines and ["two", "Second."] in lines
    with pytest.raises(SystemExit):
        group(ran).main(["two", "--help"], "prog")
    text = capsys.readouterr().out
    assert "prog two [--flag value ...]" in text and "--latents" in text and "--images" not in text
    assert ran == []


@pytest.mark.parametrize("argv, culprits", [
    ([], ["one, two", "--help"]),
    (["--images", "a", "one"], ["one, two"]),
    (["tow"], ["'tow'", "did you mean two?", "one, two"]),
    (["one", "two"], ["'two'"]),
])  # fmt: skip
def test_a_wrong_command_is_answered_with_the_right_ones(argv, culprits, ran):
    with pytest.raises(UserError) as error:
        group(ran).main(argv, "prog")
    assert all(culprit in str(error.value) for culprit in culprits) and ran == []


def test_a_line_that_begins_with_a_flag_may_mean_one_command(ran):
    group(ran, "two").main(["--latents", "a"], "prog")
    group(ran, "two").main(["one"], "prog")
    assert [name for name, _ in ran] == ["two", "one"]
    with pytest.raises(UserError, match="one, two"):
        group(ran, "two").main([], "prog")


def test_editing_has_five_commands():
    assert tuple(EDIT.commands) == ("encode", "decode", "interpolate", "inpaint", "variations")


@pytest.mark.parametrize("argv, culprit", [
    (["interpolate", "--seeds", "3"], "--seeds 3"),
    (["interpolate", "--seeds", "3,7,9"], "--seeds 3,7,9"),
    (["interpolate", "--seeds", "3,-7"], "--seeds '3,-7'"),
    (["interpolate", "--seeds", "a,b"], "--seeds 'a,b'"),
    (["interpolate", "--frames", "1"], "--frames 1"),
    (["variations", "--strength", "0"], r"--strength 0\.0"),
    (["variations", "--strength", "-0.1"], r"--strength -0\.1"),
    (["variations", "--strength", "1.5"], r"--strength 1\.5"),
    (["inpaint", "--jump_length", "0"], "--jump_length 0"),
    (["inpaint", "--resamplings", "0"], "--resamplings 0"),
    (["decode", "--num_samples", "-1"], "--num_samples -1"),
    (["encode", "--batch_size", "0"], "--batch_size 0"),
])  # fmt: skip
def test_wrong_values_of_editing_are_named(argv, culprit):
    with pytest.raises(UserError, match=culprit):
        EDIT.main(argv, "prog")


# Ends


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("end", [None, SystemExit(75), UserError("no"), KeyboardInterrupt()], ids=repr)
def test_a_signal_after_the_end_of_a_command_does_not_change_its_exit_code(monkeypatch, number, end):
    codes = []

    def main():
        if end is not None:
            raise end

    def leave(code):
        os.kill(os.getpid(), number)
        codes.append(code)

    monkeypatch.setattr(os, "_exit", leave)
    try:
        run_logged(main)
    except SystemExit as stopped:
        codes.append(stopped.code)
    os.kill(os.getpid(), number)
    assert codes == {type(None): [], SystemExit: [75], UserError: [1], KeyboardInterrupt: [130]}[type(end)]


@pytest.mark.parametrize("code", [0, 75])
def test_ctrl_c_at_the_exit_of_a_process_does_not_change_its_exit_code(code):
    script = (
        "import atexit, os, signal\n"
        "from improved_diffusion.cli.command import run_logged\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "def main():\n"
        f"    if {code}: raise SystemExit({code})\n"
        "run_logged(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, "")
