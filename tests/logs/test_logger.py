"""Key-value logging, and progress."""

import csv
import json
import os
import time

import pytest
import torch as th

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.logs import logger


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read(path):
    with open(path) as f:
        return f.read()


# Where


def test_default_outputs_are_stdout_log_csv_and_jsonl(tmp_path, capsys):
    logger.configure(dir=str(tmp_path))
    logger.logkv("loss", 0.5)
    logger.dumpkvs()
    logger.log("hello", 3)
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "progress.csv", "progress.jsonl"]
    text = read(tmp_path / "log.txt")
    assert "| loss | 0.5" in text and "hello 3\n" in text
    assert text == capsys.readouterr().out
    assert json.loads(read(tmp_path / "progress.jsonl")) == {"loss": 0.5}
    assert logger.get_dir() == str(tmp_path)


def test_every_named_output(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["json", "csv", "log"], log_suffix="-x")
    logger.logkvs({"b": 2, "a": th.tensor(1.5)})
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path)) == ["log-x.txt", "progress-x.csv", "progress-x.json"]
    assert json.loads(read(tmp_path / "progress-x.json")) == {"a": 1.5, "b": 2}
    with pytest.raises(ValueError, match=r"'xml'.*stdout, log, json, csv, jsonl"):
        logger.configure(dir=str(tmp_path), format_strs=["xml"])


def test_environment_names_the_outputs_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json")
    logger.configure()
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert logger.get_dir() == str(tmp_path / "run") and os.listdir(tmp_path / "run") == ["progress.json"]
    logger.configure(dir=str(tmp_path / "other"))
    assert logger.get_dir() == str(tmp_path / "other")


def test_without_a_name_the_folder_is_a_new_one_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger.configure(format_strs=[])
    assert os.path.dirname(logger.get_dir()) == str(tmp_path / "runs")
    logger.reset()
    assert logger.get_dir().startswith(str(tmp_path / "runs"))  # asking for it configures


def test_other_ranks_write_a_text_file_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    logger.configure(dir=str(tmp_path))
    logger.log("from rank 3")
    assert os.listdir(tmp_path) == ["log-rank003.txt"] and "from rank 3" in read(tmp_path / "log-rank003.txt")
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run.*--out_dir"):
        logger.configure(dir=str(tmp_path / "file" / "run"))


def test_before_configure_messages_go_to_stdout(capsys):
    logger.log("early")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert "early\n" in capsys.readouterr().out


# What


