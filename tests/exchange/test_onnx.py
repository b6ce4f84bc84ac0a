"""Networks as ONNX, run by onnxruntime."""

import json
import sys
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch as th
from graph_helpers import KINDS, inputs_of, model_of, output_of
from script_helpers import call, refused

from improved_diffusion.config import UserError
from improved_diffusion.exchange import graph, onnx

TOLERANCE = 1e-5


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session, inputs):
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return th.from_numpy(output)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: model_of(kind, folder) for kind in KINDS}


@pytest.fixture(scope="module")
def translations():
    """What was translated, the newest last."""
    return []


@pytest.fixture(scope="module")
def conditional(models, translations, tmp_path_factory):
    """The file of a class-conditional network, for any number of images."""
    path, translate = tmp_path_factory.mktemp("onnx") / "unet.onnx", onnx._translate

    def noted(*args):
        translations.append(translate(*args))
        return translations[-1]

    with mock.patch.object(onnx, "_translate", noted):
        models["class-conditional"].export(path, to="onnx")
    return path


@pytest.fixture
def translated(conditional, translations, monkeypatch):
    """Exports of the same network again, without the seconds that capturing and translating it take."""
    monkeypatch.setattr(graph, "capture", lambda *args: None)
    monkeypatch.setattr(onnx, "_translate", lambda *args: translations[0])


def assert_runs(session, model, counts):
    for count in counts:
        inputs = inputs_of(model, count)
        expected = output_of(model.network, inputs)
        assert float((run(session, inputs) - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


def test_any_number_of_images_with_classes_and_without(models, conditional):
    assert_runs(session_of(conditional), models["class-conditional"], (1, 2, 5))


def test_a_hidden_class_is_none_of_the_others(models, conditional):
    session, inputs = session_of(conditional), inputs_of(models["class-conditional"], 1)
    outputs = [run(session, {**inputs, "y": th.tensor([y])}) for y in (-1, 0, 1)]
    assert all(not th.allclose(outputs[0], other, atol=1e-4) for other in outputs[1:])


def test_the_inputs_are_named_and_their_batch_is_too(conditional):
    inputs = {each.name: (each.type, each.shape) for each in session_of(conditional).get_inputs()}
    assert inputs == {
        "x": ("tensor(float)", ["batch", 3, 8, 16]),
        "timesteps": ("tensor(float)", ["batch"]),
        "y": ("tensor(int64)", ["batch"]),
    }


def test_the_file_says_what_it_is(models, conditional):
    model = models["class-conditional"]
    about = json.loads(session_of(conditional).get_modelmeta().custom_metadata_map["improved_diffusion"])
    np.testing.assert_array_equal(np.cumprod(1 - np.array(about["betas"])), model.diffusion.base_alphas_cumprod)
    assert (about["prediction"], about["variance"]) == ("noise", "learned_range")
    assert about["timestep_scale"] == 1000 / 20
    assert (about["num_classes"], about["class_names"], about["hidden_class"]) == (2, ["cat", "dog"], -1)
    assert about["shape"] == [3, 8, 16] and about["low_res_shape"] is None
    assert about["checkpoint"]["config"]["num_heads"] == 4


def test_the_file_names_no_path_of_this_machine(conditional):
    assert str(onnx.__file__).encode() not in conditional.read_bytes()


def test_a_super_resolution_network_for_a_fixed_number_of_images(models, tmp_path):
    model = models["super-resolution"]
    flags = ("--dynamic_batch", "False", "--export_batch", 2)
    done = call("export", "--model_path", model.path, "--to", "onnx", "--out", "a.onnx", *flags, cwd=tmp_path).succeed()
    assert "onnxruntime" in done.out and "at most" in done.out
    session = session_of(tmp_path / "a.onnx")
    assert_runs(session, model, (2,))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(session, inputs_of(model, 3))


def test_a_network_with_head_channels_the_new_order_and_resampling_blocks(models, tmp_path):
    models["ADM"].export(tmp_path / "unet.onnx", to="onnx")
    assert_runs(session_of(tmp_path / "unet.onnx"), models["ADM"], (1, 3))


def test_the_weights_of_a_large_network_are_beside_it(models, translated, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "LARGEST_FILE", 0)
    (tmp_path / "unet.onnx").write_bytes(b"old")
    models["class-conditional"].export(tmp_path / "unet.onnx", to="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet.onnx", "unet.onnx.data"]
    weights = sum(p.numel() * 4 for p in models["class-conditional"].network.parameters())
    assert (tmp_path / "unet.onnx").stat().st_size < weights / 2
    assert_runs(session_of(tmp_path / "unet.onnx"), models["class-conditional"], (2,))


def test_a_graph_that_differs_is_not_written(models, translated, tmp_path, monkeypatch):
    run_it = onnx._Session.__call__
    monkeypatch.setattr(onnx._Session, "__call__", lambda self, inputs: run_it(self, inputs) * (1 + 3e-4))
    (tmp_path / "unet.onnx").write_bytes(b"old")
    with pytest.raises(UserError, match="differs"):
        models["class-conditional"].export(tmp_path / "unet.onnx", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.onnx"]
    assert (tmp_path / "unet.onnx").read_bytes() == b"old"


def test_without_onnxruntime_the_file_is_said_to_be_unchecked(models, translated, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    models["class-conditional"].export(tmp_path / "unet.onnx", to="onnx")
    assert "not checked" in capsys.readouterr().out
    assert (tmp_path / "unet.onnx").exists()


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(models, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{name}\b.*\[onnx\]"):
        models["unconditional"].export(tmp_path / "unet.onnx", to="onnx")
    assert not list(tmp_path.iterdir())


def test_an_older_torch_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(th, "__version__", "2.6.0+cpu")
    with pytest.raises(UserError, match=r"torch 2\.11.*2\.6"):
        models["unconditional"].export(tmp_path / "unet.onnx", to="onnx")
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_is_no_checkpoint(conditional, tmp_path):
    (tmp_path / "renamed.pt").write_bytes(conditional.read_bytes())
    done = call("export", "--model_path", "renamed.pt", "--out", "x.pt", cwd=tmp_path)
    refused(done, "renamed.pt", "ONNX")
