"""Files of the log: strict JSON, rows that a resumed run drops, and disks that are full."""

import csv
import errno
import io
import json
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch as th

from improved_diffusion.config import UserError
from improved_diffusion.logs import logger
from improved_diffusion.logs import outputs as outputs_module
from improved_diffusion.logs.curves import write_curves
from improved_diffusion.logs.outputs import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    LineOutputFormat,
    PatientFile,
)
from improved_diffusion.utils import files


def table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def json_rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# JSON


def test_json_is_strict(tmp_path):
    output = JSONOutputFormat(str(tmp_path / "a.jsonl"))
    row = {
        "nan": float("nan"), "inf": -np.float32("inf"), "x": th.tensor(1.5), "n": np.int64(2**53 + 1), "flag": True,
        "text": "é\u2028", "nothing": None, "list": [1, float("nan"), {"a": th.tensor(2.0)}], "other": {3}.__class__,
    }  # fmt: skip
    output.writekvs(row)
    assert json_rows(tmp_path / "a.jsonl") == [
        {"nan": None, "inf": None, "x": 1.5, "n": 2**53 + 1, "flag": True, "text": "é\u2028", "nothing": None,
         "list": [1, None, {"a": 2.0}], "other": "<class 'set'>"}
    ]  # fmt: skip


# Rows that come again


@pytest.fixture
def logged(tmp_path):
    """A folder with rows of steps 0, 10, ..., 50, and one without a step after that of step 20."""
    logger.configure(dir=str(tmp_path), format_strs=["csv", "jsonl", "log"])
    for step in range(0, 60, 10):
        logger.logkvs({"step": step, "loss": 1 / (step + 1), "note": 'a "b",\nc'})
        logger.dumpkvs()
        if step == 20:
            logger.logkv("eval", 7.5)
            logger.dumpkvs()
    logger.reset()
    return tmp_path


def drop(folder, first_step):
    logger.configure(dir=str(folder), format_strs=["csv", "jsonl", "log"])
    return logger.drop_rows(first_step)


def test_rows_from_the_resumed_step_on_are_dropped(logged):
    before = table(logged / "progress.csv")
    assert drop(logged, 30) == 3
    assert table(logged / "progress.csv") == before[:4] and before[3]["eval"] == "7.5"
    assert [row.get("step") for row in json_rows(logged / "progress.jsonl")] == [0, 10, 20, None]
    logger.logkv("step", 30)
    logger.dumpkvs()
    assert [row["step"] for row in table(logged / "progress.csv")] == ["0", "10", "20", "", "30"]
    assert [row.get("step") for row in json_rows(logged / "progress.jsonl")] == [0, 10, 20, None, 30]


def test_where_no_row_comes_again_the_files_stay_as_they_are(logged):
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in logged.glob("progress*")}
    assert drop(logged, 51) == 0
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in logged.glob("progress*")} == before


@pytest.mark.parametrize("bytes_left", [1, 2, 5])
def test_a_torn_last_line_is_dropped(logged, bytes_left):
    for name in ("progress.csv", "progress.jsonl"):
        data = (logged / name).read_bytes()
        whole = data.rfind(b"\n40,") if b"\n40," in data else data.rstrip().rfind(b"\n") + 1
        (logged / name).write_bytes(data[: whole + bytes_left])
    assert drop(logged, 1000) == 1
    rows = json_rows(logged / "progress.jsonl")
    assert [row.get("step") for row in rows] == [0, 10, 20, None, 30, 40]
    assert (logged / "progress.csv").read_bytes().endswith(b"\r\n")
    assert all(row["note"] in ('a "b",\nc', "") for row in table(logged / "progress.csv"))


def test_zeros_that_a_power_cut_leaves_are_dropped(logged):
    for name in ("progress.csv", "progress.jsonl"):
        with open(logged / name, "ab") as f:
            f.write(b"\0" * 100)
    drop(logged, 50)
    assert len(table(logged / "progress.csv")) == 6
    assert len(json_rows(logged / "progress.jsonl")) == 6


