"""Figures: drawn without touching anybody else's, written whole."""

import io
import subprocess
import sys

import pytest
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.utils.figures import new_figure, save_figure


def test_a_figure_is_written_as_a_png_of_its_size(tmp_path):
    pytest.importorskip("matplotlib")
    figure = new_figure((5, 3))
    figure.subplots().plot([1, 2, 3])
    save_figure(tmp_path / "figure.png", figure)
    data = (tmp_path / "figure.png").read_bytes()
    assert Image.open(io.BytesIO(data)).size == (500, 300)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


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
        save_figure(tmp_path / "absent" / "figure.png", new_figure((1, 1)))
