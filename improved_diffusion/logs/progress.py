"""Progress of long work: a bar on a terminal or in a notebook, else a line in the log now and then."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from .. import distributed
from ..config import one_line
from ..utils.terminal import encodable
from . import logger


class Progress:
    """A progress bar of tqdm, with rate and time left. Rank 0 only; the others just count.

    :param total: units of work in all; None if unknown.
    :param unit: what is counted, in the singular; bytes are shown in kB, MB, ...
    :param initial: units done before.
    """

    SECONDS_BETWEEN_LINES = 15.0  # in a log

    def __init__(self, description: str, total: int | None, unit: str, initial: int = 0):
        self.total, self.initial, self.done = total, initial, initial
        self.bar: Any = None
        if distributed.get_rank() == 0:
            self.bar = self._make_bar(dict(desc=one_line(description), total=total, unit=unit, initial=initial))

    def _make_bar(self, options: dict[str, Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without ipywidgets, lines are logged instead of a bar
            from tqdm import auto

        if options["unit"] == "byte":
            options |= dict(unit="B", unit_scale=True)
        if "tqdm.notebook" in sys.modules and issubclass(auto.tqdm, sys.modules["tqdm.notebook"].tqdm_notebook):
            return auto.tqdm(**options, leave=False)
        if _is_terminal(sys.stderr):
            options["desc"] = encodable(options["desc"], sys.stderr)
            return auto.tqdm(**options, leave=False, dynamic_ncols=True)
        # tqdm measures and formats here too; `write` gets its lines.
        return auto.tqdm(
            **options,
            leave=False,
            file=self,
            ncols=0,
            position=0,
            miniters=1,
            mininterval=self.SECONDS_BETWEEN_LINES,
            smoothing=0.5,
        )

    def update(self, n: int, **shown: Any) -> None:
        """n more units are done; `shown`, such as loss="0.12", appears beside the bar until replaced."""
        self.done += n
        if self.bar is None:
            return
        if shown:
            self.bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in shown.items()), refresh=False)
        self._draw(self.bar.update, n)

    def postpone(self) -> None:
        """A row of the log has just shown the progress: the next line of a log comes that much later."""
        if self.bar is not None:
            self.bar.last_print_t, self.bar.last_print_n = self.bar._time(), self.bar.n

    def close(self) -> None:
        """Remove the bar and log the final state."""
        if self.bar is None:
            return
        self._draw(self.bar.close)
        if self.done > self.initial:
            final = {"n": self.done, "ncols": 0, "rate": None}  # None: the average rate
            logger.log(self.bar.format_meter(**{**self.bar.format_dict, **final}))
        self.bar = None

    def _draw(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except (OSError, ValueError):  # the terminal is closed, or cannot show a character: the work continues
            self.bar.disable = True

    def write(self, text: str) -> None:
        """Log a line of tqdm, whose output this object is where there is no terminal."""
        if text.strip() and self.done > self.initial:
            logger.log(text.strip())

    def flush(self) -> None:
        """Part of an output for tqdm: nothing is buffered."""


def _is_terminal(stream: Any) -> bool:
    """Whether the stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()
