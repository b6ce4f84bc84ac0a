"""Processes that outlive the one that started them, and the ends of what they print."""

import os
import subprocess

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.service.commands import Process, _state_of, begin, end_of, launch, read_record, tail


def test_a_process_that_has_ended_is_not_running_before_and_after_it_is_waited_for():
    ended = subprocess.Popen(["true"])
    process = Process(ended.pid, _state_of(ended.pid)[1])
    assert process.wait(30)  # it is still in the system's table
    ended.wait()
    assert not process.is_running() and _state_of(ended.pid) == ("", "")


def test_a_running_process_is_known_by_its_start():
    here = Process(os.getpid(), _state_of(os.getpid())[1])
    assert here.is_running() and not here.wait(0)
    assert not Process(os.getpid(), f"{here.started}1").is_running()


def test_kill_ends_what_the_process_has_started():
    parent = subprocess.Popen(
        ["sh", "-c", "sleep 100 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(parent.stdout.readline())
    Process(parent.pid, _state_of(parent.pid)[1]).kill()
    parent.communicate()
    assert _state_of(child)[0] in ("", "Z")


def test_a_command_leaves_its_output_and_a_record(tmp_path):
    begin(["--version"], str(tmp_path), "record.json", {"lr": 1, "seed": "", "steps": None})
    record = read_record(str(tmp_path), "record.json")
    assert record.process.wait(60) and record.options == {"lr": 1}
    assert (tmp_path / "console.txt").read_text().strip()


def test_output_replaces_no_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    os.symlink(tmp_path / "precious", tmp_path / "console.txt")
    with pytest.raises(UserError, match="link"):
        launch(["--version"], str(tmp_path / "console.txt"))
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(("limit", "shown"), [(100, "one\ntwo\nthr"), (9, "two\nthr"), (5, "thr"), (2, "")])
def test_the_end_of_a_text_has_whole_lines_and_a_limit(tmp_path, limit, shown):
    (tmp_path / "log").write_text("one\ntwo\nthr")
    assert tail(str(tmp_path / "log"), limit) == shown


def test_the_end_of_what_is_no_text_is_empty(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/etc/passwd", tmp_path / "link")
    assert [tail(str(tmp_path / name)) for name in ("pipe", "link", "none", ".")] == ["", "", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [("loading\nerror: no space\n", "no space"), ("error: one\nerror: two\nbye\n", "two"),
     ("Traceback:\n  x\nOSError: y\n\n", "OSError: y"), ("", "it ended without a message")],
)  # fmt: skip
def test_the_message_of_an_end(text, message):
    assert end_of(text) == message
