"""Sets of checkpoint files: whole or not there, whatever happens while they are written, and which are kept."""

import io
import json
import os
import random
import shutil
import sys
import threading

import pytest
import torch as th
from helpers import small_disk

from improved_diffusion.checkpoints import checkpoint, sets
from improved_diffusion.checkpoints.sets import (
    SetWriter,
    complete_sets,
    newest_whole_set,
    problem_of,
    prune,
    read_manifest,
    rename_newer,
    step_of,
    write_set,
)
from improved_diffusion.config import UserError
from improved_diffusion.utils import files

LABELS = ["0.9"]


def parts(step, value=0.0, size=64):
    """The parts of a small set."""
    state_dict = {"weight": th.full((size,), float(value))}
    return [
        (checkpoint.model_name(step), checkpoint.describe(state_dict, {"step": step})),
        (checkpoint.ema_name("0.9", step), checkpoint.describe(state_dict, {"step": step})),
        (checkpoint.optimizer_name(step), {"state": {0: {"exp_avg": th.zeros(size)}}}),
    ]


def folder_of_sets(folder, *steps, labels=LABELS, own=True):
    """A folder with these sets; `own`: with the config.json of our runs."""
    folder.mkdir(exist_ok=True)
    if own:
        (folder / "config.json").write_text("{}")
    for step in steps:
        write_set(str(folder), step, step, parts(step, step))
    return str(folder)


def names(folder):
    return sorted(os.listdir(folder))


class Log(list):
    """Collects messages."""

    def __call__(self, message):
        self.append(message)


def writer(folder, **kwargs):
    log, warnings = Log(), Log()
    made = SetWriter(str(folder), log, warnings, **kwargs)
    return made, log, warnings


def test_a_set_has_a_manifest_with_the_sizes_and_checksums_of_its_files(tmp_path):
    write_set(str(tmp_path), 7, 8, parts(7))
    assert names(tmp_path) == ["ema_0.9_000007.pt", "manifest000007.json", "model000007.pt", "opt000007.pt"]
    manifest = json.loads((tmp_path / "manifest000007.json").read_text())
    assert manifest["step"] == 8 and read_manifest(str(tmp_path), 7) == manifest
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: os.path.getsize(tmp_path / name) for name in names(tmp_path) if name.endswith(".pt")
    }
    assert problem_of(str(tmp_path), 7) is None


def test_no_file_of_a_set_is_visible_before_all_are_written(tmp_path):
    seen = []

    def watched():
        for part in parts(3):
            seen.append([name for name in names(tmp_path) if not name.startswith(".")])
            yield part

    write_set(str(tmp_path), 3, 3, watched())
    assert seen == [[], [], []] and len(names(tmp_path)) == 4


