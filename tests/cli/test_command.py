"""Commands and groups of commands: which one runs, and what is answered otherwise."""

import pytest

from improved_diffusion.cli.command import Command, CommandGroup
from improved_diffusion.cli.image_edit import COMMAND as EDIT
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Decoding, Encoding


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
