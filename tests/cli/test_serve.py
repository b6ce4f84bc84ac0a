"""The serve command: a process that answers, and what it says of mistakes."""

import re
import runpy
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import ROOT
from http_helpers import TOKEN, arrays, pixels, wait_until
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import environment, start

import improved_diffusion as idf
from improved_diffusion.cli.main import dispatch
from improved_diffusion.config import UserError
from improved_diffusion.config.service import ServeConfig
from improved_diffusion.service.http.server import listen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    settings = tiny_settings(class_cond=True, label_drop=0.1)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "pets.pt", settings, class_names=CLASSES)


def test_a_service_answers_and_stops_in_order(checkpoint, tmp_path, monkeypatch):
    words = ["improved_diffusion", "serve", "--model_path", checkpoint, "--host", "0.0.0.0", "--port", "0"]
    process = start("python", 1, Path("-m"), *words, cwd=tmp_path, env={"IMPROVED_DIFFUSION_TOKEN": TOKEN})
    said = ""
    while "listening" not in said:
        said = process.stdout.readline()
        assert said, process.stderr.read()
    assert "other machines" in said and "IMPROVED_DIFFUSION_TOKEN" in said
    port = re.search(r":(\d+) ", said)[1]
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/v1/models").status_code == 401

    model = idf.load(checkpoint)
    monkeypatch.setenv("IMPROVED_DIFFUSION_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["client.py", url, "pets", str(tmp_path / "pets.zip"), "dog", "cat"])
    runpy.run_path(str(ROOT / "examples" / "client.py"), run_name="__main__")
    expected = model.sample(4, classes=["dog", "cat"], sampler="dpmpp_2m_sde", steps=20, progress=False)
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        assert archive.namelist() == ["dog_000000.png", "cat_000001.png", "dog_000002.png", "cat_000003.png"]
        for name, image in zip(archive.namelist(), expected.array):
            np.testing.assert_array_equal(pixels(archive.read(name)), image)

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        last = []
        body = dict(model="pets", n=24, classes=["cat"], sampler="ancestral", steps=20, format="npz")
        asking = threading.Thread(target=lambda: last.append(client.post("/v1/samples", json=body)))
        asking.start()
        wait_until(lambda: "improved_diffusion_running 1" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        asking.join(60)
    assert arrays(last[0]).shape == (24, 8, 8, 3)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert TOKEN not in out + err and "Traceback" not in err and "POST /v1/samples 200" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "token"),
        (["--host", "no such host"], "--host|token"),
        (["--token_file", "absent"], "absent"),
        (["--runs", "absent"], "absent"),
        (["--port", "70000"], "--port"),
        (["--max_steps", "0"], "--max_steps"),
        (["--token", "secret"], "--token"),
    ],
)
def test_mistakes_come_before_the_engine_starts(checkpoint, words, said, tmp_path, monkeypatch):
    monkeypatch.delenv("IMPROVED_DIFFUSION_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        dispatch(["serve", str(checkpoint), *words])


def test_models_must_be_named(tmp_path):
    with pytest.raises(UserError, match="--runs"):
        dispatch(["serve"])
    with pytest.raises(UserError, match="no trained model"):
        dispatch(["serve", "--runs", str(tmp_path)])


def test_a_port_in_use_is_one_mistake(checkpoint):
    with listen(ServeConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            dispatch(["serve", str(checkpoint), "--port", str(port)])


WITHOUT = """
import sys
import improved_diffusion as idf, improved_diffusion.api
from improved_diffusion.cli.main import main
names = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "gradio")
print(sorted(set(names) & set(sys.modules)))
sys.modules["uvicorn"] = None
sys.argv = ["improved-diffusion", "serve", sys.argv[1]]
main()
"""


def test_the_package_needs_no_extra_and_serve_names_its_own(checkpoint):
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(checkpoint)], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert found.stdout == "[]\n" and found.returncode == 1
    assert "uvicorn" in found.stderr and "improved_diffusion[serve]" in found.stderr and "Traceback" not in found.stderr
