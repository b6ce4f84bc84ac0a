"""Networks captured by torch.export, run by torch."""

import json
from dataclasses import replace

import pytest
import torch as th
from graph_helpers import KINDS, inputs_of, model_of, output_of
from script_helpers import call, refused

from improved_diffusion.config import UserError
from improved_diffusion.exchange import graph
from improved_diffusion.models.build import build_diffusion


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: model_of(kind, folder) for kind in KINDS}


@pytest.fixture(scope="module")
def programs(models, tmp_path_factory):
    """The file of each kind, for any number of images."""
    folder = tmp_path_factory.mktemp("programs")
    for kind, model in models.items():
        model.export(folder / f"{kind}.pt2", to="exported-program")
    return {kind: folder / f"{kind}.pt2" for kind in models}


def assert_runs(path, model, counts):
    network = th.export.load(path).module()
    for count in counts:
        inputs = inputs_of(model, count)
        th.testing.assert_close(output_of(network, inputs), output_of(model.network, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_images(models, programs, kind):
    assert_runs(programs[kind], models[kind], (1, 2, 5))


def test_the_program_takes_the_networks_place_in_sampling(models, programs):
    model, network = models["class-conditional"], th.export.load(programs["class-conditional"]).module()
    noise, y = th.randn(2, 3, 8, 16), th.tensor([1, 0])
    samples = [
        model.diffusion.ddim_sample_loop(each, noise.shape, noise=noise, model_kwargs={"y": y}, device="cpu")
        for each in (network, model.network)
    ]
    th.testing.assert_close(*samples, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_says_what_it_is(models, programs, kind):
    extra = {"improved_diffusion.json": ""}
    th.export.load(programs[kind], extra_files=extra)
    about, model = json.loads(extra["improved_diffusion.json"]), models[kind]
    assert len(about["betas"]) == 20 and about["checkpoint"]["config"]["diffusion_steps"] == 20
    assert about["variance"] == ("fixed_large" if kind == "unconditional" else "learned_range")
    assert about["low_res_shape"] == ([3, 8, 8] if model.is_super_resolution else None)
    assert about["hidden_class"] == (-1 if model.settings.model.label_drop else None)


@pytest.mark.parametrize(("options", "said"), [(dict(predict_xstart=True), "x0"), (dict(predict_v=True), "v")])
def test_what_the_network_predicts_is_said(models, options, said):
    loaded = models["unconditional"]._loaded
    diffusion = build_diffusion(loaded.settings.replace(sigma_small=True, **options).diffusion)
    about = json.loads(graph.describe(replace(loaded, diffusion=diffusion)))
    assert (about["prediction"], about["variance"]) == (said, "fixed_small")


def test_a_fixed_number_of_images(models, tmp_path):
    model = models["unconditional"]
    flags = ("--dynamic_batch", "False", "--export_batch", 3)
    done = call(
        "export", "--model_path", model.path, "--to", "exported-program", "--out", "new/a.pt2", *flags, cwd=tmp_path
    ).succeed()
    assert "at most" in done.out and "1x8x8" in done.out
    assert_runs(tmp_path / "new" / "a.pt2", model, (3,))
    with pytest.raises((RuntimeError, AssertionError), match="3"):
        assert_runs(tmp_path / "new" / "a.pt2", model, (2,))


def test_exporting_leaves_the_model_as_it_is(models, programs):
    network = models["class-conditional"].network
    assert all(p.requires_grad for p in network.parameters())
    assert any(getattr(module, "use_checkpoint", False) for module in network.modules())


@pytest.mark.parametrize("factor", [1 + 3e-4, float("nan")])
def test_a_program_that_differs_is_not_written(models, programs, tmp_path, monkeypatch, factor):
    captured, call_it, calls = th.export.load(programs["unconditional"]), graph.call, []
    monkeypatch.setattr(graph, "capture", lambda *args: captured)

    def wrong(network, inputs):
        calls.append(network)
        return call_it(network, inputs) * (factor if len(calls) == 2 else 1)

    monkeypatch.setattr(graph, "call", wrong)
    with pytest.raises(UserError, match="differs"):
        models["unconditional"].export(tmp_path / "unet.pt2", to="exported-program")
    assert not list(tmp_path.iterdir())


FORMATS = [("onnx", ".onnx"), ("exported-program", ".pt2")]


@pytest.mark.parametrize(("to", "suffix"), FORMATS)
@pytest.mark.parametrize("name", ["unet{}.bin", "folder{}", "file/unet{}", "gs://bucket/unet{}"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(models, to, suffix, name, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "capture", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    out = name.format(suffix)
    with pytest.raises(UserError, match=out if "file" not in out else "file"):
        models["unconditional"].export(out, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def test_a_batch_size_needs_a_fixed_batch(models, tmp_path):
    with pytest.raises(UserError, match="dynamic_batch"):
        models["unconditional"].export(tmp_path / "unet.pt2", to="exported-program", export_batch=4)


def test_a_fixed_batch_is_for_graphs(models, tmp_path):
    with pytest.raises(UserError, match="dynamic_batch"):
        models["unconditional"].export(tmp_path / "x.pt", to="pt", dynamic_batch=False)


def test_an_exported_program_is_no_checkpoint(programs, tmp_path):
    done = call("export", "--model_path", programs["unconditional"], "--out", "x.pt", cwd=tmp_path)
    refused(done, programs["unconditional"], "an exported program")