def test_a_header_that_was_torn_leaves_an_empty_file(tmp_path):
    (tmp_path / "progress.csv").write_text("loss,ste")
    output = CSVOutputFormat(str(tmp_path / "progress.csv"))
    assert output.drop_rows(0) == 1 and (tmp_path / "progress.csv").read_bytes() == b""
    output.writekvs({"step": 1})
    assert table(tmp_path / "progress.csv") == [{"step": "1"}]


@pytest.mark.parametrize("line", ["[" * 10**5, '{"step": NaN}', "[1]", '{"step": 1e999}'])
def test_a_row_of_json_that_cannot_be_is_dropped(tmp_path, line):
    path = tmp_path / "progress.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    assert JSONOutputFormat(str(path)).drop_rows(3) == 1 and [row["step"] for row in json_rows(path)] == [0, 2]


@pytest.mark.parametrize("text", ["step,loss\n0," + "1" * 2**18 + "\n", "s" * 2**18 + ",step\n0,1\n"])
def test_a_table_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "progress.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"progress\.csv is not readable CSV"):
        CSVOutputFormat(str(path)).drop_rows(1)
    with pytest.raises(UserError, match=r"progress\.csv is not readable CSV"):
        write_curves(path, tmp_path / "curves.png")


def test_a_folder_without_rows_has_none_to_drop(tmp_path):
    assert drop(tmp_path, 0) == 0
    assert os.listdir(tmp_path) == ["log.txt"]


def test_half_a_line_of_a_killed_run_is_not_continued(tmp_path):
    (tmp_path / "log.txt").write_text("whole\nhal")
    HumanOutputFormat(str(tmp_path / "log.txt")).writeseq(["next"])
    assert (tmp_path / "log.txt").read_text() == "whole\nhal\nnext\n"


# Files that are not the folder's own


@pytest.mark.parametrize("kind", ["link", "broken link", "link to a pipe", "pipe", "folder"])
@pytest.mark.parametrize("name", ["log.txt", "progress.csv", "progress.json", "progress.jsonl"])
def test_what_is_no_plain_file_of_the_folder_is_not_appended_to(tmp_path, name, kind):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    if kind == "link":
        other.write_text("not ours\n")
    elif kind == "link to a pipe":
        os.mkfifo(other)
    {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda path: os.symlink(other, path))(run / name)
    format = {"log.txt": "log"}.get(name, name.rpartition(".")[2])
    with pytest.raises(UserError, match=f"cannot write .*run/{name}: it is a {'link' if 'link' in kind else kind}"):
        logger.configure(dir=str(run), format_strs=[format])
    assert os.path.lexists(run / name)
    assert not other.is_file() or other.read_text() == "not ours\n"
    assert other.exists() == (kind in ("link", "link to a pipe"))


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    HumanOutputFormat(str(tmp_path / "run" / "log.txt")).writeseq(["a"])
    assert (tmp_path / "disk" / "log.txt").read_text() == "a\n"


# A disk that is full


def outputs(folder):
    return [
        HumanOutputFormat(str(folder / "log.txt")),
        CSVOutputFormat(str(folder / "progress.csv")),
        JSONOutputFormat(str(folder / "progress.jsonl")),
    ]


def write(all_outputs, step):
    for output in all_outputs:
        output.writekvs({"step": step, "loss": 0.123456789 + step, "text": "x" * (step % 37)})


def check_rows(folder, steps):
    steps = list(steps)
    assert [int(row["step"]) for row in table(folder / "progress.csv")] == steps
    assert [row["step"] for row in json_rows(folder / "progress.jsonl")] == steps
    assert all(row["text"] == "x" * (int(row["step"]) % 37) for row in table(folder / "progress.csv"))
    text = (folder / "log.txt").read_text()
    assert [int(float(line.split()[3])) for line in text.splitlines() if line.startswith("| step")] == steps


@pytest.fixture
def small_disk():
    with helpers.small_disk(64) as folder:
        yield folder


