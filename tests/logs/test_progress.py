"""Progress: a bar on a terminal, lines in a log, and no error whatever the terminal does."""

import io

import pytest
import tqdm.std

from improved_diffusion import distributed
from improved_diffusion.logs import logger
from improved_diffusion.logs.progress import Progress


class Clock:
    """tqdm's clock, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(tqdm.std, "time", lambda: self.now)


def test_a_description_cannot_command_the_terminal(capsys):
    bar = Progress("\x1b[2J\nfile", 1, "image")
    bar.update(1)
    bar.close()
    assert capsys.readouterr().out.startswith(r"\x1b[2J\nfile: 100%")


def test_short_work_logs_its_final_state_only(capsys):
    bar = Progress("sampling", 10, "image")
    bar.update(4, loss="1")
    assert capsys.readouterr().out == ""
    bar.update(6)
    bar.close()
    bar.close()  # again has no effect
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("sampling: 100%") and "10/10" in line and line.endswith("loss 1]")


def test_a_line_is_logged_every_so_many_seconds_with_rate_and_time_left(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("training", 1000, "step")
    lines = []
    for step in range(40):
        clock.now += 1
        bar.update(5, loss=f"{step}")
        lines += capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # after 15 and 30 seconds
    assert "75/1000" in lines[0] and "150/1000" in lines[1]
    assert "5.00step/s" in lines[1] and "<02:50" in lines[1] and "loss 29" in lines[1]


def test_a_line_comes_later_where_a_row_has_shown_the_progress(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("training", 1000, "step")
    for step in range(1, 101):
        clock.now += 1
        bar.update(1)
        if step in (10, 20, 30):
            bar.postpone()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/1000")[0].split()[-1] for line in lines] == ["45", "60", "75", "90"]


def test_the_time_left_follows_the_recent_speed(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("training", 10_000, "step")
    clock.now += 600  # such as compiling the first step
    bar.update(1)
    for _ in range(120):
        clock.now += 1
        bar.update(5)
    line = capsys.readouterr().out.splitlines()[-1]
    rate = float(line.split("step/s")[0].split(", ")[-1])
    assert 4 < rate <= 5


def test_what_was_done_before_does_not_count_as_speed(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("training", None, "step", initial=100)
    clock.now += 20
    bar.update(1)
    assert "101step" in capsys.readouterr().out
    bar.close()
    assert "20.00s/step" in capsys.readouterr().out
    Progress("training", 100, "step", initial=100).close()
    assert capsys.readouterr().out == ""  # nothing was done


def test_other_ranks_show_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    bar = Progress("sampling", 2, "image")
    bar.update(2)
    bar.close()
    assert bar.done == 2
    assert capsys.readouterr() == ("", "")


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self):
        return True

    def shown(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize(("encoding", "full"), [("utf-8", "\N{FULL BLOCK}"), ("ascii", "#")])
def test_progress_is_a_bar_on_a_terminal_and_its_final_state_is_logged(monkeypatch, capsys, encoding, full):
    clock, terminal = Clock(monkeypatch), Terminal(encoding)
    monkeypatch.setattr("sys.stderr", terminal)
    bar = Progress("sämpling", 4, "image")
    clock.now += 1
    bar.update(2, loss="0.5")
    assert "2/4" in terminal.shown() and "loss 0.5" in terminal.shown() and full in terminal.shown()
    assert ("sämpling" if encoding == "utf-8" else "s\\xe4mpling") in terminal.shown()
    bar.update(2)
    bar.close()
    assert "4/4" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["closed", "broken", "none"])
def test_a_terminal_that_is_gone_ends_no_work(monkeypatch, capsys, how):
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr("sys.stderr", None if how == "none" else terminal)
    bar = Progress("sampling", 4, "image")
    if how == "closed":
        terminal.close()
    elif how == "broken":

        def write(text):
            raise BrokenPipeError(32, "Broken pipe")

        monkeypatch.setattr(terminal, "write", write)
    for _ in range(4):
        clock.now += 1
        bar.update(1)
    bar.close()
    assert "4/4" in capsys.readouterr().out
    monkeypatch.undo()


def test_a_closed_standard_output_ends_no_work(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    logger.reset()
    bar = Progress("sampling", 1, "image")
    bar.update(1)
    bar.close()
    monkeypatch.undo()


def test_characters_that_the_output_cannot_show_are_escaped(monkeypatch):
    output = Terminal("ascii")
    monkeypatch.setattr("sys.stdout", output)
    logger.reset()
    logger.log("5 \N{GREEK SMALL LETTER MU}s")
    assert output.shown() == "5 \\u03bcs\n"
    logger.reset()
    monkeypatch.undo()
