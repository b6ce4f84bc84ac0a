"""Odd image files in every form of input: each reader gets the pixels that a viewer shows."""

import itertools
import zipfile

import numpy as np
import pytest
from feature_helpers import write_script
from model_helpers import save_checkpoint, tiny_settings
from PIL import Image, PngImagePlugin

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config import ReadingConfig, UserError
from improved_diffusion.config.settings import (
    Encoding,
    ImageTraining,
    Inpainting,
    Interpolation,
    Likelihood,
    ReferenceStatistics,
    Scoring,
    Sweeping,
    Variations,
)
from improved_diffusion.data.dataset import ImageDataset, check_images
from improved_diffusion.data.given import as_pixels, read_images
from improved_diffusion.data.sources import open_images
from improved_diffusion.data.stream import BatchStream, load_data
from improved_diffusion.evaluation.evaluator import Inputs
from improved_diffusion.evaluation.feature_sets import ImageSet
from improved_diffusion.evaluation.likelihood import open_dataset
from improved_diffusion.evaluation.references import write_reference
from improved_diffusion.training.run import open_data
from improved_diffusion.training.tasks import ImageTask
from improved_diffusion.utils import images

RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 200, (16, 16, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def save_turned(path, orientation=6, **options):
    """The picture, stored lying on its side."""
    turns = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(PICTURE).transpose(turns[orientation]).save(path, exif=exif, **options)


def save_transparent(path, hidden, side=16):
    """The picture's upper half, with something under the transparent lower half."""
    array = np.concatenate([PICTURE, np.full((16, 16, 1), 255, np.uint8)], axis=2)
    array[8:] = (*hidden, 0)
    Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST).save(path)