def test_a_disk_that_fills_up_and_is_freed_costs_no_row(small_disk, capsys):
    log = outputs(small_disk)
    for step in range(20):
        write(log, step)
    (small_disk / "checkpoint").write_bytes(b"")
    with open(small_disk / "checkpoint", "wb", buffering=0) as f:
        while True:
            try:
                f.write(b"x" * 512)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
    assert capsys.readouterr().err == ""
    for step in range(20, 120):
        write(log, step)
        for path in ("log.txt", "progress.csv", "progress.jsonl"):
            assert (small_disk / path).read_bytes().endswith(b"\n")  # no half line, at any moment
    complaints = sorted(capsys.readouterr().err.splitlines())
    assert len(complaints) == 3  # each file once
    for name, line in zip(("log.txt", "progress.csv", "progress.jsonl"), complaints):
        assert f"warning: cannot write {small_disk / name}: No space left on device: free some space" in line
    (small_disk / "checkpoint").unlink()
    write(log, 120)
    check_rows(small_disk, range(121))
    for output in log:
        output.close()
    assert capsys.readouterr().err == ""


def test_a_run_on_a_full_disk_goes_on_to_its_end(small_disk, tmp_path):
    """The logger as a whole, with stdout and stderr on the full disk too."""
    (small_disk / "filler").write_bytes(b"x" * 60 * 1024)
    code = """
import os, sys
from improved_diffusion.logs import logger
logger.configure(dir=sys.argv[1])
for step in range(300):
    logger.logkvs({"step": step, "loss": 0.5})
    logger.dumpkvs()
os.unlink(sys.argv[1] + "/filler")
logger.reset()
os.write(3, b"the end")
"""
    with open(small_disk / "out", "w") as out:
        done = subprocess.run(
            ["bash", "-c", 'exec 3>"$3"; exec "$1" -c "$2" "$4"', "-", sys.executable, code,
             str(tmp_path / "end"), str(small_disk)], stdout=out, stderr=out,
        )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "the end"
    assert [int(row["step"]) for row in table(small_disk / "progress.csv")] == list(range(300))
    assert [row["step"] for row in json_rows(small_disk / "progress.jsonl")] == list(range(300))


