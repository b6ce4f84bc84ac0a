"""Samples on disk: whole, resumable, and in a memory that does not grow with their number."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import small_disk
from script_helpers import run

from improved_diffusion.config import UserError
from improved_diffusion.sampling import writer
from improved_diffusion.sampling.labels import Labels
from improved_diffusion.sampling.names import numbered_name
from improved_diffusion.sampling.writer import write_samples
from improved_diffusion.utils import images

REQUEST = {"seed": 3, "model_sha256": "0123"}
LABELS = Labels(3, 3, [], ["cat", "dog", "owl"])


def picture(i, side=8, channels=3):
    """Image i: noise, so that its PNG is as large as it is."""
    return np.random.default_rng(i).integers(0, 256, (side, side, channels), dtype=np.uint8)


class Artist:
    """Draws `picture`, and remembers which were asked for."""

    def __init__(self, side=8, channels=3):
        self.side, self.channels = side, channels
        self.drawn = []

    def __call__(self, indices):
        self.drawn += indices
        return np.stack([picture(i, self.side, self.channels) for i in indices])


def write(folder, n, draw=None, labels=None, **more):
    draw = draw or Artist()
    settings = {"batch_size": 4, "request": REQUEST, **more}
    return write_samples(draw, out_dir=str(folder), numbers=range(n), labels=labels, **settings)


def check(folder, n, labels=None, side=8):
    """The folder holds samples 0..n-1 in each form, and nothing half-written."""
    with np.load(folder / f"samples_{n}x{side}x{side}x3.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], np.stack([picture(i, side) for i in range(n)]))
        assert arrays.files == (["arr_0", "arr_1"] if labels else ["arr_0"])
        if labels:
            assert arrays["arr_1"].tolist() == [labels.index(i) for i in range(n)]
            assert arrays["arr_1"].dtype == np.int64
    for i in range(n):
        path = folder / "samples" / numbered_name(i, labels.name(i) if labels else None)
        np.testing.assert_array_equal(images.decode_png(path.read_bytes()), picture(i, side))
    assert (folder / "samples.png").exists()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("labels", [None, LABELS])
def test_samples_are_written_as_npz_pngs_and_a_grid(tmp_path, labels):
    path = write(tmp_path, 6, labels=labels)
    assert path == str(tmp_path / "samples_6x8x8x3.npz")
    check(tmp_path, 6, labels)
    row = 65 if labels else 50  # with the class below each image
    assert images.decode_png((tmp_path / "samples.png").read_bytes()).shape == (2 * row + 2, 3 * 50 + 2, 3)


@pytest.mark.parametrize("n, columns, rows", [(49, 7, 7), (50, 10, 5), (100, 10, 10), (103, 10, 10)])
def test_the_grid_shows_the_first_hundred(tmp_path, n, columns, rows):
    write(tmp_path, n, batch_size=n)
    sheet = images.decode_png((tmp_path / "samples.png").read_bytes())
    assert sheet.shape == (rows * 50 + 2, columns * 50 + 2, 3)
    first = np.stack([picture(i) for i in range(min(n, 100))])
    np.testing.assert_array_equal(sheet, images.grid(first, columns, min_side=48))


def test_the_grid_shows_pairs_where_there_is_something_beside(tmp_path):
    small = [picture(i, side=4) for i in range(60)]
    write(tmp_path, 60, beside=lambda i: small[i])
    sheet = images.decode_png((tmp_path / "samples.png").read_bytes())
    assert sheet.shape == (10 * 50 + 2, 10 * 50 + 2, 3)  # fifty pairs
    np.testing.assert_array_equal(sheet[2:50, 2:50], small[0].repeat(12, axis=0).repeat(12, axis=1))
    np.testing.assert_array_equal(sheet[2:50, 52:100], picture(0).repeat(6, axis=0).repeat(6, axis=1))


# Memory


def peak_bytes(folder, n, side):
    pattern = picture(0, side)
    tracemalloc.start()
    try:
        write(folder, n, lambda indices: np.stack([pattern] * len(indices)), labels=LABELS, batch_size=50)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    few, many, side = 200, 4000, 32
    peak_bytes(tmp_path / "first", few, side)  # with what is imported and kept once
    # The smaller of two: Python's table of interned names, among which pathlib puts those of files, may grow in one.
    peaks = [peak_bytes(tmp_path / f"many{i}", many, side) for i in range(2)]
    growth = min(peaks) - peak_bytes(tmp_path / "few", few, side)
    assert growth < 0.1 * (many - few) * side * side * 3  # that of the names and labels


# Going on


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path):
    write(tmp_path, 3)
    artist = Artist()
    write(tmp_path, 6, artist)
    assert artist.drawn == [3, 4, 5]
    check(tmp_path, 6)
    again = Artist()
    write(tmp_path, 6, again)
    assert again.drawn == []
    check(tmp_path, 6)


def damage_by_cutting(data):
    return data[: len(data) // 2]


def damage_by_emptying(data):
    return b""


def damage_by_a_hole(data):
    """As a block that never reached the disk."""
    return data[:60] + bytes(len(data) - 90) + data[-30:]


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_emptying, damage_by_a_hole])
def test_damaged_pngs_are_made_again(tmp_path, damage, capsys):
    write(tmp_path, 6, labels=LABELS)
    pngs = sorted((tmp_path / "samples").iterdir(), key=lambda path: path.stem[-6:])
    for path in (pngs[1], pngs[4]):
        path.write_bytes(damage(path.read_bytes()))
    artist = Artist()
    write(tmp_path, 6, artist, LABELS)
    assert artist.drawn == [1, 4]
    check(tmp_path, 6, LABELS)
    said = capsys.readouterr().out
    assert f"2 damaged samples again, such as {pngs[1]}" in said
    assert "4 of 6 samples are in" in said


def test_a_png_damaged_while_others_are_made_is_named(tmp_path):
    write(tmp_path, 2)
    path = tmp_path / "samples/000001.png"

    class Careless(Artist):
        def __call__(self, indices):
            path.write_bytes(damage_by_a_hole(path.read_bytes()))
            return super().__call__(indices)

    with pytest.raises(UserError, match=rf"{path} is damaged: remove it and run the same command again"):
        write(tmp_path, 4, Careless())
    assert not (tmp_path / "samples_4x8x8x3.npz").exists() and not list(tmp_path.rglob("*.tmp"))
    write(tmp_path, 4)
    check(tmp_path, 4)


@pytest.mark.parametrize("odd", [1, 120])
@pytest.mark.parametrize("shape", [(9, 8, 3), (8, 8, 1)])
def test_an_image_of_another_size_is_named_once(tmp_path, odd, shape):
    write(tmp_path, 130, batch_size=130)
    path = tmp_path / "samples" / f"{odd:06d}.png"
    path.write_bytes(images.encode_png(np.zeros(shape, np.uint8)))
    (tmp_path / "samples_130x8x8x3.npz").unlink()
    with pytest.raises(UserError) as error:
        write(tmp_path, 130)
    assert str(error.value) == (
        f"{path} holds an image of {shape}, {tmp_path}/samples/000000.png one of (8, 8, 3) (height, width, channels): "
        "remove the one that is not a sample of this model and run the same command again"
    )
    assert not list(tmp_path.glob("samples_*"))
    path.unlink()
    write(tmp_path, 130)
    check(tmp_path, 130)


def test_samples_of_another_request_are_not_mixed_in(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(UserError, match=r"of --seed 3, but this command has --seed 4: choose another --out_dir"):
        write(tmp_path, 2, request={**REQUEST, "seed": 4})
    (tmp_path / writer.REQUEST_FILE).unlink()
    with pytest.raises(UserError, match=r"samples holds images of unknown origin: choose another --out_dir"):
        write(tmp_path, 2)
    (tmp_path / writer.REQUEST_FILE).write_text(json.dumps(REQUEST)[:-3])
    with pytest.raises(UserError, match=r"samples\.json is damaged: remove it"):
        write(tmp_path, 2)


# Several ranks

WORKER = """
import os, sys, threading
sys.path.insert(0, sys.argv[3])
from sampling.test_writer import LABELS, Artist, write

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.utils import files