def crash_at_rename(monkeypatch, at):
    """The process ends at the at-th rename from now on."""
    replace, calls = os.replace, []

    def crash(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", crash)


@pytest.mark.parametrize("at", range(4))
def test_a_crash_between_renames_leaves_no_set(tmp_path, monkeypatch, at):
    """The first save of a run: nothing is there, or everything is."""
    folder = folder_of_sets(tmp_path / "run")
    crash_at_rename(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        write_set(folder, 5, 5, parts(5))
    monkeypatch.undo()
    assert complete_sets(folder, LABELS) == ([] if at < 3 else [5])  # without its manifest alone it is whole
    assert not [name for name in names(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("at", range(4))
def test_a_crash_while_a_set_is_replaced_is_noticed(tmp_path, monkeypatch, at):
    """A set of the same number, of a step later: the older one before it still counts."""
    folder = folder_of_sets(tmp_path / "run", 1, 5)
    crash_at_rename(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        write_set(folder, 5, 6, parts(5, 99.0, size=64))
    monkeypatch.undo()
    warnings = Log()
    newest = newest_whole_set(folder, LABELS, warnings)
    assert newest == (5 if at == 0 else 1)
    assert len(warnings) == (0 if at == 0 else 1)


def test_a_full_disk_leaves_the_older_sets_whole_and_no_rubbish():
    with small_disk(200) as disk:
        folder = folder_of_sets(disk / "run", 1)
        before = names(folder)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device: free some space"):
            write_set(folder, 2, 2, parts(2, size=40_000))
        assert names(folder) == before
        assert newest_whole_set(folder, LABELS, Log()) == 1


# Finding and verifying


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("part", range(3))
def test_a_part_cut_at_any_byte_makes_the_set_before_the_newest(tmp_path, part, seed):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    path = os.path.join(folder, parts(2)[part][0])
    data = files.read_bytes(path)
    kept = random.Random(seed).randrange(len(data))
    with open(path, "wb") as f:
        f.write(data[:kept])
    warnings = Log()
    assert newest_whole_set(folder, LABELS, warnings) == 1
    assert warnings == [
        f"skipped the damaged checkpoint of step 2: {path} has {kept} bytes, not the {len(data)} that were written"
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("part", range(3))
def test_a_flipped_bit_makes_the_set_before_the_newest(tmp_path, part, seed):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    path = os.path.join(folder, parts(2)[part][0])
    data = bytearray(files.read_bytes(path))
    data[random.Random(seed).randrange(len(data))] ^= 1 << seed
    with open(path, "wb") as f:
        f.write(data)
    warnings = Log()
    assert newest_whole_set(folder, LABELS, warnings) == 1
    assert path in warnings[0] and "checksum" in warnings[0]


@pytest.mark.parametrize("missing", ["model000002.pt", "opt000002.pt", "ema_0.9_000002.pt", "manifest000002.json"])
def test_a_set_without_all_its_parts_is_not_there(tmp_path, missing):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    os.remove(os.path.join(folder, missing))
    assert complete_sets(folder, LABELS) == [1]
    assert newest_whole_set(folder, LABELS, Log()) == 1


def test_a_part_that_only_the_manifest_knows_is_missed(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    os.remove(os.path.join(folder, "ema_0.9_000002.pt"))
    warnings = Log()
    assert complete_sets(folder, []) == [1, 2] and newest_whole_set(folder, [], warnings) == 1
    assert "ema_0.9_000002.pt is missing" in warnings[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 2}', '{"step": 2, "files": {"model000002.pt": 3}}'])
def test_a_damaged_manifest_makes_the_set_before_the_newest(tmp_path, content):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    with open(os.path.join(folder, "manifest000002.json"), "w") as f:
        f.write(content)
    warnings = Log()
    assert newest_whole_set(folder, LABELS, warnings) == 1
    assert "manifest000002.json is damaged" in warnings[0]


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"step": Infinity, "files": {}}',
        '{"step": 1e999, "files": {}}',
        '{"step": -1, "files": {}}',
        '{"step": true, "files": {}}',
        '{"step": "2", "files": {}}',
        '{"step": 2, "files": []}',
        '{"step": 2, "files": {"\\ud800": {"bytes": 1, "sha256": "x"}}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_manifest_that_cannot_be_is_damaged(tmp_path, content):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    content = content if isinstance(content, bytes) else content.encode()
    files.write_bytes(os.path.join(folder, "manifest000002.json"), content)
    warnings = Log()
    assert read_manifest(folder, 2) is None and newest_whole_set(folder, LABELS, warnings) == 1
    assert len(warnings) == 1 and "manifest000002.json is damaged" in warnings[0]


def with_entry(folder, name, **changes):
    """The manifest of step 2 lists this too."""
    path = os.path.join(folder, "manifest000002.json")
    manifest = json.loads(files.read_bytes(path))
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64, **changes}
    files.write_bytes(path, json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../run/model000002.pt", "ema_/../../model000002.pt", "ema_..\\x_000002.pt", "model000001.pt",
     "config.json", "", ".", "model" + "9" * 5000 + ".pt", "model000002.pt\n"],
)  # fmt: skip
def test_a_manifest_lists_plain_files_of_its_set_alone(tmp_path, name):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    with_entry(folder, name)
    assert read_manifest(folder, 2) is None and newest_whole_set(folder, LABELS, Log()) == 1
    before = names(folder)
    prune(folder, 2, 1, 0)
    assert "model000002.pt" in names(folder) and "config.json" in names(folder) and before != names(folder)


@pytest.mark.parametrize(
    "changes", [{"bytes": -1}, {"bytes": 10**30}, {"bytes": 1.5}, {"bytes": True}, {"sha256": "x"}, {"sha256": None}]
)
def test_a_manifest_holds_sizes_and_checksums(tmp_path, changes):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    with_entry(folder, "model000002.pt", **changes)
    assert read_manifest(folder, 2) is None and newest_whole_set(folder, LABELS, Log()) == 1


def test_a_file_of_another_size_is_not_read(tmp_path, monkeypatch):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    os.truncate(os.path.join(folder, "model000002.pt"), 2**33)  # takes no space on the disk
    digest, read = files.sha256, []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or digest(path))
    assert newest_whole_set(folder, LABELS, Log()) == 1
    assert read and os.path.join(folder, "model000002.pt") not in read


@pytest.mark.parametrize("name", ["model000002.pt", "opt000002.pt", "manifest000002.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "broken link"])
def test_what_is_no_plain_file_makes_the_set_before_the_newest(tmp_path, kind, name):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    path = os.path.join(folder, name)
    os.remove(path)
    {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "device": lambda path: os.symlink("/dev/zero", path),
        "broken link": lambda path: os.symlink("nowhere", path),
    }[kind](path)
    warnings = Log()
    assert newest_whole_set(folder, LABELS, warnings) == 1
    assert len(warnings) == 1 and path in warnings[0]


@pytest.mark.parametrize("labels", [LABELS, []])
@pytest.mark.parametrize("missing", ["model000002.pt", "opt000002.pt", "ema_0.9_000002.pt", "manifest000002.json"])
def test_a_set_without_a_part_is_skipped_aloud(tmp_path, missing, labels):
    folder = folder_of_sets(tmp_path / "run", 1, 2)
    os.remove(os.path.join(folder, missing))
    warnings = Log()
    assert newest_whole_set(folder, labels, warnings) == 1
    assert len(warnings) == 1 and f"{os.path.join(folder, missing)} is missing" in warnings[0]


def test_many_skipped_sets_are_a_few_lines(tmp_path):
    folder = folder_of_sets(tmp_path / "run", *range(1, 31))
    for step in range(2, 31):
        os.remove(os.path.join(folder, checkpoint.ema_name("0.9", step)))
    warnings = Log()
    assert newest_whole_set(folder, LABELS, warnings) == 1
    assert len(warnings) == sets.MAX_WARNED + 1 and str(29 - sets.MAX_WARNED) in warnings[-1]


@pytest.mark.parametrize(
    "content",
    ["", "[" * 10**5, "[]", "5", '{"config": 5}', '{"config": {"ema_rate": [1]}}', '{"config": {"ema_rate": NaN}}'],
)
def test_a_damaged_config_of_a_run_is_one_error(tmp_path, content):
    folder = folder_of_sets(tmp_path / "run", 1)
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged.*remove it") as error:
        sets.average_labels(folder, 1)
    assert str(error.value).isprintable()


def test_where_no_set_is_whole_there_is_none(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 1)
    os.truncate(os.path.join(folder, "opt000001.pt"), 10)
    assert newest_whole_set(folder, LABELS, Log()) is None
    assert newest_whole_set(str(tmp_path / "nowhere"), LABELS, Log()) is None


def test_sets_of_other_code_need_no_manifest(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 1, 2, own=False)
    for step in (1, 2):
        os.remove(os.path.join(folder, f"manifest{step:06d}.json"))
    assert complete_sets(folder, LABELS) == [1, 2]
    assert problem_of(folder, 2) is None and newest_whole_set(folder, LABELS, Log()) == 2
    os.remove(os.path.join(folder, "ema_0.9_000002.pt"))
    assert complete_sets(folder, LABELS) == [1] and complete_sets(folder, []) == [1, 2]
    assert complete_sets(folder, ["0.9", "0.99"]) == []


@pytest.mark.parametrize(
    "path, step",
    [("model000010.pt", 10), ("a/b/opt1234567.pt", 1234567), ("runs/x/ema_0.9999_000005.pt", 5),
     ("ema_sigma_rel0.05_000005.pt", 5), ("best.pt", None), ("model10.pt", None), ("model000010.json", None)],
)  # fmt: skip
def test_every_file_of_a_set_names_its_step(path, step):
    assert step_of(path) == step


# Keeping


@pytest.mark.parametrize(
    "last, every, left",
    [(0, 0, [0, 10, 20, 30, 40]), (2, 0, [30, 40]), (1, 20, [0, 20, 40]), (9, 0, [0, 10, 20, 30, 40])],
)
def test_which_sets_are_kept(tmp_path, last, every, left):
    folder = folder_of_sets(tmp_path / "run", 0, 10, 20, 30, 40)
    removed = prune(folder, 40, last, every)
    assert complete_sets(folder, LABELS) == left
    assert sorted(removed + left) == [0, 10, 20, 30, 40]
    kept = {"config.json", *(name for step in left for name, _ in parts(step))}
    assert set(names(folder)) == kept | {sets.manifest_name(step) for step in left}


@pytest.mark.parametrize(
    "removals, counted", [(0, [10, 20, 30]), (1, [20, 30]), (2, [20, 30]), (3, [20, 30]), (4, [20, 30]), (5, [30])]
)
def test_removing_that_was_cut_short_is_finished_the_next_time(tmp_path, monkeypatch, removals, counted):
    """By a kill after any of the files; until then the set that is half removed does not count as one."""
    folder, whole = (folder_of_sets(tmp_path / name, 10, 20, 30) for name in ("run", "whole"))
    remove, left = files.remove, iter(range(removals))

    def until_killed(path):
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove", until_killed)
        prune(folder, 30, 1, 0)
    assert complete_sets(folder, LABELS) == counted
    prune(folder, 30, 1, 0)
    prune(whole, 30, 1, 0)
    assert names(folder) == names(whole)


def test_snapshots_of_power_function_averages_outlive_their_sets(tmp_path):
    folder = folder_of_sets(tmp_path / "run")
    for step in (1, 2):
        snapshot = (f"ema_sigma_rel0.05_{step:06d}.pt", {"weight": th.zeros(2)})
        write_set(folder, step, step, [*parts(step), snapshot])
    prune(folder, 2, 1, 0)
    assert "ema_sigma_rel0.05_000001.pt" in names(folder) and "model000001.pt" not in names(folder)


def test_files_of_nobodys_set_are_left_alone(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 1, 2, 3)
    os.remove(os.path.join(folder, "manifest000001.json"))
    shutil.copy(os.path.join(folder, "model000002.pt"), os.path.join(folder, "best.pt"))
    prune(folder, 3, 1, 0)
    assert {"model000001.pt", "opt000001.pt", "best.pt"} <= set(names(folder))
    assert complete_sets(folder, LABELS) == [1, 3]  # older than any manifest, as other code's


def test_sets_after_the_one_just_written_neither_count_nor_go(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 10, 20, 30, 50)
    assert prune(folder, 30, 2, 0) == [10]
    assert complete_sets(folder, LABELS) == [20, 30, 50]


def test_newer_sets_are_renamed_and_lose_nothing(tmp_path):
    folder = folder_of_sets(tmp_path / "run", 10, 20)
    snapshot = ("ema_sigma_rel0.05_000030.pt", {"weight": th.zeros(2)})
    write_set(folder, 30, 30, [*parts(30), snapshot])
    before = names(folder)
    assert rename_newer(folder, 10) == ["manifest000020.json", "manifest000030.json"]
    assert complete_sets(folder, LABELS) == [10]
    later = ("000020.pt", "000020.json", "000030.pt", "000030.json")
    assert names(folder) == sorted(f"{name}.newer" if name.endswith(later) else name for name in before)
    assert rename_newer(folder, 10) == [] == rename_newer(str(tmp_path / "nowhere"), 0)


# In the background


def test_a_set_is_written_while_others_work(tmp_path, monkeypatch):
    go_on = threading.Event()
    together = files.write_together

    def slow(*args):
        assert go_on.wait(30)
        together(*args)

    monkeypatch.setattr(files, "write_together", slow)
    made, log, warnings = writer(tmp_path)
    made.submit(1, 1, parts(1))
    made.collect()
    assert log == [] and made.last_saved is None and names(tmp_path) == []
    go_on.set()
    made.wait()
    assert log == [f"saved {tmp_path / 'model000001.pt'}"] and warnings == []
    assert made.last_saved == str(tmp_path / "model000001.pt")
    assert complete_sets(str(tmp_path), LABELS) == [1]


def test_a_set_waits_for_the_one_before(tmp_path):
    made, log, _ = writer(tmp_path, keep_last=2)
    for step in range(5):
        made.submit(step, step, parts(step))
    made.finish()
    assert complete_sets(str(tmp_path), LABELS) == [3, 4] and len(log) == 5


def test_the_set_before_the_newest_stays_until_the_run_goes_on(tmp_path):
    """Whether the newest one's weights work is known only after another step."""
    made, _, _ = writer(tmp_path, keep_last=1)
    for step in range(4):
        made.submit(step, step, parts(step))
        made.wait()
        assert complete_sets(str(tmp_path), LABELS) == [step - 1, step][step == 0 :]
    made.finish(prune=False)
    assert complete_sets(str(tmp_path), LABELS) == [2, 3]
    made.finish()
    assert complete_sets(str(tmp_path), LABELS) == [3]


def test_the_newest_set_before_a_step_is_known(tmp_path):
    made, _, _ = writer(tmp_path)
    assert made.last_before(9) is None
    for step in (2, 4):
        made.submit(step, step + 1, parts(step))
    made.finish()
    found = {done: made.last_before(done) for done in (3, 4, 5, 6)}
    two, four = (str(tmp_path / f"model00000{step}.pt") for step in (2, 4))
    assert found == {3: None, 4: two, 5: two, 6: four}


@pytest.mark.parametrize("at", range(4))
def test_what_a_failed_save_has_left_is_removed_after_the_next(tmp_path, monkeypatch, at):
    folder = folder_of_sets(tmp_path / "run", 1)
    (tmp_path / "run/model000005.pt").write_bytes(b"of other code")
    made, _, _ = writer(folder)
    replace, left = os.replace, [at]

    def fail(source, target):
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        replace(source, target)

    for step in (2, 5):
        with monkeypatch.context() as patch:
            left[0] = at
            patch.setattr(os, "replace", fail)
            made.submit(step, step, parts(step))
            made.wait()
    kept = names(folder)
    made.submit(6, 6, parts(6))
    made.finish()
    assert complete_sets(folder, LABELS) == [1, 6] and made.partial == set()
    assert {name for name in kept if not name.endswith(("2.pt", "5.pt"))} < set(names(folder))
    assert not [name for name in names(folder) if name.endswith(("2.pt", "5.pt")) and name != "model000005.pt"]
    assert "model000005.pt" in names(folder)  # it was there before


def test_a_save_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    began, go_on, to_bytes = threading.Event(), threading.Event(), checkpoint.to_bytes

    def slow(part):
        began.set()
        assert go_on.wait(30)
        return to_bytes(part)

    monkeypatch.setattr(checkpoint, "to_bytes", slow)
    made, _, warnings = writer(tmp_path)
    made.submit(1, 1, parts(1))
    assert began.wait(30)
    threading.Timer(0.2, go_on.set).start()
    made.close()
    assert made.thread is None and names(tmp_path) == [] and warnings == []
    made.submit(2, 2, parts(2))
    made.finish()
    assert complete_sets(str(tmp_path), LABELS) == [2]


def failing(monkeypatch, times):
    """The next `times` sets cannot be written."""
    together, left = files.write_together, [times]

    def fail(*args):
        if left[0]:
            left[0] -= 1
            raise UserError("cannot write it: No space left on device")
        together(*args)

    monkeypatch.setattr(files, "write_together", fail)


def test_two_failures_are_warnings_and_the_third_in_a_row_ends_the_run(tmp_path, monkeypatch):
    made, _, warnings = writer(tmp_path)
    made.submit(0, 1, parts(0))
    made.wait()
    failing(monkeypatch, 3)
    for step in (1, 2):
        made.submit(step, step, parts(step))
        made.wait()
    assert len(warnings) == 2 and all("retried at the next interval" in text for text in warnings)
    made.submit(3, 3, parts(3))
    with pytest.raises(UserError, match=r"3 saves in a row.*No space left.*last good checkpoint: .*model000000\.pt"):
        made.wait()


def test_a_save_that_works_again_starts_the_count_anew(tmp_path, monkeypatch):
    made, _, warnings = writer(tmp_path)
    for step in range(6):
        if step % 3 == 0:
            failing(monkeypatch, 2)
        made.submit(step, step, parts(step))
        made.wait()
    assert len(warnings) == 4 and complete_sets(str(tmp_path), LABELS) == [2, 5]


def test_the_last_save_may_not_fail(tmp_path, monkeypatch):
    made, _, _ = writer(tmp_path)
    failing(monkeypatch, 1)
    made.submit(9, 9, parts(9))
    with pytest.raises(UserError, match=r"No space left.*last good checkpoint: none"):
        made.finish()


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    made, _, _ = writer(tmp_path)
    made.submit(1, 1, [("model000001.pt", lambda: None)])  # torch.save cannot pickle it
    with pytest.raises(Exception, match=r"pickle|local object"):
        made.finish()


def test_a_file_beside_a_set_is_written_before_it(tmp_path):
    made, log, _ = writer(tmp_path)
    made.write_beside("best.pt", {"weight": th.zeros(2)})
    made.write_beside("best.pt", {"weight": th.ones(2)})
    assert names(tmp_path) == []
    made.submit(1, 1, parts(1))
    made.finish()
    assert log == [f"saved {tmp_path / 'model000001.pt'}"] and made.beside == {}
    assert th.load(tmp_path / "best.pt", weights_only=True)["weight"].tolist() == [1, 1]


def test_a_file_beside_a_set_that_cannot_be_written_is_tried_again_with_the_next(tmp_path, monkeypatch):
    made, _, warnings = writer(tmp_path)
    made.write_beside("best.pt", {"weight": th.ones(2)})
    failing(monkeypatch, 1)
    for step in (1, 2):
        made.submit(step, step, parts(step))
        made.wait()
    assert len(warnings) == 1 and complete_sets(str(tmp_path), LABELS) == [2]
    assert "best.pt" in names(tmp_path)


def described(step, value):
    return checkpoint.describe({"weight": th.full([2], value)}, {} if step is None else {"step": step})


def value_of(path):
    return th.load(path, weights_only=True)["weight"].tolist()[0]


@pytest.mark.parametrize(
    "start, before, kept", [
        (0, None, True), (0, 6, True), (0, 0, False), (3, 3, False), (3, 2, False), (3, 4, True), (3, 60, True),
    ],
)  # fmt: skip
def test_a_file_beside_the_sets_from_after_a_runs_start_is_kept(tmp_path, start, before, kept):
    checkpoint.save(described(before, 1.0), str(tmp_path / "best.pt"))
    made, _, warnings = writer(tmp_path)
    made.start = start
    for step in (start + 5, start + 9):  # what the run itself has written is written over
        made.write_beside("best.pt", described(step, float(step)))
        made.submit(step, step, parts(step))
        made.finish()
    assert value_of(tmp_path / "best.pt") == start + 9
    assert [value_of(path) for path in tmp_path.glob("*.newer*")] == [1.0] * kept
    assert len(warnings) == kept and all("best.pt.newer" in text for text in warnings)


def test_a_file_that_was_kept_before_is_kept_too(tmp_path):
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(described(9, value), str(tmp_path / "best.pt"))
        made, _, _ = writer(tmp_path)
        made.write_beside("best.pt", described(1, 0.0))
        made.submit(1, 1, parts(1))
        made.finish()
    assert sorted(value_of(path) for path in tmp_path.glob("best.pt.newer*")) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("content", [b"", b"text", b"PK damaged"])
def test_a_file_beside_the_sets_that_cannot_be_read_is_kept(tmp_path, content):
    (tmp_path / "best.pt").write_bytes(content)
    made, _, _ = writer(tmp_path)
    made.write_beside("best.pt", described(1, 0.0))
    made.submit(1, 1, parts(1))
    made.finish()
    assert (tmp_path / "best.pt.newer").read_bytes() == content


def test_older_sets_that_cannot_be_removed_are_told_of_and_count_as_no_failure(tmp_path, monkeypatch):
    def forbidden(path):
        raise UserError(f"cannot remove {path}: Permission denied")

    monkeypatch.setattr(files, "remove", forbidden)
    made, log, warnings = writer(tmp_path, keep_last=1)
    for step in range(5):
        made.submit(step, step, parts(step))
    made.finish()
    assert len(log) == 5 and made.failures == 0 and len(warnings) == 4
    assert "cannot remove" in warnings[0]


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), OSError(116, "Stale file handle")])
def test_storage_that_is_gone_is_a_failed_save(tmp_path, monkeypatch, error):
    made, _, warnings = writer(tmp_path)
    made.submit(1, 1, parts(1))
    made.wait()

    def gone(*args, **kwargs):
        raise error

    for function in ("replace", "fsync", "unlink", "listdir"):
        monkeypatch.setattr(os, function, gone)
    made.submit(2, 2, parts(2))
    made.wait()
    monkeypatch.undo()
    assert len(warnings) == 1 and error.strerror in warnings[0]
    assert newest_whole_set(str(tmp_path), LABELS, Log()) == 1


# On blob storage


class BlobStorage:
    """As much of blobfile as a dictionary can do."""

    class Error(Exception):
        pass

    def __init__(self):
        self.blobs, self.broken = {}, False

    def _check(self):
        if self.broken:
            raise self.Error("the service does not answer")

    def exists(self, path):
        self._check()
        return path in self.blobs or self.isdir(path)

    def isdir(self, path):
        return any(name.startswith(path.rstrip("/") + "/") for name in self.blobs)

    def listdir(self, path):
        self._check()
        return [name[len(path) + 1 :] for name in self.blobs]

    def makedirs(self, path):
        self._check()

    def remove(self, path):
        self._check()
        del self.blobs[path]

    def copy(self, path, new_path, overwrite):
        self.blobs[new_path] = self.blobs[path]

    def BlobFile(self, path, mode, streaming):
        storage = self

        class Blob(io.BytesIO):
            def close(self):
                if mode == "wb":
                    storage._check()
                    storage.blobs[path] = self.getvalue()
                super().close()

        self._check()
        return Blob(self.blobs[path] if mode == "rb" else b"")


def test_sets_on_blob_storage_are_written_verified_pruned_and_renamed(monkeypatch):
    storage = BlobStorage()
    monkeypatch.setitem(sys.modules, "blobfile", storage)
    folder = "gs://bucket/run"
    made, log, warnings = writer(folder, keep_last=2)
    for step in (1, 2, 3):
        made.submit(step, step, parts(step))
    made.wait()
    assert complete_sets(folder, LABELS) == [2, 3] and len(log) == 3
    storage.blobs[f"{folder}/opt000003.pt"] = storage.blobs[f"{folder}/opt000003.pt"][:-1]
    damaged = Log()
    assert newest_whole_set(folder, LABELS, damaged) == 2 and "opt000003.pt has" in damaged[0]
    assert rename_newer(folder, 2) == ["manifest000003.json"] and complete_sets(folder, LABELS) == [2]
    storage.broken = True
    made.submit(4, 4, parts(4))
    made.wait()
    assert len(warnings) == 1 and "the service does not answer" in warnings[0]
    storage.broken = False
    made.submit(5, 5, parts(5))
    made.finish()
    assert complete_sets(folder, LABELS) == [2, 5]
