"""Figures drawn by matplotlib, without changing the user's settings of it."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..config import UserError
from . import files


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib Figure of (width, height). Raises UserError if matplotlib is missing."""
    try:
        _import_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError(f"plots need a package that is missing ({error}): pip install matplotlib") from None
    # Not pyplot: its figures and settings are shared by the whole process.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=inches, dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _import_matplotlib() -> None:
    """Import matplotlib even if MPLBACKEND names a backend that is not installed, as in programs that a notebook
    starts; its import would fail."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def png_of(figure_of: Callable[..., Any], *args: Any) -> bytes:
    """The figure that figure_of(*args) draws, as the bytes of a PNG.

    Raises UserError whatever fails: plots are drawn when the work is done, and must not fail it.
    """
    png = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks become boxes
            figure_of(*args).savefig(png, format="png")
    except UserError:
        raise
    except Exception as error:  # matplotlib's: fonts, settings, values
        raise UserError(f"it cannot be drawn ({type(error).__name__}: {error})") from error
    return png.getvalue()


def save_figure(path: str | os.PathLike, figure_of: Callable[..., Any], *args: Any) -> None:
    """Write the figure that figure_of(*args) draws as a PNG. Raises UserError whatever fails."""
    files.write_bytes(path, png_of(figure_of, *args))
