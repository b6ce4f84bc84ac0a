"""The Python API: the same objects, options and bytes as the commands."""

import subprocess
import sys

import numpy as np
import pytest
import torch as th
from feature_helpers import write_script
from PIL import Image
from script_helpers import TINY_IMAGE, TINY_SUPER_RES, call, write_images

import improved_diffusion as idf
from improved_diffusion.config import UserError

TINY = dict(
    num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", attention_resolutions="4", diffusion_steps=20,
    noise_schedule="cosine", learn_sigma=True, num_workers=0, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def photos(place):
    return write_images(place / "photos", 12)


@pytest.fixture(scope="module")
def run_folder(place, photos):
    """A class-conditional run by the command."""
    args = [*TINY_IMAGE, "--data_dir", photos, "--class_cond", "--ema_rate", "0.9,0.5", "--batch_size", 4]
    call("image_train", *args, "--max_steps", 3, "--out_dir", place / "run", cwd=place).succeed()
    return place / "run"


@pytest.fixture(scope="module")
def model(run_folder):
    return idf.load(run_folder)


@pytest.fixture(scope="module")
def upscaler(place, photos):
    args = [*TINY_SUPER_RES, "--data_dir", photos, "--max_steps", 1, "--batch_size", 4, "--out_dir", place / "sr"]
    call("super_res_train", *args, cwd=place).succeed()
    return idf.load(place / "sr")


def test_importing_the_package_imports_no_torch():
    code = "import improved_diffusion, sys; print('torch' in sys.modules, improved_diffusion.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")


# Loading


def test_a_run_folder_gives_its_newest_first_average(model, run_folder):
    assert model.path == str(run_folder / "ema_0.9_000003.pt")
    assert model.step == 3 and list(model.class_names) == ["cat", "dog"]


@pytest.mark.parametrize(("average", "file"), [(0.5, "ema_0.5_000003.pt"), ("raw", "model000003.pt")])
def test_another_average_of_a_run_folder(average, file, run_folder):
    assert idf.load(run_folder, average=average).path == str(run_folder / file)


def test_an_average_that_is_not_there_lists_those_that_are(run_folder):
    with pytest.raises(UserError, match=r"0\.7.*0\.9, 0\.5, raw"):
        idf.load(run_folder, average=0.7)


def test_what_is_no_model_is_one_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        idf.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        idf.load(tmp_path)


def test_a_file_without_a_description_takes_options(model, tmp_path):
    """As published checkpoints are: plain state dicts."""
    th.save(dict(model.network.state_dict()), tmp_path / "plain.pt")
    options = {name: TINY[name] for name in ("num_heads", "diffusion_steps", "noise_schedule", "attention_resolutions")}
    plain = idf.load(tmp_path / "plain.pt", image_size=8, **options)
    ours = model.sample(2, classes=["1"], progress=False)
    assert np.array_equal(plain.sample(2, classes=["1"], progress=False).array, ours.array)


def test_a_saved_model_loads_again_with_its_classes(model, tmp_path):
    model.save(tmp_path / "new/mine.pt")
    again = idf.load(tmp_path / "new/mine.pt")
    assert again.class_names == model.class_names and again.step == 3
    assert np.array_equal(again.sample(2, progress=False).array, model.sample(2, progress=False).array)


# Sampling


