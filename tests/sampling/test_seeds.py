"""Image i of seed s follows from (s, i): no two share any randomness, and any of them can be drawn again."""

import json

import numpy as np
import pytest
import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from script_helpers import call, refused

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.sampling import noise
from improved_diffusion.sampling.labels import Labels
from improved_diffusion.sampling.noise import SEED_SCHEME, SeededNoise, image_generator
from improved_diffusion.sampling.pipeline import SamplingPipeline


def noises(seed, count):
    """The bytes of the noise of each image, of 1x2x2."""
    draws = SeededNoise(seed, range(count))(th.empty(count, 1, 2, 2)).numpy()
    return {draw.tobytes() for draw in draws}


def test_ten_thousand_images_of_two_seeds_share_none():
    zero, one = noises(0, 10_000), noises(1, 10_000)
    assert len(zero) == len(one) == 10_000 and not zero & one


def test_noise_is_standard_normal_over_images_and_seeds():
    first = np.concatenate([SeededNoise(seed, range(2000))(th.empty(2000, 2)).numpy() for seed in (0, 1)])
    assert abs(first.mean()) < 5 / np.sqrt(first.size)
    assert first.var() == pytest.approx(1, abs=5 * np.sqrt(2 / first.size))
    neighbours = np.corrcoef(first[:-1].T, first[1:].T)[:2, 2:]
    seeds = np.corrcoef(first[:2000].T, first[2000:].T)[:2, 2:]
    assert np.abs([neighbours, seeds]).max() < 5 / np.sqrt(2000)


def test_labels_and_noise_come_from_separate_streams():
    noise, label = (image_generator(3, 7, stream).standard_normal(100) for stream in ("noise", "label"))
    assert abs(np.corrcoef(noise, label)[0, 1]) < 0.5 and not set(noise) & set(label)
    labels = np.array([Labels(2, 0, [], None).index(i) for i in range(4000)])
    first = SeededNoise(0, range(4000))(th.empty(4000, 1))[:, 0].numpy()
    assert labels.mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))
    assert abs(np.corrcoef(labels, first)[0, 1]) < 5 / np.sqrt(4000)


def test_labels_of_two_seeds_are_independent():
    zero, one = (np.array([Labels(10, seed, [], None).index(i) for i in range(4000)]) for seed in (0, 1))
    for shift in (0, 1):
        same = (zero[shift:] == one[: len(one) - shift]).mean()
        assert same == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / 4000))


def test_noise_does_not_depend_on_the_batch():
    whole = SeededNoise(5, range(6))
    parts = [SeededNoise(5, numbers) for numbers in ([3], [0, 5])]
    for _ in range(3):  # as at each step
        x = whole(th.empty(6, 3, 4, 4))
        alone, two = (part(th.empty(len(part), 3, 4, 4)) for part in parts)
        assert th.equal(alone, x[[3]]) and th.equal(two, x[[0, 5]])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (5, 3, 8, 8), (7, 2, 3)])
def test_threads_draw_the_numbers_of_each_images_generator(shape, threads, monkeypatch):
    monkeypatch.setattr(noise, "NUMBERS_PER_THREAD", 4)
    monkeypatch.setattr(th, "get_num_threads", lambda: threads)
    draw = SeededNoise(11, range(shape[0]))
    generators = [image_generator(11, i, "noise") for i in range(shape[0])]
    for _ in range(3):
        expected = np.stack([generator.standard_normal(shape[1:], dtype=np.float32) for generator in generators])
        np.testing.assert_array_equal(draw(th.empty(shape)).numpy(), expected)


def test_noise_that_is_passed_over_changes_nothing_later():
    drawn, skipped = SeededNoise(1, range(3)), SeededNoise(1, range(3))
    x = th.empty(3, 2, 5)
    drawn(x), drawn(x[:, :1])
    skipped.skip(x), skipped.skip(x[:, :1])
    assert drawn.integers(1000).tolist() == skipped.integers(1000).tolist()
    skipped.skip(x), drawn(x)
    assert th.equal(drawn(x), skipped(x))


@pytest.mark.parametrize("eta, draws", [(0.0, 1), (0.5, 5)])
def test_ddim_draws_what_it_uses(eta, draws, model, monkeypatch):
    """The start, and with eta the noise of each step."""
    calls, fill = [], SeededNoise._draw
    monkeypatch.setattr(SeededNoise, "_draw", lambda self, shape: (calls.append(shape), fill(self, shape))[1])
    options = dict(num_samples=2, sampler="ddim", steps=4, ddim_eta=eta)
    SamplingPipeline(load_model(ImageSampling.of(options), options, str(model))).draw(range(2))
    assert len(calls) == draws


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return save_checkpoint(folder / "model.pt", tiny_settings(class_cond=True), class_names=CLASSES)


def sample(model, folder, *args):
    args = ["--model_path", model, "--steps", 2, "--batch_size", 1, "--seed", 9, "--out_dir", folder, *args]
    return call("image_sample", *args, cwd=model.parent)


def pngs(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def test_given_images_are_drawn_again_byte_for_byte(model, tmp_path):
    sample(model, tmp_path / "all", "--num_samples", 48).succeed()
    sample(model, tmp_path / "some", "--seeds", "17,40-47").succeed()
    everything, some = pngs(tmp_path / "all"), pngs(tmp_path / "some")
    assert len(everything) == 48 and sorted(int(name[-10:-4]) for name in some) == [17, *range(40, 48)]
    assert some == {name: everything[name] for name in some}
    with (
        np.load(tmp_path / "all/samples_48x8x8x3.npz") as whole,
        np.load(tmp_path / "some/samples_9x8x8x3.npz") as part,
    ):
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(part[name], whole[name][[17, *range(40, 48)]])


def test_more_images_are_added_to_a_folder(model, tmp_path):
    sample(model, tmp_path / "out", "--seeds", "3,1").succeed()
    before = pngs(tmp_path / "out")
    sample(model, tmp_path / "out", "--num_samples", 4).succeed()
    after = pngs(tmp_path / "out")
    assert len(after) == 4 and after.items() >= before.items()


@pytest.mark.parametrize("scheme", [None, "seed + number"])
def test_a_folder_of_another_scheme_is_refused_with_the_remedy(scheme, model, tmp_path):
    sample(model, tmp_path / "out", "--num_samples", 2).succeed()
    path = tmp_path / "out/samples.json"
    request = json.loads(path.read_text())
    assert request.pop("seed_scheme") == SEED_SCHEME
    path.write_text(json.dumps(request if scheme is None else {"seed_scheme": scheme, **request}))
    before = pngs(tmp_path / "out")
    result = sample(model, tmp_path / "out", "--num_samples", 4)
    refused(result, tmp_path / "out", "scheme", "--out_dir", path)
    assert pngs(tmp_path / "out") == before


def test_images_of_one_seed_are_not_those_of_the_next(model):
    def drawn(seed):
        options = dict(seed=seed, num_samples=20, batch_size=20, steps=2, classes="dog")
        pipeline = SamplingPipeline(load_model(ImageSampling.of(options), options, str(model)))
        return {image.tobytes() for image in pipeline.draw(range(20))}

    zero, one = drawn(0), drawn(1)
    assert len(zero) == len(one) == 20 and not zero & one
