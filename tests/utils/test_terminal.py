"""Standard streams that are closed, not UTF-8, or read by nobody any more."""

import subprocess
import sys

import pytest
from script_helpers import environment

from improved_diffusion.utils import terminal

SCRIPT = """
import sys
from improved_diffusion.distributed import run_script
from improved_diffusion.utils.terminal import complain, show

def main():
    for i in range(5000):
        show(f"line {i} \\u732b \\x1b[2J")
    complain("caf\\udce9")
    print("\\u732b", "\\udce9")
    open(sys.argv[1], "w").write("the end")

run_script(main)
"""


def run(tmp_path, redirection, **variables):
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" "$2" {redirection}', sys.executable, SCRIPT, tmp_path / "end"],
        env=environment(**variables), capture_output=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&-", "| head -1", "2>&1 | head -1"])
def test_a_command_runs_with_streams_that_are_closed(tmp_path, redirection):
    code, _, err = run(tmp_path, redirection)
    assert code == 0 and (tmp_path / "end").read_text() == "the end"
    assert b"Traceback" not in err and b"Exception ignored" not in err and err.count(b"\n") <= 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8:strict", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(tmp_path, encoding):
    code, out, err = run(tmp_path, "", PYTHONIOENCODING=encoding)
    assert code == 0 and err.strip() == rb"caf\udce9"
    assert out.splitlines()[0] == (rb"line 0 " + ("猫".encode() if "utf" in encoding else rb"\u732b") + rb" \x1b[2J")


def test_a_full_disk_behind_stdout_is_an_error(tmp_path):
    code, _, err = run(tmp_path, "> /dev/full")
    assert code == 1 and err == b"error: cannot write to the standard output: No space left on device\n"


def test_messages_go_nowhere_where_there_is_no_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    terminal.complain("text")
    assert capsys.readouterr().out == ""
