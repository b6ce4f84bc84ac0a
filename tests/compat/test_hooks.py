"""Code that extends the published package runs as it does there: hooks.py replaces methods, imports private names and
drives the loop by hand; published.json is what the published package answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

FOLDER = Path(__file__).resolve().parent
PUBLISHED = json.loads((FOLDER / "published.json").read_text())
# Modules that star imports of the published files bring along by accident.
INCIDENTAL = {"th", "np", "math", "enum", "dist", "bf", "copy", "functools", "os", "F", "nn", "AdamW", "DDP"}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hooks")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(FOLDER / "hooks.py"), str(folder / "ours.json")]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ours.json").read_text())


def agrees(check, published, ours):
    """Whether an answer of ours is the published one, or differs in a way that breaks nobody's code."""
    if check.startswith("star import of "):
        return not set(ours) - set(published) - INCIDENTAL
    if " reaches " in check and published is False:
        return ours in (True, False)  # a method that is replaced is used at least as often as there
    if check == "an own run_loop logs":  # which quartiles are there is up to the timesteps drawn
        return _without_quartiles(ours) == _without_quartiles(published)
    return ours == published


def _without_quartiles(keys):
    return [key for key in keys if "_q" not in key]


def test_the_checks_are_the_published_ones(ours):
    assert set(ours) == set(PUBLISHED)


@pytest.mark.parametrize("check", PUBLISHED)
def test_extensions_of_the_published_code_work(check, ours):
    assert agrees(check, PUBLISHED[check], ours[check]), f"published {PUBLISHED[check]}, ours {ours[check]}"
