"""The console command: `python -m improved_diffusion`, and what it answers."""

import subprocess
import sys
from importlib import import_module

import pytest
from helpers import ROOT
from script_helpers import environment

from improved_diffusion import __version__
from improved_diffusion.cli.command import Command, CommandGroup
from improved_diffusion.cli.main import COMMANDS, dispatch
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import commands_with


def run_module(*args, cwd):
    argv = [sys.executable, "-m", "improved_diffusion", *args]
    return subprocess.run(argv, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def test_the_module_lists_its_commands_and_refuses_others(tmp_path):
    done = run_module("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "python -m improved_diffusion COMMAND" in done.stdout
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert rows == [[name, summary] for name, (_, summary) in COMMANDS.items()]
    wrong = run_module("sampel", "--seed", "3", cwd=tmp_path)
    assert wrong.returncode == 1 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: ") and "did you mean sample?" in wrong.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_command_exists_and_a_script_runs_it():
    for name, (module, _) in COMMANDS.items():
        command = import_module(f"improved_diffusion.cli.{module}").COMMAND
        assert isinstance(command, (Command, CommandGroup)), name
        assert f'run_script("{module}")' in (ROOT / "scripts" / f"{module}.py").read_text()


def test_the_commands_that_have_an_option():
    commands = {
        name: import_module(f"improved_diffusion.cli.{module}").COMMAND for name, (module, _) in COMMANDS.items()
    }
    parts = {
        name: list(command.commands.values()) if isinstance(command, CommandGroup) else [command]
        for name, command in commands.items()
    }
    options = {name: {option for part in each for option in part.settings.options()} for name, each in parts.items()}
    for option in set().union(*options.values()):
        assert commands_with(option) == [name for name in COMMANDS if option in options[name]]
    assert commands_with("absent") == []


def test_the_first_word_names_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["improved-diffusion"])
    dispatch(["edit", "--help"])
    text = capsys.readouterr().out
    assert "improved-diffusion edit COMMAND" in text and "inpaint" in text
    with pytest.raises(SystemExit):
        dispatch(["sample", "--help"])
    assert "improved-diffusion sample [--flag value ...]" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_the_list_is_shown(argv, capsys):
    dispatch(argv)
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    dispatch(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_flag_before_the_command_is_refused():
    with pytest.raises(UserError, match=r"--seed.*train, sample"):
        dispatch(["--seed", "3", "sample"])


def test_the_console_command_is_installed_under_its_name():
    assert 'improved-diffusion = "improved_diffusion.cli.main:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_catches_signals_before_it_imports_torch(path):
    assert f'run_script("{path.stem}")' in path.read_text()
