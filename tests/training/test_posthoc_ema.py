"""Averages of other lengths from the snapshots in a run's folder, and the script that makes them."""

import os

import pytest
import torch as th
from script_helpers import call, contents

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.training.ema import PowerEMA

ONE = th.tensor(1.0)
WIDTHS = (0.05, 0.1)
STEPS, EVERY = 97, 8
SETTINGS = ImageModel.of({
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "num_heads": 1, "channel_mult": "1,1",
    "attention_resolutions": "4", "diffusion_steps": 20, "noise_schedule": "cosine",
})  # fmt: skip
CONFIG = SETTINGS.values()


def save(folder, ema, model, number, **changes):
    state_dict = model.state_dict()
    for (name, _), value in zip(model.named_parameters(), ema.params):
        state_dict[name] = value
    state_dict["batches_seen"] = th.tensor(10 * number)
    metadata = {"config": CONFIG, "step": number + 1, **ema.description, **changes}
    checkpoint.save_state_dict(state_dict, str(folder / checkpoint.ema_name(ema.label, number)), metadata)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as a run with --ema_sigma_rel leaves it, and averages of other widths tracked all along."""
    folder = tmp_path_factory.mktemp("run")
    th.manual_seed(0)
    model, _ = build_model_and_diffusion(SETTINGS.model, SETTINGS.diffusion)
    params = list(model.parameters())
    stored = [PowerEMA(width, params) for width in WIDTHS]
    tracked = [PowerEMA(width, params) for width in (0.08, 0.15)]
    flat, sizes = th.cat([p.detach().flatten() for p in params]), [p.numel() for p in params]
    truth = {}
    for step in range(STEPS):
        flat = flat + 0.05 * th.randn_like(flat)
        for ema in (*stored, *tracked):
            values = [v.view_as(p) for v, p in zip(flat.split(sizes), params)]
            ema.update(values, ONE, step)
        if step % EVERY == 0:
            for ema in stored:
                save(folder, ema, model, step)
            truth.update(
                {(ema.sigma_rel, step): th.cat([p.flatten() for p in ema.params]) for ema in (*stored, *tracked)}
            )
    checkpoint.save_state_dict(model.state_dict(), str(folder / "model000096.pt"), {"config": CONFIG, "step": 97})
    return folder, truth


def copied(trained, folder, every):
    """The folder with the snapshots of each `every` steps, by links."""
    folder.mkdir()
    for path in trained[0].iterdir():
        if path.name.startswith(("ema_sigma_rel", "model")) and int(path.stem[-6:]) % every == 0:
            os.link(path, folder / path.name)
    return folder


@pytest.fixture
def whole_run_dir(trained, tmp_path):
    return copied(trained, tmp_path / "run", EVERY)


@pytest.fixture
def run_dir(trained, tmp_path):
    """With a third of the snapshots, which is enough where accuracy does not matter."""
    return copied(trained, tmp_path / "run", 3 * EVERY)


def posthoc(folder, *args, widths="0.08,0.15"):
    return call("posthoc_ema", "--run_dir", folder, "--sigma_rel", widths, *args, cwd=folder.parent)


def flat_of(path):
    state_dict, metadata = checkpoint.load(str(path))
    return th.cat([value.flatten() for name, value in state_dict.items() if name != "batches_seen"]), metadata


def refused(result, *parts):
    assert result.code == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert str(part) in result.err


@pytest.mark.parametrize("args, number", [((), 96), (("--step", 56), 56)])
def test_script_rebuilds_what_would_have_been_tracked(trained, whole_run_dir, args, number):
    run_dir = whole_run_dir
    before = contents(run_dir)
    result = posthoc(run_dir, *args).succeed()
    for width in (0.08, 0.15):
        path = run_dir / f"ema_posthoc_sigma_rel{width}_{number:06d}.pt"
        made, metadata = flat_of(path)
        truth = trained[1][width, number]
        error = (made - truth).norm() / truth.norm()
        nearest = min((trained[1][stored, number] - truth).norm() / truth.norm() for stored in WIDTHS)
        assert error < 3e-3 and nearest > 20 * error
        assert metadata == {"config": CONFIG, "step": number + 1, "ema_sigma_rel": width, "posthoc": True}
        assert f"wrote {path}: {2 * (number // EVERY + 1)} snapshots, error of the profile " in result.out
    after = contents(run_dir)
    assert before.items() <= after.items() and len(after) == len(before) + 2
    assert [path.name for path in run_dir.parent.iterdir()] == ["run"]  # no ./runs


def test_a_stored_length_comes_out_as_it_was_stored(run_dir):
    posthoc(run_dir, widths="0.1").succeed()
    made, _ = flat_of(run_dir / "ema_posthoc_sigma_rel0.1_000096.pt")
    th.testing.assert_close(made, flat_of(run_dir / "ema_sigma_rel0.1_000096.pt")[0], rtol=1e-6, atol=1e-7)


def test_what_is_no_floating_point_number_comes_from_the_newest_snapshot(run_dir):
    posthoc(run_dir, widths="0.08").succeed()
    state_dict, _ = checkpoint.load(str(run_dir / "ema_posthoc_sigma_rel0.08_000096.pt"))
    newest, _ = checkpoint.load(str(run_dir / "ema_sigma_rel0.05_000096.pt"))
    assert state_dict["batches_seen"].item() == 960
    assert {name: value.dtype for name, value in state_dict.items()} == {n: v.dtype for n, v in newest.items()}
    assert list(state_dict) == list(newest)
    assert state_dict._metadata.keys() == newest._metadata.keys()


def test_the_sampler_loads_the_result(run_dir):
    for path in run_dir.glob("ema_*.pt"):
        state_dict, metadata = checkpoint.load(str(path))
        del state_dict["batches_seen"]
        path.unlink()
        checkpoint.save_state_dict(state_dict, str(path), metadata)
    result = posthoc(run_dir, widths="0.15").succeed()
    path = run_dir / "ema_posthoc_sigma_rel0.15_000096.pt"
    assert f"sample --model_path {path}" in result.out
    loaded = load_model(ImageModel.of({}), (), str(path))
    assert loaded.metadata["posthoc"]
    made = th.cat([p.detach().flatten() for p in loaded.model.parameters()])
    th.testing.assert_close(made, flat_of(path)[0], rtol=0, atol=0)


def test_made_averages_are_not_taken_for_snapshots(run_dir):
    posthoc(run_dir).succeed()
    before = contents(run_dir)
    posthoc(run_dir).succeed()
    assert contents(run_dir) == before


def test_a_length_that_the_snapshots_cannot_represent_is_warned_of(whole_run_dir):
    out = posthoc(whole_run_dir, widths="0.08,0.27").succeed().out
    assert out.count("warning: ") == 1 and "represent sigma_rel 0.27 to " in out and "save more often" in out


def test_a_folder_without_snapshots_is_refused(tmp_path, run_dir):
    refused(posthoc(tmp_path / "nowhere"), tmp_path / "nowhere", "is not a folder", "--ema_sigma_rel 0.05,0.10")
    for path in run_dir.glob("ema_*"):
        path.unlink()
    refused(posthoc(run_dir), run_dir, "holds no ema_sigma_rel*.pt", "train with --ema_sigma_rel 0.05,0.10")


@pytest.mark.parametrize("args, parts", [
    (["--sigma_rel", "0.1"], ["--run_dir is missing"]),
    (["--run_dir", "."], ["--sigma_rel is missing", "0.07,0.15"]),
    (["--sigma_rel", "0.1,0.3", "--run_dir", "."], ["--sigma_rel 0.1,0.3", "[0.001, 0.28)"]),
    (["--sigma_rel", "0", "--run_dir", "."], ["--sigma_rel 0 ", "[0.001, 0.28)"]),
    (["--sigma_rel", "wide", "--run_dir", "."], ["--sigma_rel 'wide'", "0.07,0.15"]),
    (["--step", "-2", "--run_dir", "."], ["--step -2", "-1"]),
])  # fmt: skip
def test_wrong_options_are_named_with_the_remedy(args, parts, tmp_path):
    refused(call("posthoc_ema", *args, cwd=tmp_path), *parts)


def test_a_step_without_snapshot_is_refused_with_the_nearest(run_dir):
    refused(posthoc(run_dir, "--step", 50), "--step 50", "from 0 to 96", "nearest: 48, 72")
    refused(posthoc(run_dir, "--step", 1000), "--step 1000", "nearest: 72, 96")


def replace_snapshot(run_dir, change):
    """Write another state dict and description in place of one snapshot; returns its path."""
    path = run_dir / "ema_sigma_rel0.05_000048.pt"
    state_dict, metadata = checkpoint.load(str(path))
    change(state_dict, metadata)
    path.unlink()
    checkpoint.save_state_dict(state_dict, str(path), metadata)
    return path


@pytest.mark.parametrize("change, what", [
    (lambda state, _: state.update({"out.2.bias": th.zeros(7)}), "out.2.bias is (3,) in one and (7,) in the other"),
    (lambda state, _: state.pop("out.2.bias"), "out.2.bias is (3,) in one and missing in the other"),
    (lambda state, _: state.update(more=th.zeros(2)), "more is missing in one and (2,) in the other"),
])  # fmt: skip
def test_snapshots_of_different_models_are_refused(run_dir, change, what):
    path = replace_snapshot(run_dir, change)
    before = contents(run_dir)
    refused(posthoc(run_dir), path, "different models", what)
    assert contents(run_dir) == before


@pytest.mark.parametrize("missing", ["step", "ema_sigma_rel"])
def test_a_snapshot_that_does_not_say_what_it_is_is_refused(run_dir, missing):
    path = replace_snapshot(run_dir, lambda _, metadata: metadata.pop(missing))
    refused(posthoc(run_dir), path, "step and width", "move it elsewhere")


@pytest.mark.parametrize("cut", [slice(0, -100), slice(0, 0)])
def test_a_damaged_snapshot_is_named(run_dir, cut):
    path = run_dir / "ema_sigma_rel0.1_000024.pt"
    data = path.read_bytes()[cut]
    path.unlink()
    path.write_bytes(data)
    refused(posthoc(run_dir), path, "damaged")
    assert not list(run_dir.glob("ema_posthoc*"))


def test_a_folder_behind_a_url_is_read_and_written(run_dir, monkeypatch):
    """As another path of the same folder, by a stand-in for the package."""
    from improved_diffusion.training import posthoc_ema
    from improved_diffusion.utils import files

    class Blobs:
        Error = OSError

        @staticmethod
        def BlobFile(path, mode, streaming):
            return open(local(path), mode)

        @staticmethod
        def isdir(path):
            return os.path.isdir(local(path))

        @staticmethod
        def listdir(path):
            return os.listdir(local(path))

    def local(path):
        return path.replace("store://bucket", str(run_dir.parent))

    monkeypatch.setattr(files, "_blobfile", lambda path: Blobs)
    assert posthoc_ema.rebuild("store://bucket/run", [0.1]) == ["store://bucket/run/ema_posthoc_sigma_rel0.1_000096.pt"]
    assert (run_dir / "ema_posthoc_sigma_rel0.1_000096.pt").exists()