@pytest.fixture
def odd(tmp_path):
    """A folder of eight pictures; all but `6_deep.png` and the transparent ones show the same."""
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.fromarray(PICTURE).save(folder / "0_plain.png")
    save_turned(folder / "1_turned.png")
    save_turned(folder / "2_turned.webp.png", 3, format="WEBP", lossless=True)
    save_turned(folder / "3_tiff.png", 8, format="TIFF")
    save_transparent(folder / "4_clear.png", (10, 240, 10))
    save_transparent(folder / "5_clear.png", (0, 0, 0))
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(folder / "6_deep.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 300_000, zip=True)
    Image.fromarray(PICTURE).save(folder / "7_text.png", pnginfo=info, icc_profile=bytes(2_000_000))
    return folder


def zip_of(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def expected(background=255):
    clear = PICTURE.copy()
    clear[8:] = background
    deep = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    return np.stack([PICTURE, PICTURE, PICTURE, PICTURE, clear, clear, deep, PICTURE])


def of_stream(path, count=8, **kwargs):
    data = load_data(data_dir=str(path), batch_size=count, image_size=16, deterministic=True, num_workers=0, **kwargs)
    return images.to_uint8(next(data)[0] + 1e-3)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_training_sees_what_a_viewer_shows(odd, kind):
    path = odd if kind == "folder" else zip_of(odd)
    np.testing.assert_array_equal(of_stream(path), expected())
    np.testing.assert_array_equal(of_stream(path, reading=ReadingConfig(background="black")), expected(0))


@pytest.mark.parametrize("kind", ["folder", "zip", "files", "paths", "pil"])
def test_given_images_are_read_like_training_images(odd, kind):
    files = [str(path) for path in sorted(odd.iterdir())]
    given = {"folder": str(odd), "zip": str(zip_of(odd)), "files": ",".join(files)}.get(kind)
    reading = ReadingConfig(background="black")
    if given is not None:
        found = read_images("--images", given, "--image_size", 16, 3, None, reading)
    elif kind == "paths":
        found = as_pixels(files, "images", 16, 3, None, reading)
    else:
        found = as_pixels(pil(files), "images", 16, 3, None, reading)
    np.testing.assert_array_equal(found.arrays, expected(0))


def pil(files):
    opened = []
    for path in files:
        with open(path, "rb") as f:
            opened.append(images.load(f))
    return opened


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_evaluation_reads_like_training(odd, kind):
    for number in range(5):  # at least forty images
        for path in list(odd.iterdir())[:8]:
            (odd / f"x{number}{path.name}").write_bytes(path.read_bytes())
    path = odd if kind == "folder" else zip_of(odd)
    for colour in ("white", "black"):
        taken = ImageSet(str(path), "--reference", reading=ReadingConfig(background=colour)).take(range(8))
        np.testing.assert_array_equal(taken, expected(255 if colour == "white" else 0))


@pytest.mark.parametrize("side", [16, 32, 64])
def test_what_lies_under_transparency_is_never_seen_at_any_size(tmp_path, side):
    for i, hidden in enumerate([(0, 0, 0), (10, 240, 10), (255, 255, 255)]):
        save_transparent(tmp_path / f"{i}.png", hidden, side)
    seen = of_stream(tmp_path, 3)
    assert (seen[0] == seen[1]).all() and (seen[0] == seen[2]).all() and (seen[:, 10:] == 255).all()


def test_an_npz_with_alpha_is_shown_on_the_background(tmp_path):
    array = np.full((4, 16, 16, 4), 90, np.uint8)
    array[..., 3] = 0
    np.savez(tmp_path / "a.npz", array)
    assert (of_stream(tmp_path / "a.npz", 4) == 255).all()
    assert (read_images("--images", str(tmp_path / "a.npz"), "s", 16, 3, None, ReadingConfig()).arrays == 255).all()
    assert (as_pixels(array, "images", 16, 3).arrays == 255).all()
    assert (of_stream(tmp_path / "a.npz", 4, channels=4) == array).all()


def test_the_check_counts_what_was_done(odd):
    dataset = ImageDataset(16, open_images(str(odd)))
    found = check_images(dataset)
    assert found.unreadable == [] and found.num_read == 8
    # A TIFF is turned by Pillow itself.
    assert found.done == {"16-bit": 1, "rotated by EXIF": 2, "transparent on white": 2}
    assert found.describe() == "2 rotated by EXIF, 2 transparent on white, 1 16-bit"
    grey = check_images(ImageDataset(16, [str(odd / "6_deep.png")], channels=1))
    assert grey.done == {"16-bit": 1}


def test_pixels_beyond_the_limit_are_an_unreadable_image(odd):
    Image.new("L", (40, 40)).save(odd / "8_large.png")
    data = load_data(
        data_dir=str(odd), batch_size=2, image_size=16, num_workers=0, reading=ReadingConfig(max_image_pixels=1599)
    )
    assert data.num_images == 8 and data.skipped_names() == [str(odd / "8_large.png")]
    with pytest.raises(UserError, match=r"8_large\.png is not a readable image: 40 x 40 .*--max_image_pixels 1599"):
        read_images("--images", str(odd), "s", 16, 3, None, ReadingConfig(max_image_pixels=1599))


def test_published_decoding_is_that_of_the_published_code(odd):
    for name in ("6_deep.png", "2_turned.webp.png", "7_text.png"):
        (odd / name).unlink()
    clear = odd / "5_clear.png"
    with Image.open(clear) as image:
        image.resize((32, 32)).save(clear)
    seen = of_stream(odd, 5, reading=ReadingConfig(published_decoding=True))
    for array, path in zip(seen, sorted(odd.iterdir())):
        with Image.open(path) as image:
            image.load()
            while min(*image.size) >= 32:
                image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
            np.testing.assert_array_equal(array, np.asarray(image.convert("RGB")))
    assert (seen[3, 10:] == (10, 240, 10)).all()  # what was hidden


@pytest.mark.parametrize("options", [
    {"published_decoding": True, "background": "black"}, {"published_decoding": True, "resize_mode": "pad"},
    {"resize_mode": "zoom"}, {"max_image_pixels": 0}, {"background": "whyte"}, {"background": "#12"}, {"background": 3},
])  # fmt: skip
def test_options_that_cannot_be_are_named(options):
    with pytest.raises(UserError, match="--" + list(options)[-1]):
        ReadingConfig(**options)


# Random crops


@pytest.fixture
def wide(tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(RNG.integers(0, 256, (16, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def crops(folder, batch_size=3, **kwargs):
    dataset = ImageDataset(8, open_images(folder), reading=ReadingConfig(resize_mode="random_crop"))
    return BatchStream(dataset, batch_size, **{"num_workers": 0, "random_flip": True, **kwargs})


def take(data, count):
    return [batch for batch, _ in itertools.islice(data, count)]


def test_random_crops_follow_from_seed_and_position(wide):
    first = take(crops(wide, shuffle=False, random_flip=False), 4)
    again = take(crops(wide, 6, shuffle=False, random_flip=False), 2)
    assert all((one == two).all() for one, two in zip(first[:2], again[0].split(3)))
    assert not any((one == two).all() for one, two in zip(first[0], first[2]))  # another part in each epoch
    other = take(crops(wide, shuffle=False, random_flip=False, seed=1), 1)
    assert not (first[0] == other[0]).all()


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_gets_the_same_random_crops(wide, step, num_workers):
    plain = take(crops(wide), 7)
    data = crops(wide, num_workers=num_workers)
    data.seek(step)
    for one, two in zip(plain[step:], take(data, 7 - step)):
        assert (one == two).all()
    data.close()


def test_readers_other_than_training_crop_the_centre(wide):
    reading = ReadingConfig(resize_mode="random_crop")
    centre = ImageDataset(8, open_images(wide))
    dataset = ImageDataset(8, open_images(wide), reading=reading)
    np.testing.assert_array_equal(dataset[0][0], centre[0][0])
    given = read_images("--images", wide, "--image_size", 8, 3, None, reading)
    np.testing.assert_array_equal(given.arrays, np.stack([centre.pixels(i) for i in range(6)]))


# Sizes


@pytest.mark.parametrize("mode, corner", [("pad", 255), ("stretch", 30), ("crop", 90)])
def test_resize_modes_reach_training_and_given_images(tmp_path, mode, corner):
    array = np.full((16, 64, 3), 30, np.uint8)
    array[:, 16:48] = 90
    Image.fromarray(array).save(tmp_path / "a.png")
    reading = ReadingConfig(resize_mode=mode)
    seen = of_stream(tmp_path, 1, reading=reading)[0]
    assert seen[0, 0, 0] == corner and seen[8, 8, 0] == 90
    given = read_images("--images", str(tmp_path), "s", 16, 3, None, reading).arrays[0]
    np.testing.assert_array_equal(seen, given)


# Commands that take a model's own way of reading


@pytest.mark.parametrize("kind", [Encoding, Interpolation, Inpainting, Variations, Likelihood, Scoring, Sweeping])
def test_a_command_reads_as_the_model_was_trained_unless_told_otherwise(tmp_path, kind):
    path = save_checkpoint(tmp_path / "model.pt", tiny_settings(resize_mode="pad", background="#102030"))
    reading = load_model(kind.of({}), frozenset(), str(path)).settings.reading
    assert (reading.resize_mode, reading.background) == ("pad", "#102030")
    given = {"background": "red"}
    reading = load_model(kind.of(given), frozenset(given), str(path)).settings.reading
    assert (reading.resize_mode, reading.background) == ("pad", "red")


def test_the_bound_is_of_the_images_as_they_are_shown(odd, tmp_path):
    path = save_checkpoint(tmp_path / "model.pt", tiny_settings(image_size=16, background="black"))
    loaded = load_model(Likelihood.of({"data_dir": str(odd)}), frozenset({"data_dir"}), str(path))
    dataset = open_dataset(loaded)
    np.testing.assert_array_equal(np.stack([dataset.pixels(i) for i in range(8)]), expected(0))


def test_held_out_images_are_read_like_training_images(odd):
    settings = ImageTraining.of({
        "data_dir": str(odd), "val_dir": str(odd), "image_size": 16, "background": "black", "batch_size": 4,
        "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "num_workers": 0,
    })  # fmt: skip
    task = ImageTask(settings)
    data, _ = open_data(settings.replace(total_batch_size=4), {}, open_images(str(odd)))
    ((_, validation),) = task._validation(task.build()[1], data)
    np.testing.assert_array_equal(data.stream.dataset.pixels(4), expected(0)[4])
    assert validation.dataset.reading == settings.reading


def test_references_of_a_command_are_prepared_as_the_model_was_trained(odd, tmp_path):
    for number in range(5):
        for path in list(odd.iterdir())[:8]:
            (odd / f"x{number}{path.name}").write_bytes(path.read_bytes())
    settings = Scoring.of({
        "features": write_script(tmp_path / "f.pt"), "reference": str(odd), "resize": "8x24", "resize_mode": "pad",
        "background": "black",
    })  # fmt: skip
    inputs = Inputs.of(settings.evaluation, settings.features, settings.reading)
    taken = inputs.sets["reference"].take([0])
    assert (taken[0][:, :8] == 0).all() and (taken[0][:, 16:] == 0).all() and taken[0][:, 8:16].any()


@pytest.mark.parametrize("mode, warned", [("crop", True), ("pad", False)])
def test_a_reference_prepared_in_another_way_is_a_warning(odd, tmp_path, mode, warned, capsys):
    for number in range(5):
        for path in list(odd.iterdir())[:8]:
            (odd / f"x{number}{path.name}").write_bytes(path.read_bytes())
    made = {"images": str(odd), "out": str(tmp_path / "r.npz"), "resize": "8", "resize_mode": "pad", "colour": True}
    features = {"features": write_script(tmp_path / "f.pt"), "trust_features": True}
    write_reference(ReferenceStatistics.of({**made, **features}))
    settings = Scoring.of({
        **features, "reference": str(tmp_path / "r.npz"), "resize": "8", "resize_mode": mode, "colour": True,
    })  # fmt: skip
    inputs = Inputs.of(settings.evaluation, settings.features, settings.reading)
    capsys.readouterr()
    inputs.check_model("model.pt", 40)
    assert ("were resized and padded" in "".join(capsys.readouterr())) == warned