def test_the_bytes_are_the_commands(model, run_folder, tmp_path):
    args = ["--model_path", run_folder / "ema_0.9_000003.pt", "--num_samples", 8, "--seed", 3, "--batch_size", 8]
    call("image_sample", *args, "--out_dir", "command", cwd=tmp_path).succeed()
    images = model.sample(8, seed=3, batch_size=8, progress=False)
    images.save(tmp_path / "python")
    command, ours = ({p.name: p.read_bytes() for p in (tmp_path / d).rglob("*.*g")} for d in ("command", "python"))
    assert command == ours and len(ours) == 9
    with np.load(tmp_path / "command/samples_8x8x8x3.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images.array) and np.array_equal(arrays["arr_1"], images.labels)


def test_images_do_not_depend_on_the_batch_or_the_count(model):
    whole = model.sample(5, batch_size=5, seed=1, progress=False)
    parts = model.sample(3, batch_size=2, seed=1, progress=False)
    assert np.abs(whole.array[:3].astype(int) - parts.array).max() <= 1  # sums over another batch round differently
    again = model.sample(seeds="3-4", batch_size=2, seed=1, progress=False)
    assert list(again.numbers) == [3, 4] and np.abs(whole.array[3:].astype(int) - again.array).max() <= 1


def test_classes_by_name_and_by_label_are_the_same(model):
    name = model.class_names[1]
    by_name, by_label = (model.sample(2, classes=c, progress=False) for c in ([name], [1]))
    assert np.array_equal(by_name.array, by_label.array) and list(by_name.labels) == [1, 1]


def test_steps_come_to_a_callback_and_out_of_a_generator(model):
    seen = []
    images = model.sample(2, sampler="ddim", steps=4, progress=False, on_step=seen.append)
    steps = list(model.sample_steps(2, sampler="ddim", steps=4))
    assert [step.index for step in seen] == [step.index for step in steps] == [0, 1, 2, 3]
    assert steps[0].pred_xstart.shape == (2, 3, 8, 8) and steps[0].images.array.dtype == np.uint8
    assert np.array_equal(steps[-1].images.array, seen[-1].images.array)
    assert np.array_equal(steps[-1].images.array, images.array)  # DDIM's last step is its prediction


def test_another_precision_leaves_the_model_as_it_is(model):
    before = model.sample(2, steps=3, sampler="ddim", progress=False).array
    assert model.sample(2, steps=3, sampler="ddim", precision="bf16", progress=False).array.shape == before.shape
    assert np.array_equal(model.sample(2, steps=3, sampler="ddim", progress=False).array, before)
    assert {p.dtype for p in model.network.parameters()} == {th.float32}


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"samplr": "ddim"}, "samplr.*sampler"),
        ({"sampler": "dimm"}, "dimm.*ddim"),
        ({"steps": 21}, "steps 21"),
        ({"classes": ["unicorn"]}, "unicorn"),
        ({"num_channels": 64}, "num_channels"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"model_path": "other.pt"}, "model_path"),
        ({"num_samples": 4}, "num_samples"),
    ],
)
def test_a_mistake_is_an_exception_that_names_it(options, culprit, model):
    with pytest.raises(UserError, match=culprit):
        model.sample(1, progress=False, **options)


def test_images_show_and_give_themselves(model, tmp_path):
    images = model.sample(3, steps=2, sampler="ddim", progress=False)
    assert len(images) == 3 and images.array.dtype == np.uint8 and images.array.shape == (3, 8, 8, 3)
    assert [im.size for im in images.pil()] == [(8, 8)] * 3
    assert np.array_equal(np.asarray(images[1].pil()[0]), images.array[1])
    assert images[-1].labels.tolist() == images.labels[-1:].tolist()
    assert images._repr_png_().startswith(b"\x89PNG")
    assert images.grid(columns=3).size[0] > images.grid(columns=1).size[0]


# Super-resolution


