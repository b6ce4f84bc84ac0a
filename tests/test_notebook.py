"""The API in a real notebook: a kernel runs the cells, and is interrupted as by the stop button."""

import os
import signal
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient
from script_helpers import write_images

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