class Drawer(Artist):
    def __call__(self, indices):
        if task == "draw" and rank == 1 and 6 in indices:
            raise UserError("rank 1 cannot draw 6")
        return super().__call__(indices)


def write_bytes(path, data, durable=True):
    if os.path.basename(path).endswith(".png") and "samples/" in str(path):
        written.append(str(path))
        if task == "write" and rank == 1:
            raise UserError("rank 1 cannot write")
        if task == "lost" and rank == 1:
            return
    original(path, data, durable)


def say(text):
    # A line at once: what two ranks print in parts comes out mixed.
    sys.stdout.flush()
    os.write(1, f"{text}\\n".encode())


def main():
    if task == "elsewhere" and rank == 1:
        folder.append("other")
    write("/".join(folder), 11, Drawer(), LABELS, batch_size=2)


folder, task = [sys.argv[1]], sys.argv[2]
distributed.setup_dist()
rank = distributed.get_rank()
original, files.write_bytes, written = files.write_bytes, write_bytes, []
try:
    main()
except UserError as error:
    say(f"rank {rank}: {error}")
say(f"rank {rank} wrote {len(written)}")
distributed.barrier()
"""


def sample_on_two_ranks(folder, task):
    """What both ranks print, as lines."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    tests = Path(__file__).parents[1]
    return run("mpiexec", 2, script, folder / "out", task, tests, cwd=folder, timeout=60).succeed().out.splitlines()


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[1]", b"null", b"5", b'"x"', b"[" * 200_000, b'{"seed":' * 200_000, b'{"seed": NaN}',
    b'{"seed": {"a": 1}}', b'{"seed": "\\ud800"}', b"\xff\xfe", b'{"seed": 3, "seed": 3}',
    b'{"seed": ' + b"9" * 10_000 + b"}",
], ids=range(14))  # fmt: skip
def test_a_damaged_request_is_named_and_nothing_is_lost(tmp_path, damage):
    write(tmp_path, 2)
    (tmp_path / "samples.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"samples\.json is damaged: remove it"):
        write(tmp_path, 2)
    assert (tmp_path / "samples.json").read_bytes() == damage and len(list((tmp_path / "samples").iterdir())) == 2


@pytest.mark.parametrize("held", [{"seed": None}, {"seed": "3"}, {}, {"other": "x" * 100}])
def test_a_request_of_other_values_is_another_one(tmp_path, held):
    write(tmp_path, 2)
    (tmp_path / "samples.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match="holds samples"):
        write(tmp_path, 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_request(tmp_path):
    (tmp_path / "samples").mkdir()
    os.mkfifo(tmp_path / "samples.json")
    with pytest.raises(UserError, match=r"samples\.json is a pipe"):
        write(tmp_path, 2)


def test_each_rank_writes_its_own_images(tmp_path):
    lines = sample_on_two_ranks(tmp_path, "all")
    assert "rank 0 wrote 6" in lines and "rank 1 wrote 5" in lines
    check(tmp_path / "out", 11, LABELS)


@pytest.mark.parametrize(
    ("task", "culprit"),
    [
        ("draw", "rank 1 cannot draw 6"),
        ("write", "rank 1 cannot write"),
        ("elsewhere", "does not see"),
        ("lost", "--out_dir that all hosts share"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_one_error_on_all(tmp_path, task, culprit):
    lines = [line for line in sample_on_two_ranks(tmp_path, task) if culprit in line]
    assert sorted(line[:7] for line in lines) == ["rank 0:", "rank 1:"]
    # The bar, which has no end of line, may stand behind the message.
    assert len({line[7:].replace("/other", "").partition("sampling:")[0] for line in lines}) == 1
    assert not list((tmp_path / "out").glob("*.npz"))


# Ctrl-C, kills, full disks


def interrupt_after(count):
    """An artist whom Ctrl-C stops once he has drawn as many."""

    class Interrupted(Artist):
        def __call__(self, indices):
            if len(self.drawn) >= count:
                raise KeyboardInterrupt
            return super().__call__(indices)

    return Interrupted()


def test_ctrl_c_says_what_is_saved(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt, match=rf"8 of 20 samples are in {tmp_path}/samples; rerun the same command"):
        write(tmp_path, 20, interrupt_after(8))
    monkeypatch.setattr(images, "decode_png", lambda data: interrupt_after(0)([0]))
    artist = Artist()
    with pytest.raises(KeyboardInterrupt, match=rf"20 of 20 samples are in {tmp_path}/samples; rerun the same command"):
        write(tmp_path, 20, artist)
    assert artist.drawn == list(range(8, 20))
    monkeypatch.undo()
    write(tmp_path, 20)
    check(tmp_path, 20)


def test_a_batch_is_written_while_the_next_is_drawn(tmp_path, monkeypatch):
    """As the artist sees: no more than one batch is on its way, and its files come without him waiting for them."""
    allowed, encode_png = threading.Event(), images.encode_png
    monkeypatch.setattr(images, "encode_png", lambda array: (allowed.wait(10), encode_png(array))[1])
    there = []

    class Watching(Artist):
        def __call__(self, indices):
            if indices[0] == 4:  # the first batch is held back until now
                there.append(len(list(tmp_path.glob("samples/*.png"))))
                allowed.set()
            elif indices[0] == 8:
                there.append(len(list(tmp_path.glob("samples/*.png"))))
            return super().__call__(indices)

    write(tmp_path, 12, Watching())
    assert there[0] == 0 and there[1] >= 4
    check(tmp_path, 12)


def test_what_is_drawn_is_written_when_drawing_fails(tmp_path):
    class Failing(Artist):
        def __call__(self, indices):
            if 8 in indices:
                raise UserError("the model is broken")
            return super().__call__(indices)

    with pytest.raises(UserError, match=r"the model is broken. 8 of 12 samples are in"):
        write(tmp_path, 12, Failing())
    assert len(list((tmp_path / "samples").iterdir())) == 8


@pytest.mark.parametrize("error", [UserError("the disk is full"), ZeroDivisionError("a bug")])
def test_an_error_in_a_writing_thread_is_raised_and_the_others_files_are_counted(error, tmp_path, monkeypatch):
    encode_png = images.encode_png

    def failing(array):
        if np.array_equal(array, picture(5)):
            raise error
        return encode_png(array)

    monkeypatch.setattr(images, "encode_png", failing)
    said = r"the disk is full\. 7 of 20 samples are in" if isinstance(error, UserError) else "a bug"
    with pytest.raises(type(error), match=said):
        write(tmp_path, 20)
    monkeypatch.undo()
    artist = Artist()
    write(tmp_path, 20, artist)
    assert artist.drawn == [5, *range(8, 20)]
    check(tmp_path, 20)


IN_ANOTHER_PROCESS = """
    import os, signal, sys
    from sampling.test_writer import LABELS, images, write

    folder, at, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    module, name = {"npz": (images.np.lib.format, "write_array"), "row": (images, "decode_png"),
                    "png": (images, "encode_png"), "rename": (os, "replace")}.get(at, (os, "replace"))
    function, calls = getattr(module, name), []

    def kill(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, kill)
    write(folder, 12, labels=LABELS)
"""


def in_another_process(folder, at="", count=-1):
    """12 samples, in a process that is killed when it comes to the count-th PNG, row, npz or rename."""
    command = [sys.executable, "-c", textwrap.dedent(IN_ANOTHER_PROCESS), str(folder), at, str(count)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


# Of 12 PNGs the grid's are decoded before the npz's; renamed are the request, the PNGs, the npz and the grid.
@pytest.mark.parametrize(
    "at, count, made",
    [("png", 7, 6), ("rename", 1 + 5, 4), ("row", 12 + 9, 12), ("npz", 1, 12), ("rename", 1 + 12 + 1, 12)],
)
def test_a_kill_leaves_no_damaged_file_and_the_same_command_finishes(tmp_path, at, count, made):
    process = in_another_process(tmp_path, at, count)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not list(tmp_path.glob("samples_*.npz")) and not (tmp_path / "samples.png").exists()
    assert len(list(tmp_path.glob(".samples_12x8x8x3.npz.*.tmp"))) == (made == 12)
    whole = {int(png.stem[-6:]) for png in (tmp_path / "samples").glob("[!.]*.png")}
    assert len(whole) <= made and (made < 12 or len(whole) == 12)  # other threads may have had some in hand
    artist = Artist()
    write(tmp_path, 12, artist, LABELS)
    assert artist.drawn == [i for i in range(12) if i not in whole]
    check(tmp_path, 12, LABELS)


def test_a_kill_leaves_the_npz_of_before(tmp_path):
    assert in_another_process(tmp_path).returncode == 0
    before = (tmp_path / "samples_12x8x8x3.npz").read_bytes()
    process = in_another_process(tmp_path, "row", 20)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "samples_12x8x8x3.npz").read_bytes() == before
    assert len(list(tmp_path.glob(".samples_12x8x8x3.npz.*.tmp"))) == 1
    write(tmp_path, 12, labels=LABELS)
    check(tmp_path, 12, LABELS)


def test_a_training_runs_half_written_files_are_left_alone(tmp_path):
    (tmp_path / ".model000010.pt.77.tmp").write_bytes(b"being written")
    write(tmp_path, 2)
    assert (tmp_path / ".model000010.pt.77.tmp").exists()


def test_two_processes_do_not_sample_into_one_folder(tmp_path):
    write(tmp_path, 2)
    other = in_another_process(tmp_path)
    assert other.returncode == 1
    assert (
        f"another run is writing into {tmp_path}: wait until it has ended, or choose another --out_dir" in other.stderr
    )


@pytest.mark.parametrize("kib, where", [(256, "png"), (512, "npz")])
def test_a_full_disk_is_one_clear_error_and_the_same_command_goes_on(kib, where):
    """Images of 12 KiB each way: 30 need 360 KiB as PNGs and as much as npz."""
    with small_disk(kib) as disk:
        folder, artist = disk / "out", Artist(side=64)
        with pytest.raises(UserError, match=r"No space left on device: free some space") as error:
            write(folder, 30, artist)
        message, there = str(error.value), {int(path.stem) for path in (folder / "samples").glob("*.png")}
        assert not list(folder.glob("samples_*")) and not list(folder.rglob("*.tmp"))
        if where == "png":
            assert 10 < len(there) < 30
            named = re.match(rf"cannot write {folder}/samples/(\d{{6}})\.png: ", message)
            assert named and int(named[1]) not in there  # threads write, so that any of the last ones may fail first
            assert f"{len(there)} of 30 samples are in {folder}/samples" in message
        else:
            assert len(there) == 30 and message.startswith(f"cannot write {folder}/samples_30x64x64x3.npz: ")
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)  # somebody has freed some space
        artist = Artist(side=64)
        write(folder, 30, artist)
        assert artist.drawn == sorted(set(range(30)) - there)
        check(folder, 30, side=64)
        assert sorted(os.listdir(folder)) == [
            ".samples.lock", "samples", "samples.json", "samples.png", "samples_30x64x64x3.npz",
        ]  # fmt: skip