def test_values_are_overwritten_and_means_are_weighted(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv"])
    logger.logkv("a", 1)
    logger.logkv("a", 2)
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("m", value)
    assert logger.getkvs() == {"a": 2, "m": 3.0}
    assert logger.dumpkvs() == {"a": 2, "m": 3.0}
    assert logger.getkvs() == {}
    logger.logkv_mean("m", 10.0)  # a new row starts a new mean
    assert logger.dumpkvs() == {"m": 10.0}
    assert rows(tmp_path / "progress.csv") == [{"a": "2", "m": "3.0"}, {"a": "", "m": "10.0"}]


def test_csv_gets_new_columns_as_they_come(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv"])
    for row in ({"b": 1}, {"b": 2, "a": 3}, {"c": 4}, {"b": "x, y"}):
        logger.logkvs(row)
        logger.dumpkvs()
    table = rows(tmp_path / "progress.csv")
    assert list(table[0]) == ["b", "a", "c"]
    assert [[row[key] for key in "abc"] for row in table] == [["", "1", ""], ["3", "2", ""], ["", "", "4"],
                                                             ["", "x, y", ""]]  # fmt: skip


def test_a_run_that_goes_on_keeps_its_rows(tmp_path):
    for step in (1, 2):
        logger.configure(dir=str(tmp_path), format_strs=["csv", "log", "json"])
        logger.log(f"part {step}")
        logger.logkvs({"step": step, **({"new": 7} if step == 2 else {})})
        logger.dumpkvs()
        logger.reset()
    assert rows(tmp_path / "progress.csv") == [{"step": "1", "new": ""}, {"step": "2", "new": "7"}]
    assert "part 1" in read(tmp_path / "log.txt") and "part 2" in read(tmp_path / "log.txt")
    assert len(read(tmp_path / "progress.json").splitlines()) == 2


def test_a_table_has_its_keys_sorted_and_its_columns_aligned(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["log"])
    logger.logkvs({"b": 123456.0, "abc": "text", "loss_q0": 0.000123456})
    logger.dumpkvs()
    lines = [line for line in read(tmp_path / "log.txt").splitlines() if line.startswith(("|", "-"))]
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[1:-1]] == ["abc", "b", "loss_q0"]
    assert "1.23e+05" in lines[2] and "0.000123" in lines[3]
    logger.dumpkvs()  # an empty row writes nothing
    assert len(read(tmp_path / "log.txt").splitlines()) == len(lines) + 1


def test_levels(tmp_path, capsys):
    logger.configure(dir=str(tmp_path), format_strs=["stdout"])
    capsys.readouterr()
    for say in (logger.debug, logger.info, logger.warn, logger.error):
        say("a", 1)
    assert capsys.readouterr().out == "a 1\nwarning: a 1\nerror: a 1\n"
    logger.set_level(logger.ERROR)
    logger.warn("b")
    logger.error("b")
    assert capsys.readouterr().out == "error: b\n"
    logger.set_level(logger.DEBUG)
    logger.debug("c")
    assert capsys.readouterr().out == "c\n"
    logger.set_level(logger.DISABLED)
    logger.error("d")
    logger.logkv("x", 1)
    assert logger.dumpkvs() == {"x": 1} and capsys.readouterr().out == ""


def test_scoped_configure_returns_to_the_earlier_logger(tmp_path):
    logger.configure(dir=str(tmp_path / "a"), format_strs=["log"])
    outer = logger.get_current()
    logger.logkv("kept", 1)
    with logger.scoped_configure(dir=str(tmp_path / "b"), format_strs=["log"]):
        assert logger.get_dir() == str(tmp_path / "b") and logger.getkvs() == {}
        logger.log("inside")
    with pytest.raises(RuntimeError), logger.scoped_configure(dir=str(tmp_path / "c"), format_strs=[]):
        raise RuntimeError
    assert logger.get_current() is outer and logger.getkvs() == {"kept": 1}
    logger.log("outside")
    assert "inside" not in read(tmp_path / "a" / "log.txt") and "outside" in read(tmp_path / "a" / "log.txt")
    assert "inside" in read(tmp_path / "b" / "log.txt")


def test_profile_adds_the_seconds_of_a_block():
    @logger.profile("work")
    def work(x):
        """What it does."""
        with logger.profile_kv("inner"):
            time.sleep(0.02)
        return x + 1

    assert work(1) == 2 and work(x=2) == 3
    assert 0.04 <= logger.getkvs()["wait_inner"] <= logger.getkvs()["wait_work"] < 2
    with pytest.raises(RuntimeError), logger.profile_kv("failed"):
        raise RuntimeError
    assert "wait_failed" in logger.getkvs()


class OtherRank:
    """An MPI communicator of two ranks, of which the other has logged the given values with their counts."""

    def __init__(self, rank, values):
        self.rank, self.values = rank, values

    def gather(self, mine):
        return [mine, self.values] if self.rank == 0 else None


def test_a_communicator_averages_over_its_ranks(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv"], comm=OtherRank(0, {"a": (4.0, 3), "b": (2.0, 1)}))
    logger.logkv("a", 8.0)
    assert logger.dumpkvs() == {"a": 5.0, "b": 2.0}
    logger.set_comm(OtherRank(1, {}))
    logger.logkv("a", 8.0)
    assert logger.dumpkvs() == {}  # rank 0 writes
    assert len(rows(tmp_path / "progress.csv")) == 1


class Pictures:
    """An output of somebody else's, with all that an output may have."""

    def __init__(self):
        self.calls = []

    def writekvs(self, row):
        self.calls.append(row)

    def writeimage(self, name, image, step):
        self.calls.append((name, image, step))

    def drop_rows(self, first_step):
        self.calls.append(first_step)
        return 99

    def close(self):
        self.calls.append("closed")


def test_an_added_output_gets_rows_images_and_the_step_that_a_run_goes_on_from(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv", "log"])
    output, image = Pictures(), object()
    logger.add_output(output)
    for step in (1, 2, 3):
        logger.logkv("step", step)
        logger.dumpkvs()
    logger.log_image("samples", image, 3)
    assert logger.drop_rows(2) == 2
    logger.set_level(logger.DISABLED)
    logger.log_image("unseen", image, 4)
    logger.reset()
    assert output.calls == [{"step": 1}, {"step": 2}, {"step": 3}, ("samples", image, 3), 2, "closed"]


# Rows that have been begun


@pytest.mark.parametrize("anew", [False, True])
def test_a_row_goes_on_where_a_run_gets_its_folder(tmp_path, anew):
    if anew:
        logger.configure(dir=str(tmp_path / "run"), format_strs=["csv"])
    else:
        held = logger.hold(str(tmp_path / "run"), ["csv"])
    logger.logkvs({"step": 6, "val_loss": 0.5})
    logger.logkv_mean("loss", 1.0)
    logger.defer(lambda: {"late": 7})
    if anew:
        logger.configure_anew()
    else:
        logger.configure(str(tmp_path / "run"), ["csv"], held=held)
    logger.logkv_mean("loss", 2.0)
    logger.logkv("step", 7)
    logger.dumpkvs()
    (row,) = rows(tmp_path / ("run-2" if anew else "run") / "progress.csv")
    assert row == {"late": "7", "loss": "1.5", "step": "7", "val_loss": "0.5"}


def test_another_configuration_begins_a_row_of_its_own(tmp_path):
    logger.configure(dir=str(tmp_path / "one"), format_strs=["csv"])
    logger.logkv("a", 1)
    logger.configure(dir=str(tmp_path / "two"), format_strs=["csv"])
    assert logger.getkvs() == {}


@pytest.mark.parametrize("name", ["progress.csv", "progress.jsonl", "log.txt"])
def test_a_folder_in_the_place_of_a_file_of_the_log_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{name}: it is a folder.*: remove"):
        logger.configure(dir=str(tmp_path), format_strs=["csv", "jsonl", "log"])