def test_upscale_is_the_commands(upscaler, photos, tmp_path):
    small = np.stack([np.asarray(Image.open(path).resize((8, 8))) for path in sorted(photos.glob("*.png"))[:2]])
    np.savez(tmp_path / "small.npz", small)
    args = ["--model_path", upscaler.path, "--base_samples", "small.npz", "--batch_size", 2, "--out_dir", "out"]
    call("super_res_sample", *args, cwd=tmp_path).succeed()
    large = upscaler.upscale(small, batch_size=2, progress=False)
    with np.load(tmp_path / "out/samples_2x16x16x3.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], large.array)
    as_pil = [Image.fromarray(array) for array in small]
    assert np.array_equal(upscaler.upscale(as_pil, batch_size=2, progress=False).array, large.array)


def test_upscale_takes_any_size_that_the_levels_divide(upscaler):
    small = np.random.default_rng(0).integers(0, 256, (2, 12, 6, 3), dtype=np.uint8)
    for base in (small, [Image.fromarray(array) for array in small]):
        large = upscaler.upscale(base, any_size=True, steps=2, progress=False)
        assert large.array.shape == (2, 24, 12, 3)
    with pytest.raises(UserError, match="one size, found 6x12, 12x6"):
        upscaler.upscale([Image.new("RGB", (6, 12)), Image.new("RGB", (12, 6))], any_size=True)


def test_images_are_read_as_in_training_or_as_told(photos, tmp_path):
    model = idf.train(photos, image_size=8, max_steps=1, out_dir=str(tmp_path), background="black", **TINY)
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert model.settings.reading.background == "black"
    options = dict(seed=0, strength=0.01, progress=False)
    grey = [model.variations(clear, **options, **more).array.mean() for more in ({}, {"background": "white"})]
    assert grey[0] < 60 and grey[1] > 190


def test_each_kind_of_model_says_what_it_can_do(model, upscaler):
    with pytest.raises(UserError, match="upscale"):
        upscaler.sample(1)
    with pytest.raises(UserError, match="super-resolution"):
        model.upscale(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="base"):
        upscaler.upscale(np.zeros((1, 8, 8, 3)))


# Training


def test_training_returns_the_model_and_goes_on(photos, tmp_path):
    run = tmp_path / "run"
    model = idf.train(photos, image_size=8, max_steps=2, out_dir=str(run), **TINY)
    assert model.step == 2 and model.path == str(run / "ema_0.9999_000002.pt")
    assert model.sample(1, progress=False).array.shape == (1, 8, 8, 3)
    model = idf.train(photos, max_steps=4, out_dir=str(run), resume="auto", num_workers=0)
    assert model.step == 4


def test_the_commands_bytes_come_from_train_too(photos, tmp_path):
    idf.train(photos, image_size=8, max_steps=2, out_dir=str(tmp_path / "a"), **TINY)
    args = [*TINY_IMAGE, "--data_dir", photos, "--batch_size", 4, "--max_steps", 2, "--out_dir", tmp_path / "b"]
    call("image_train", *args, cwd=tmp_path).succeed()
    a, b = (th.load(tmp_path / d / "model000002.pt", weights_only=True) for d in "ab")
    assert all(th.equal(a[name], b[name]) for name in a)


def test_sizes_of_super_resolution_train_such_a_model(photos, tmp_path):
    model = idf.train(photos, large_size=16, small_size=8, max_steps=1, out_dir=str(tmp_path / "run"), **TINY)
    assert model.is_super_resolution


def test_a_wrong_option_of_training_is_an_exception(photos, tmp_path):
    with pytest.raises(UserError, match="max_step"):
        idf.train(photos, image_size=8, max_step=2, out_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="nowhere"):
        idf.train(tmp_path / "nowhere", image_size=8, max_steps=1, out_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="cifar10-hybrid"):
        idf.train(photos, preset="cifar10-hybird")
    with pytest.raises(UserError, match="dry_run"):
        idf.train(photos, image_size=8, dry_run=True, out_dir=str(tmp_path / "dry"))
    assert not (tmp_path / "dry").exists()


# Editing


@pytest.fixture(scope="module")
def originals(photos):
    """Two images of the model's size, and their classes."""
    paths = sorted(photos.glob("*.png"))[:2]
    return np.stack([np.asarray(Image.open(path).resize((8, 8))) for path in paths])


def npz_of(folder):
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        return arrays["arr_0"]


def by_command(model, tmp_path, *args):
    """What image_edit.py makes, uint8 [N, H, W, C]."""
    call("image_edit", *args, "--model_path", model.path, "--out_dir", "out", cwd=tmp_path).succeed()
    return npz_of(tmp_path / "out")


def test_inpainting_is_the_commands_and_keeps_the_known_pixels(model, originals, tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    np.savez(tmp_path / "images.npz", originals)
    args = ["--images", "images.npz", "--mask", "mask.png", "--classes", "0,1", "--steps", 4, "--resamplings", 1]
    command = by_command(model, tmp_path, "inpaint", *args)
    options = dict(classes=[0, 1], steps=4, resamplings=1, progress=False)
    painted = model.inpaint(originals, mask, **options)
    assert np.array_equal(painted.array, command)
    assert np.array_equal(painted.array[:, :, :4], originals[:, :, :4])
    assert np.array_equal(model.inpaint(originals, tmp_path / "mask.png", **options).array, command)
    large = mask.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(model.inpaint(originals, large, **options).array, command)
    assert np.array_equal(model.inpaint(originals, Image.fromarray(large), **options).array, command)


def test_edited_images_keep_the_names_of_files(model, photos, tmp_path):
    paths = sorted(photos.glob("*.png"))[:2]
    options = {"steps": 2, "progress": False}
    varied = model.variations([str(path) for path in paths], 4, **options)
    assert list(varied.names) == [f"{path.stem}_{k}" for k in (1, 2) for path in paths]
    varied.save(tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out/samples").iterdir()) == sorted(varied.names)
    assert list(model.variations(varied[:1], **options).names) == [varied.names[0]]
    latents = model.encode([str(path) for path in paths], steps=2)
    assert list(model.decode(latents, progress=False).names) == [path.stem for path in paths]
    assert model.variations(varied.array, classes=[0], **options).names is None


def test_variations_are_the_commands(model, originals, tmp_path):
    np.savez(tmp_path / "images.npz", originals)
    args = ["--images", "images.npz", "--num_samples", 3, "--strength", 0.3, "--classes", "1", "--seed", 5]
    command = by_command(model, tmp_path, "variations", *args)
    varied = model.variations(originals, 3, strength=0.3, classes=[1], seed=5, progress=False)
    assert np.array_equal(varied.array, command) and varied.labels.tolist() == [1, 1, 1]


def test_frames_between_two_numbers_begin_and_end_with_those_samples(model):
    options = dict(sampler="ddim", steps=4, progress=False)
    frames = model.interpolate(3, 5, frames=3, **options)
    ends = model.sample(seeds="3,5", **options)
    assert np.abs(frames.array[[0, 2]].astype(int) - ends.array).max() <= 1
    assert frames.labels[[0, 2]].tolist() == ends.labels.tolist()


def test_images_come_back_from_their_latents(model, originals):
    latents = model.encode(originals, classes=[0, 1], steps=20)
    assert latents.arrays.shape == (2, 3, 8, 8)
    back = model.decode(latents, progress=False)
    assert np.abs(back.array.astype(int) - originals).mean() < 30
    between = model.interpolate(originals[:1], originals[1:], frames=2, classes=[0, 1], steps=20, progress=False)
    assert np.abs(between.array.astype(int) - back.array).max() <= 2


def test_classes_come_with_the_images_by_file_name_and_as_labels(model, photos, originals):
    paths = sorted(map(str, photos.glob("*.png")))[:2]
    of_files = [list(model.class_names).index(path.rsplit("/", 1)[-1].split("_")[0]) for path in paths]
    options = dict(steps=4, strength=0.3, progress=False)
    assert model.variations(paths, **options).labels.tolist() == of_files
    given = idf.Images(originals, np.array([1, 0]))
    assert model.variations(given, **options).labels.tolist() == [1, 0]


def test_images_that_cannot_be_edited_are_one_error(model, originals, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        model.variations(str(tmp_path / "nowhere.png"))
    with pytest.raises(UserError, match="mask"):
        model.inpaint(originals, np.ones((8, 8)), classes=[0])
    with pytest.raises(UserError, match="classes"):
        model.variations(originals)


# Evaluation


def test_the_bound_is_the_commands(model, photos, tmp_path):
    args = ["--model_path", model.path, "--data_dir", photos, "--num_samples", 6, "--batch_size", 6]
    call("image_nll", *args, "--timestep_respacing", 4, "--out_dir", "nll", cwd=tmp_path).succeed()
    with np.load(tmp_path / "nll/per_image.npz") as arrays:
        command = arrays["total_bpd"]
    bound = model.bits_per_dim(photos, num_samples=6, batch_size=6, timestep_respacing="4")
    np.testing.assert_allclose(bound.total_bpd, command, rtol=1e-6)
    assert bound.mean == pytest.approx(command.mean(), rel=1e-6)


def test_the_bound_in_float16_is_nearly_the_same_and_leaves_the_model_as_it_is(model, photos):
    options = dict(num_samples=4, batch_size=4, timestep_respacing="4")
    full = model.bits_per_dim(photos, **options)
    half = model.bits_per_dim(photos, use_fp16=True, **options)
    assert half.mean != full.mean and half.mean == pytest.approx(full.mean, rel=0.05)
    assert {p.dtype for p in model.network.parameters()} == {th.float32}


def test_evaluating_arrays_gives_the_numbers_as_attributes(tmp_path):
    program = write_script(tmp_path / "features.pt")
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(low, 255, (60, 8, 8, 3), dtype=np.uint8) for low in (0, 100))
    report = idf.evaluate(idf.Images(fake), real, features=program, out_dir=tmp_path / "out")
    same = idf.evaluate(real, real, features=program)
    assert report.fid.value > same.fid.value and report.kid.error > 0
    assert (tmp_path / "out/report.md").exists()


# Arguments


@pytest.mark.parametrize("wrong", [None, 5, 2.5, True, ["a"], b"a", {}, "a\0b", "\ud800", "", np.zeros(3)], ids=repr)
def test_what_is_no_path_is_one_error(wrong, model):
    with pytest.raises(UserError, match=r"^path .*expected|^path .*Unicode"):
        idf.load(wrong)
    with pytest.raises(UserError, match="path"):
        model.save(wrong)
    for use in (
        lambda: model.decode(wrong), lambda: idf.train(wrong, max_steps=1), lambda: model.bits_per_dim(wrong),
        lambda: model.encode(wrong), lambda: idf.evaluate("a", None, features="f.pt2"),
        lambda: idf.evaluate(None, "a", features="f.pt2"), lambda: idf.evaluate("a", "b", features=wrong),
    ):  # fmt: skip
        with pytest.raises(UserError):
            use()


@pytest.mark.parametrize("wrong", [True, [1], {}, b"raw", np.zeros(3), 0.7, "0.90"], ids=repr)
def test_an_average_that_is_not_there_is_one_error(wrong, run_folder):
    with pytest.raises(UserError, match="average"):
        idf.load(run_folder, average=wrong)


@pytest.mark.parametrize(("options", "culprit"), [
    (dict(n=0), "num_samples 0"), (dict(n=-1), "num_samples -1"), (dict(n=2.5), "num_samples 2.5"),
    (dict(n="two"), "num_samples 'two'"), (dict(n=10**12), "num_samples"), (dict(n=True), "num_samples True"),
    (dict(classes=[]), "classes"), (dict(classes=[None]), "classes"), (dict(classes=2.5), "classes 2.5"),
    (dict(classes=","), "classes"), (dict(classes="\u00b2"), "classes \u00b2"),
    (dict(classes="9" * 5000), "classes 99"),
    (dict(batch_size=-1), "batch_size -1"), (dict(batch_size=2.5), "batch_size 2.5"), (dict(seed=-1), "seed -1"),
    (dict(seed=2**70), "seed"), (dict(n=3, seeds="1,2"), "--num_samples 3 contradicts --seeds 1,2"),
    (dict(seeds="1,,2"), "seeds '1,,2'"), (dict(seeds=[1, 1]), "seeds 1,1"), (dict(stepps=3), "steps"),
])  # fmt: skip
def test_an_argument_that_cannot_work_is_named(options, culprit, model):
    with pytest.raises(UserError) as error:
        model.sample(**{"steps": 2, "progress": False, **options})
    assert culprit in str(error.value) and len(str(error.value)) < 2000


def test_numbers_and_lists_of_numpy_are_taken(model):
    expected = model.sample(2, classes=["cat", "dog"], steps=2, progress=False)
    for classes in ([0, 1], np.array([0, 1]), (0, 1), range(2), "cat,dog", iter(["cat", "dog"])):
        found = model.sample(np.int64(2), classes=classes, steps=np.int32(2), batch_size=2.0, progress=False)
        np.testing.assert_array_equal(found.array, expected.array)
    assert len(model.sample(steps=2, progress=False)) == len(model.sample(seeds=" ", steps=2, progress=False)) == 1
    for seeds in ("1,5-6", [1, 5, 6], np.array([1, 5, 6])):
        assert list(model.sample(seeds=seeds, steps=2, progress=False).numbers) == [1, 5, 6]
    assert len(model.sample(2, seeds="3,4", steps=2, progress=False)) == 2


def test_several_images_are_chosen_by_their_indices(model):
    drawn = model.sample(4, steps=2, progress=False)
    for index in ([0, 2], np.array([0, 2]), np.array([True, False, True, False]), slice(0, 4, 2)):
        chosen = drawn[index]
        np.testing.assert_array_equal(chosen.array, drawn.array[[0, 2]])
        assert list(chosen.numbers) == [0, 2] and chosen.labels.tolist() == drawn.labels[[0, 2]].tolist()
    assert list(drawn[np.int64(1)].numbers) == list(drawn[-3].numbers) == [1]
    for wrong in ([9], 9, 1.5, "a", None, [[0, 1]], (0, 1), True):
        with pytest.raises(IndexError):
            drawn[wrong]


def test_a_tilde_is_the_home_folder_in_python(model, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    assert model.path == idf.load("~/run").path
    assert len(model.encode("~/photos/" + sorted(photos.iterdir())[0].name, steps=2).arrays) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save("~/m.pt")
    model.sample(1, steps=2, progress=False).save("~/out")
    assert (tmp_path / "m.pt").is_file() and (tmp_path / "out/samples.png").is_file()
