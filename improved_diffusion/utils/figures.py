"""Figures drawn by matplotlib, without changing the user's settings of it."""

from __future__ import annotations

import io
import os
from typing import Any

from ..config import UserError
from . import files


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib Figure of (width, height). Raises UserError if matplotlib is missing."""
    try:
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


def png_of(figure: Any) -> bytes:
    """The figure as the bytes of a PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def save_figure(path: str | os.PathLike, figure: Any) -> None:
    """Write the figure as a PNG."""
    files.write_bytes(path, png_of(figure))