class Disk:
    """open() in the module under test; where it is full a write stores half of its bytes and fails then."""

    def __init__(self, monkeypatch):
        self.full = False
        monkeypatch.setattr(outputs_module, "open", self.open, raising=False)

        def write_bytes(path, data, durable=True):
            if self.full:
                raise UserError(f"cannot write {path}: No space left on device: free some space")
            original(path, data, durable)

        original = files.write_bytes
        monkeypatch.setattr(files, "write_bytes", write_bytes)

    def open(self, path, mode, buffering=-1):
        disk = self

        class File(io.FileIO):
            def write(self, data):
                if not disk.full:
                    return super().write(data)
                super().write(bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

        return File(path, mode.replace("b", ""))


def test_writes_that_fail_are_undone_and_made_up_for_in_order(tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    log = outputs(tmp_path)
    step = 0
    for spell in range(2):
        for disk.full in (False, True, False):
            before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
            for _ in range(5):
                write(log, step)
                step += 1
            if disk.full:
                assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before
                assert capsys.readouterr().err.count("No space left on device") == 3, spell  # once in each spell
    check_rows(tmp_path, range(step))
    for output in log:
        output.close()
    assert capsys.readouterr().err == ""


def test_a_new_column_waits_for_space_as_well(tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    output = CSVOutputFormat(str(tmp_path / "progress.csv"))
    output.writekvs({"step": 1})
    disk.full = True
    output.writekvs({"step": 2, "val_loss": 3.5})
    output.writekvs({"step": 3})
    assert table(tmp_path / "progress.csv") == [{"step": "1"}]
    disk.full = False
    output.writekvs({"step": 4})
    assert [(row["step"], row["val_loss"]) for row in table(tmp_path / "progress.csv")] == [
        ("1", ""), ("2", "3.5"), ("3", ""), ("4", "")
    ]  # fmt: skip
    assert capsys.readouterr().err.count("cannot write") == 1


def test_storage_that_is_gone_for_a_while_gets_its_rows(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    log = outputs(folder)
    write(log, 0)
    folder.rename(tmp_path / "away")
    write(log, 1)
    (tmp_path / "away").rename(folder)
    write(log, 2)
    check_rows(folder, range(3))
    assert capsys.readouterr().err.count("warning") == 3


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    log = outputs(tmp_path)
    write(log, 0)
    for path in list(tmp_path.iterdir()):
        path.unlink()
    write(log, 1)
    check_rows(tmp_path, [1])


def test_what_is_lost_in_the_end_is_counted(tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    lines = PatientFile(str(tmp_path / "log.txt"))
    disk.full = True
    for i in range(7):
        lines.add(f"{i}\n")
    capsys.readouterr()
    lines.close()
    assert capsys.readouterr().err == f"error: 7 entries of {tmp_path / 'log.txt'} could not be written: lost\n"
    lines.close()
    assert capsys.readouterr().err == ""


def test_closing_writes_what_it_still_can(tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    log = outputs(tmp_path)
    write(log, 0)
    disk.full = True
    write(log, 1)
    disk.full = False
    for output in log:
        output.close()
    check_rows(tmp_path, range(2))
    assert "error" not in capsys.readouterr().err


def test_memory_is_bounded_and_the_oldest_go_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PatientFile, "LIMIT", 10)
    disk = Disk(monkeypatch)
    lines = PatientFile(str(tmp_path / "log.txt"))
    disk.full = True
    for i in range(25):
        lines.add(f"{i}\n")
    disk.full = False
    lines.add("25\n")
    assert (tmp_path / "log.txt").read_text().split() == [str(i) for i in range(16, 26)]
    capsys.readouterr()
    lines.close()
    assert capsys.readouterr().err.startswith("error: 16 entries of")


def test_an_interrupt_while_writing_leaves_no_line_twice(tmp_path, monkeypatch):
    lines = PatientFile(str(tmp_path / "log.txt"))
    lines.add("first\n")

    class Interrupted(io.FileIO):
        def write(self, data):
            super().write(data)
            raise KeyboardInterrupt

    monkeypatch.setattr(outputs_module, "open", lambda path, mode, buffering: Interrupted(path, "a+"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        lines.add("second\n")
    monkeypatch.undo()
    lines.add("third\n")
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\nthird\n"


def test_an_attempt_costs_the_same_however_many_entries_wait(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    log = outputs(tmp_path)
    write(log, 0)
    tried = []
    for output in (log[0].lines, log[1], log[2]):
        monkeypatch.setattr(
            output, "_store", lambda batch, store=output._store: (tried.append(len(batch)), store(batch))
        )
    disk.full = True
    for step in range(1, 200):
        write(log, step)
    assert max(tried) == PatientFile.BATCH < 100
    disk.full = False
    write(log, 200)
    check_rows(tmp_path, range(201))


@pytest.mark.parametrize("name", ["log", "csv", "jsonl"])
def test_a_folder_that_cannot_be_written_at_the_start_is_an_error_at_once(tmp_path, name, monkeypatch):
    (tmp_path / {"log": "log.txt", "csv": "progress.csv", "jsonl": "progress.jsonl"}[name]).mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*--out_dir"):
        logger.configure(dir=str(tmp_path), format_strs=[name])


def test_a_standard_output_that_fails_is_told_once_and_ends_nothing(capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    output = HumanOutputFormat(Full())
    for _ in range(3):
        output.writeseq(["hello"])
    assert capsys.readouterr().err.count("cannot write to the standard output: No space left on device") == 1


# Text from outside

HARMFUL = "\x1b]0;owned\x07\x9b2J\u202eb"
SHOWN = r"\x1b]0;owned\x07\x9b2J\u202eb"


def test_control_characters_never_reach_an_output(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout", "line", "log", "csv", "jsonl"])
    for say in (logger.log, logger.warn, logger.error):
        say(f"file {HARMFUL}", HARMFUL)
    logger.logkvs({"step": 1, f"key{HARMFUL}": 2.0, "text": HARMFUL, "a\nb": "c\nd"})
    logger.dumpkvs()
    written = [capsys.readouterr().out, *(path.read_text() for path in tmp_path.iterdir())]
    assert len(written) == 4
    for text in written:
        assert SHOWN in text or "\\u001b" in text
        assert not any(character in text for character in "\x1b\x07\x9b\u202e")
    assert not any(line.startswith(("b", "d")) for line in written[0].splitlines())


def test_a_warning_of_several_lines_is_one(capsys):
    logger.warn("a\nerror: b")
    logger.error("a\nerror: b")
    logger.log("a\nb")
    assert capsys.readouterr().out == "warning: a\n  error: b\nerror: a\n  error: b\na\nb\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_are_printed_in_any_encoding(encoding):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict", write_through=True)
    HumanOutputFormat(stream).writeseq(["猫", "\udce9"])
    assert buffer.getvalue().decode(encoding) == ("猫" if encoding == "utf-8" else r"\u732b") + " \\udce9\n"


def test_text_files_are_utf_8(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["log", "csv"])
    logger.log("猫 \udce9")
    logger.logkv("class", "猫")
    logger.dumpkvs()
    assert "猫 \\udce9\n" in (tmp_path / "log.txt").read_text("utf-8")
    assert "猫" in (tmp_path / "progress.csv").read_text("utf-8")


def test_without_stdout_nothing_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    logger.configure(dir=str(tmp_path), format_strs=["stdout", "line", "log"])
    logger.log("text")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert "text" in (tmp_path / "log.txt").read_text() and capsys.readouterr().err == ""


# A line for each row


def lines_of(row, capsys, done=0, total=0):
    output = LineOutputFormat(sys.stdout)
    output.expect(done, total)
    output.writekvs(row)
    return capsys.readouterr().out.splitlines()


ROW = {"step": 10, "loss": 0.123456, "mse": 0.1, "lr": 1e-4, "images_per_second": 412.3, "grad_norm": 1.0}


def test_a_row_is_one_line_of_what_matters(capsys):
    assert lines_of(ROW, capsys) == ["step 10, loss 0.1235, lr 0.0001, 412.3 images/s"]


@pytest.mark.parametrize("more, shown", [
    ({"val_loss": 0.5, "val_bpd": th.tensor(3.5), "val_bpd_se": 0.1}, "val_bpd 3.5, val_loss 0.5"),
    ({"skipped_steps": 0.25}, "skipped_steps 0.25"), ({"skipped_steps": 0.0}, "412.3 images/s"),
])  # fmt: skip
def test_validation_and_skipped_steps_are_in_the_line(more, shown, capsys):
    (line,) = lines_of({**ROW, **more}, capsys)
    assert line.endswith(shown)


def test_the_time_left_is_in_the_line(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(outputs_module.time, "monotonic", lambda: now[0])
    output = LineOutputFormat(sys.stdout)
    output.expect(1000, 5000)
    now[0] += 3600
    output.writekvs({**ROW, "step": 1999})  # a thousand steps in an hour
    output.writekvs({**ROW, "step": 4999})
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("40%, 3:00:00 left") and last.endswith("100%, 0:00:00 left")


@pytest.mark.parametrize("row, lines", [
    ({"a": 1.5, "b": "text", "c": 2}, ["a 1.5, c 2"]), ({"step": 1234}, ["step 1,234"]), ({}, []),
    ({"loss": float("nan")}, ["loss nan"]),
])  # fmt: skip
def test_other_rows_are_a_line_too(row, lines, capsys):
    assert lines_of(row, capsys) == lines


# The error that ends a command


def test_an_error_goes_into_the_files_alone(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout", "log", "csv"])
    capsys.readouterr()
    logger.log_error(None)
    logger.log_error(SystemExit(75))
    for error in (UserError(f"bad {HARMFUL}\nerror: forged"), KeyboardInterrupt("saved"), RuntimeError("odd")):
        try:
            raise error
        except BaseException as raised:
            logger.log_error(raised)
    text = (tmp_path / "log.txt").read_text()
    assert f"error: bad {SHOWN}\\nerror: forged\ninterrupted: saved\nTraceback" in text
    assert text.endswith("RuntimeError: odd\n") and capsys.readouterr().out == ""


def test_without_a_log_an_error_is_not_logged(capsys):
    logger.log_error(UserError("early"))
    assert capsys.readouterr() == ("", "")
