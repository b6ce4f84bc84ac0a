"""examples/ray_serve.py on one machine, where Ray is installed."""

import base64
import json
import runpy
import urllib.request

import numpy as np
import pytest
from helpers import ROOT
from http_helpers import pixels

ray = pytest.importorskip("ray", reason="the example is for Ray: pip install 'ray[serve]'")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_give_the_images_of_python(model_paths, models, monkeypatch):
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        runpy.run_path(str(ROOT / "examples" / "ray_serve.py"))["start"](str(model_paths["pets"]), 2, port=18_765)
        url = "http://127.0.0.1:18765"
        for seed in range(6):
            body = dict(model="pets", n=2, seed=seed, classes=["cat"], sampler="dpmpp_2m", steps=3)
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/samples", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as answer:
                rows = json.load(answer)["images"]
            expected = models["pets"].sample(2, seed=seed, classes=["cat"], sampler="dpmpp_2m", steps=3, progress=False)
            for row, image in zip(rows, expected.array):
                np.testing.assert_array_equal(pixels(base64.b64decode(row["png"])), image)
    finally:
        serve.shutdown()
        ray.shutdown()
