"""The notebooks run, and the API in a notebook: a kernel runs the cells, and is interrupted as by the stop button."""

import base64
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time

import jupytext
import nbformat
import numpy as np
import pytest
from helpers import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from PIL import Image
from script_helpers import write_images

import improved_diffusion as idf
from improved_diffusion.cli import image_sample

TINY = (
    "image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult='1,1', attention_resolutions='4', "
    "diffusion_steps=20, noise_schedule='cosine', num_workers=0, batch_size=4"
)


@pytest.fixture
def notebook(tmp_path):
    """A notebook's client in a folder with photos: `run(source)` runs a cell and returns its outputs as text."""
    write_images(tmp_path / "photos", 12)
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=150, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        yield client


def run(client, source):
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    return cell.outputs


def text(outputs):
    return "".join(output.get("text", "") or str(output.get("data", {}).get("text/plain", "")) for output in outputs)


def test_training_sampling_and_ctrl_c(notebook, tmp_path):
    run(notebook, "import improved_diffusion as idf")
    run(notebook, f"model = idf.train('photos', max_steps=2, out_dir='run', {TINY})")
    shown = run(notebook, "model.sample(4, sampler='ddim', steps=2)")
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert text(run(notebook, "try:\n    model.sample(1, steps=99)\nexcept idf.UserError as e:\n    print(e)")).count(
        "99"
    )

    # The stop button, in the midst of training.
    def interrupt():
        while not list((tmp_path / "long").glob("model*.pt")):
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(notebook.km.provisioner.pid, signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    run(notebook, f"model = idf.train('photos', max_steps=1_000_000, out_dir='long', {TINY})")
    thread.join(timeout=10)
    stopped = int(text(run(notebook, "print(model.step)")))
    assert 0 < stopped < 1_000_000
    # The prompt is back, and the run goes on from there.
    more = run(notebook, f"idf.train('photos', max_steps={stopped + 2}, out_dir='long', resume='auto', num_workers=0)")
    assert f"step {stopped + 2}" in text(more)


# The notebooks

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.py"))}
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
SMALL_NETWORK = dict(
    image_size=8, channel_mult="1,1", attention_resolutions="4", batch_size=32, diffusion_steps=20, log_interval=2
)
SMALL = {
    "train_digits": dict(MAX_STEPS=12, SAVE_INTERVAL=4, STEPS=2, SMALLER=SMALL_NETWORK),
    "sample_and_edit": dict(STEPS=2, ENCODE_STEPS=2, RESAMPLINGS=1),
    "evaluate": dict(NUM_SAMPLES=40, STEPS=(1, 2), CLASSIFIER_STEPS=2, NUM_BITS=2),
}
# As at a disconnect: the kernel dies as soon as the first checkpoint is there.
DISCONNECT = """
import os, signal, threading, time

def disconnect():
    while not os.path.exists("digits/run/manifest000004.json"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=disconnect, daemon=True).start()
"""


def read_notebook(name):
    return jupytext.read(NOTEBOOKS[name])


def cell_with(cells, part):
    """The only code cell whose source has a part."""
    [found] = [cell for cell in cells if cell.cell_type == "code" and part in cell.source]
    return found


def position_of_parameters(cells):
    [position] = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    return position


def execute(name, folder, extra=""):
    """The cells of a notebook after it ran in a folder, with small sizes in place of its parameters."""
    book = read_notebook(name)
    small = "".join(f"{key} = {value!r}\n" for key, value in SMALL[name].items())
    book.cells.insert(position_of_parameters(book.cells) + 1, nbformat.v4.new_code_cell(small + extra))
    NotebookClient(book, timeout=150, resources={"metadata": {"path": str(folder)}}).execute()
    return book.cells


def pictures(cell):
    """The pictures that a cell shows, as arrays."""
    found = [output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in found]


def warned(cells):
    """Python's warnings, which a reader would take for errors."""
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    return [line for output in outputs for line in output.text.splitlines() if "Warning" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks run, one after the other."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def trained(folder):
    """The cells of the training notebook, run again after a disconnect."""
    with pytest.raises(DeadKernelError):
        execute("train_digits", folder, DISCONNECT)
    kept = folder / "digits/run/ema_0.99_000004.pt"
    written = kept.stat().st_mtime_ns
    cells = execute("train_digits", folder)
    assert kept.stat().st_mtime_ns == written  # these steps were not done again
    return cells


@pytest.fixture(scope="module")
def model(trained, folder):
    return idf.load(folder / "digits/run")


@pytest.fixture(scope="module")
def sampled(trained, folder):
    return execute("sample_and_edit", folder)


@pytest.fixture(scope="module")
def evaluated(trained, folder):
    return execute("evaluate", folder)


def test_the_training_notebook_continues_after_a_disconnect(trained, model, folder):
    assert model.step == 12 and "step 12" in text(cell_with(trained, "idf.train(").outputs)
    rows = [json.loads(line) for line in (folder / "digits/run/progress.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and len(steps) >= 12 // SMALL_NETWORK["log_interval"]


def test_the_training_notebook_shows_digits_curves_previews_and_samples(trained, model):
    [digits] = pictures(cell_with(trained, "load_digits()"))
    assert digits.shape[1] > 10 * 8 and digits.std() > 10
    assert len(pictures(cell_with(trained, "curves.png"))) == 1
    assert len(pictures(cell_with(trained, "run/previews"))) == 3
    drawn = model.sample(40, classes=model.class_names, sampler="dpmpp_2m_sde", steps=2, progress=False)
    [shown] = pictures(cell_with(trained, "model.sample("))
    np.testing.assert_array_equal(shown, np.asarray(drawn.grid(columns=10)))


def test_the_sampling_notebook_draws_the_bytes_of_the_command_that_it_names(sampled, folder, monkeypatch):
    assert "the same bytes: True" in text(cell_with(sampled, "again =").outputs)
    [line] = re.findall(
        r"    improved-diffusion sample (.*)", "\n".join(cell.source for cell in sampled).replace("\\\n", "")
    )
    words = shlex.split(line.replace("--steps 20", "--steps 2"))
    monkeypatch.chdir(folder)
    image_sample.COMMAND.main(words, "improved-diffusion sample")
    name = "samples_20x8x8x1.npz"
    with np.load(folder / "samples" / name) as commands, np.load(folder / "digits/samples" / name) as notebooks:
        np.testing.assert_array_equal(commands["arr_0"], notebooks["arr_0"])


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("images = model.sample(", 1),
        ("again =", 1),
        ("for sampler, steps", 3),
        ("model.sample_steps", 1),
        ("model.variations", 4),
        ("model.inpaint", 3),
        ("model.interpolate", 1),
        ("model.encode", 3),
    ],
)
def test_the_sampling_notebook_shows_what_each_cell_makes(sampled, part, count):
    shown = pictures(cell_with(sampled, part))
    assert len(shown) == count
    assert all(picture.std() > 1 for picture in shown)


def test_the_evaluation_notebook_reports_the_right_numbers(evaluated, model, folder):
    samples = model.sample(40, classes=model.class_names, sampler="dpmpp_2m_sde", steps=2, progress=False)
    data = folder / "digits"
    expected = idf.evaluate(
        samples, data / "train.npz", held_out=data / "test.npz", resize=16,
        features=str(data / "features.pt2"), trust_features=True,
    )  # fmt: skip
    [shown] = [out["data"]["text/markdown"] for out in cell_with(evaluated, "held_out=").outputs if "data" in out]
    assert f"| FID | {expected.fid} |" in shown and f"| precision | {expected.precision} |" in shown
    assert str(expected.copies) in text(cell_with(evaluated, "report.copies").outputs)
    steps = cell_with(evaluated, "plt.subplots")
    assert f"2: {expected.fid.value:.3f}".rstrip("0") in text(steps.outputs)
    bound = model.bits_per_dim(data / "test.npz", num_samples=2, batch_size=2, nll_timesteps=20)
    assert f"{bound.mean:.2f} +- " in text(cell_with(evaluated, "bits_per_dim").outputs)


@pytest.mark.parametrize("part", ["samples = model.sample(", "report_neighbours.png", "plt.subplots"])
def test_the_evaluation_notebook_shows_pictures(evaluated, part):
    assert len(pictures(cell_with(evaluated, part))) == 1


def test_no_cell_shows_a_warning_of_python(trained, sampled, evaluated):
    assert warned([*trained, *sampled, *evaluated]) == []


@every_notebook
def test_a_notebook_uses_the_python_api_only_and_has_short_cells(name):
    cells = read_notebook(name).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    assert not any(
        re.search(r"improved_diffusion\.|from improved_diffusion|python -m improved_diffusion", s) for s in sources
    )
    assert all(len(source.splitlines()) <= 35 for source in sources)
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@every_notebook
def test_a_notebooks_parameters_are_those_that_tests_and_people_set(name):
    cells = read_notebook(name).cells
    names = re.findall(r"^(\w+)(?:: \w+)? = ", cells[position_of_parameters(cells)].source, re.M)
    assert {"FOLDER", "SOURCE", *SMALL[name]} == set(names)


@every_notebook
@pytest.mark.parametrize(("installed", "source"), [(True, ""), (False, ""), (False, "git+https://host/copy")])
def test_a_missing_package_is_installed_from_where_the_reader_says(monkeypatch, name, installed, source):
    called = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: called.append(words))
    setup = cell_with(read_notebook(name).cells, "find_spec").source
    if not installed and not source:
        with pytest.raises(ValueError, match="SOURCE"):
            exec(setup, dict(FOLDER="digits", SOURCE=source))
    else:
        exec(setup, dict(FOLDER="digits", SOURCE=source))
    assert [words[-1] for words in called] == ([source] if source else [])
