"""Figures: drawn without touching anybody else's, written whole."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.utils.figures import new_figure, save_figure


def line(values):
    figure = new_figure((5, 3))
    figure.subplots().plot(values)
    return figure


def test_a_figure_is_written_as_a_png_of_its_size(tmp_path):
    pytest.importorskip("matplotlib")
    save_figure(tmp_path / "figure.png", line, [1, 2, 3])
    data = (tmp_path / "figure.png").read_bytes()
    assert Image.open(io.BytesIO(data)).size == (500, 300)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("draw", [lambda: line([object()]), lambda: line([1]).subplots(0), lambda: 1 / 0, int])
def test_whatever_fails_is_one_kind_of_error(tmp_path, draw):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="cannot be drawn"):
        save_figure(tmp_path / "figure.png", draw)
    assert not list(tmp_path.iterdir())


def test_letters_that_the_font_lacks_do_not_matter(tmp_path):
    pytest.importorskip("matplotlib")

    def named():
        figure = line([1, 2])
        figure.suptitle("\N{CJK UNIFIED IDEOGRAPH-732B}")
        return figure

    save_figure(tmp_path / "figure.png", named)  # warnings are errors here


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "qtagg", "agg", ""])
def test_the_backend_of_the_environment_does_not_matter(tmp_path, backend):
    pytest.importorskip("matplotlib")
    code = "import os, sys\nfrom improved_diffusion.utils import figures\nbefore = dict(os.environ)\n"
    code += "figures.save_figure(sys.argv[1], figures.new_figure, (1, 1))\nassert os.environ == before\n"
    code += "import matplotlib\nprint(dict.__getitem__(matplotlib.rcParams, 'backend'))"
    env = {**os.environ, "MPLBACKEND": backend}
    command = [sys.executable, "-c", code, tmp_path / "figure.png"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (tmp_path / "figure.png").exists()
    if backend in ("qtagg", "agg"):  # there: the user's plots are drawn by it
        assert done.stdout.strip() == backend


def test_a_figure_does_not_touch_the_process():
    pytest.importorskip("matplotlib")
    code = "import sys\nfrom improved_diffusion.utils.figures import new_figure\nnew_figure((1, 1))\n"
    code += "print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"missing .*: pip install matplotlib"):
        new_figure((1, 1))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"cannot write .*figure\.png: No such file"):
        save_figure(tmp_path / "absent" / "figure.png", new_figure, (1, 1))
