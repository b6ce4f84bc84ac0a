"""Sets of images as features: which images are taken, and that nothing but the pixels decides."""

import threading
import zipfile

import numpy as np
import pytest
from feature_helpers import write_script
from PIL import Image

from improved_diffusion import distributed
from improved_diffusion.config import RESIZE_MODES, ReadingConfig, UserError
from improved_diffusion.data.dataset import selection
from improved_diffusion.evaluation import feature_sets
from improved_diffusion.evaluation.feature_sets import FeatureSet, ImageSet, extract
from improved_diffusion.evaluation.features import FeatureNetwork
from improved_diffusion.utils import images
from improved_diffusion.utils.resizing import PREPARED, resize, resize_crop

N, SIDE = 45, 8


def pictures(n=N, height=SIDE, width=SIDE, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def write_folder(folder, arrays, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        images.to_image(array).save(folder / f"{i:03d}.{suffix}")
    return folder


def write_three(tmp_path, array):
    """The same images as a folder, a zip and an npz."""
    write_folder(tmp_path / "folder", array)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "folder").iterdir()):
            archive.write(path, path.name)
    images.save_npz(str(tmp_path / "images.npz"), array)
    return [str(tmp_path / name) for name in ("folder", "images.zip", "images.npz")]


@pytest.fixture
def network(tmp_path):
    return FeatureNetwork(write_script(tmp_path / "features.pt", spatial=True, logits=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_a_zip_and_an_npz_of_the_same_pixels_are_one_set(tmp_path, network, channels):
    array = pictures(channels=channels)
    found = [extract(ImageSet(path, "--images"), network, 7, "x", True) for path in write_three(tmp_path, array)]
    whole = network(array)
    for each, path in zip(found, ("folder", "images.zip", "images.npz")):
        np.testing.assert_array_equal(each.features, found[0].features)
        np.testing.assert_allclose(each.features, whole.features, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(each.probabilities, whole.probabilities, rtol=1e-5)
        np.testing.assert_allclose(each.moments.mu, each.features.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(each.spatial_moments.mu, whole.spatial.mean(axis=0), rtol=1e-5)
        about = dict(each.about)
        assert about.pop("images") == str(tmp_path / path)
        assert about == {k: v for k, v in found[0].about.items() if k != "images"}
    about = found[0].about
    assert (about["count"], about["image_size"], about["channels"], about["lossy_files"]) == (N, "8x8", channels, False)
    assert about["features_sha256"] == network.describe()["features_sha256"] and len(about["pixels_sha256"]) == 64
    assert found[0].name == f"--images {tmp_path / 'folder'}" and found[0].count == N


def test_one_changed_pixel_changes_the_checksum(tmp_path, network):
    array = pictures()
    checksums = set()
    for name in ("a", "b"):
        images.save_npz(str(tmp_path / f"{name}.npz"), array)
        checksums.add(
            extract(ImageSet(str(tmp_path / f"{name}.npz"), "--images"), network, 50, "x").about["pixels_sha256"]
        )
        array[-1, -1, -1, -1] ^= 1
    assert len(checksums) == 2


@pytest.mark.parametrize("batch_size", [1, 44, 45, 1000])
def test_the_batch_size_changes_nothing(tmp_path, network, batch_size):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    image_set = ImageSet(str(tmp_path / "images.npz"), "--images")
    found, expected = extract(image_set, network, batch_size, "x"), extract(image_set, network, 7, "x")
    assert found.about == expected.about
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-5, atol=1e-5)


class Ranks:
    """Threads in the place of ranks, each its own number, that meet where they gather."""

    def __init__(self, count, monkeypatch):
        self.count, self.here = count, threading.local()
        self.barrier, self.given = threading.Barrier(count, timeout=30), [None] * count
        monkeypatch.setattr(distributed, "get_rank", lambda: self.here.rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: count)
        monkeypatch.setattr(distributed, "all_gather_object", self.gather)

    def gather(self, value):
        self.given[self.here.rank] = value
        self.barrier.wait()
        gathered = list(self.given)
        self.barrier.wait()
        return gathered

    def run(self, function):
        results = [None] * self.count

        def work(rank):
            self.here.rank = rank
            results[rank] = function()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_the_number_of_ranks_changes_nothing(tmp_path, network, monkeypatch, ranks):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    image_set = ImageSet(str(tmp_path / "images.npz"), "--images")
    alone = extract(image_set, network, 7, "x")
    # Pillow's warnings are silenced for the process, which threads cannot share.
    monkeypatch.setattr(feature_sets, "quiet", lambda: open("/dev/null"))
    first, *others = Ranks(ranks, monkeypatch).run(lambda: extract(image_set, network, 7, "x"))
    assert first.about == alone.about
    np.testing.assert_array_equal(first.features, alone.features)
    np.testing.assert_array_equal(first.probabilities, alone.probabilities)
    np.testing.assert_array_equal(first.moments.sigma, alone.moments.sigma)
    np.testing.assert_array_equal(first.spatial_moments.sigma, alone.spatial_moments.sigma)
    assert all(other.features is None and other.about["count"] == N for other in others)


def test_a_batch_is_prepared_while_the_network_has_the_one_before(tmp_path, network, monkeypatch):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    image_set = ImageSet(str(tmp_path / "images.npz"), "--images")
    expected = extract(image_set, network, 20, "x").features
    prepare, run, begun, ahead = network.prepare, network.run, threading.Semaphore(0), []

    def preparing(array):
        begun.release()
        return prepare(array)

    def running(x, probabilities):
        batches = 1 if ahead else 2  # the first batch, and then one more each time
        ahead.append(all(begun.acquire(timeout=1) for _ in range(batches)))
        return run(x, probabilities)

    monkeypatch.setattr(network, "prepare", preparing)
    monkeypatch.setattr(network, "run", running)
    np.testing.assert_array_equal(extract(image_set, network, 20, "x").features, expected)
    assert ahead == [True, True, False]  # there is none after the last


# Which images


def test_a_count_is_a_fixed_selection(tmp_path):
    array = np.repeat(np.arange(100, dtype=np.uint8), SIDE * SIDE).reshape(100, SIDE, SIDE, 1)
    images.save_npz(str(tmp_path / "images.npz"), array)
    image_set = ImageSet(str(tmp_path / "images.npz"), "--samples", count=45)
    taken = image_set.take(range(45))[:, 0, 0, 0].astype(int)
    assert len(image_set) == 45 and len(set(taken)) == 45 and (np.diff(taken) > 0).all()
    # Neither the first ones nor every other: of a hundred in ten classes, in order or in turn, some of each.
    assert set(taken // 10) == set(taken % 10) == set(range(10))
    np.testing.assert_array_equal(ImageSet(str(tmp_path / "images.npz"), "--samples").take(range(100)), array)
    with pytest.raises(UserError, match=r"--num_samples 101: --samples .*images\.npz has 100 images"):
        ImageSet(str(tmp_path / "images.npz"), "--samples", count=101)


def test_batches_come_in_order(tmp_path):
    for path in write_three(tmp_path, pictures()):
        image_set = ImageSet(path, "--images")
        batches = list(image_set.batches([[4, 2], [44], [0, 1, 2]]))
        assert not any(batch.resized for batch in batches)
        found = np.concatenate([batch.images for batch in batches])
        np.testing.assert_array_equal(found, pictures()[[4, 2, 44, 0, 1, 2]])
        assert list(image_set.batches([])) == []


@pytest.mark.parametrize("n, count, culprit", [
    (1, 0, r"--images .*few\.npz has 1 image"), (39, 0, r"--images .*few\.npz has 39 images"),
    (45, 39, "--num_samples 39"),
])  # fmt: skip
def test_too_few_images_are_named(tmp_path, n, count, culprit):
    images.save_npz(str(tmp_path / "few.npz"), pictures(n))
    with pytest.raises(UserError, match=f"^{culprit}: at least 40 are needed"):
        ImageSet(str(tmp_path / "few.npz"), "--images", count=count)


def test_no_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, culprit in ((tmp_path / "empty", "holds no images"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(UserError, match=rf"--held_out {path} {culprit}"):
            ImageSet(str(path), "--held_out")


def test_grey_images_may_be_taken_for_coloured_ones(tmp_path, network):
    images.save_npz(str(tmp_path / "grey.npz"), pictures(channels=1))
    path = str(tmp_path / "grey.npz")
    grey, colour = ImageSet(path, "--images"), ImageSet(path, "--images", colour=True)
    assert (grey.channels, colour.channels) == (1, 3)
    np.testing.assert_array_equal(colour.take(range(N)), np.repeat(pictures(channels=1), 3, axis=3))
    np.testing.assert_array_equal(extract(grey, network, 9, "x").features, extract(colour, network, 9, "x").features)


def test_a_coloured_image_among_grey_ones_is_named(tmp_path):
    write_folder(tmp_path / "mixed", [*pictures(44, channels=1), *pictures(1)])
    image_set = ImageSet(str(tmp_path / "mixed"), "--images")
    with pytest.raises(UserError, match=r"044\.png is in colour, but .* is grey: give --colour True"):
        image_set.take(range(N))
    assert ImageSet(str(tmp_path / "mixed"), "--images", colour=True).take(range(N)).shape == (N, 8, 8, 3)


# Arrays


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_is_the_set_that_its_npz_is(tmp_path, network, channels):
    array = pictures(channels=channels)
    images.save_npz(str(tmp_path / "images.npz"), array)
    sets = [ImageSet(each, "--images") for each in (array, str(tmp_path / "images.npz"))]
    given, read = (extract(each, network, 7, "x") for each in sets)
    np.testing.assert_array_equal(given.features, read.features)
    assert {**given.about, "images": ""} == {**read.about, "images": ""}


@pytest.mark.parametrize("array", [
    np.zeros((50, 8, 8, 3)), np.zeros((50, 8, 8), np.uint8), np.zeros((50, 3, 8, 8), np.uint8),
    np.zeros((50, 8, 8, 4), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
])  # fmt: skip
def test_an_array_of_another_form_is_named(array):
    with pytest.raises(UserError, match=r"--samples is an array .*: expected uint8 \[N, H, W, C\] with 1 or 3"):
        ImageSet(array, "--samples")


# What does not fit


def test_an_image_of_another_size_is_named_and_may_be_resized_as_in_training(tmp_path):
    write_folder(tmp_path / "odd", [*pictures(44), *pictures(1, 20, 13)])
    with pytest.raises(
        UserError, match=r"044\.png is 20x13, but the first image of --images .*odd is 8x8: give --resize"
    ):
        ImageSet(str(tmp_path / "odd"), "--images").take(range(N))
    for text, size in (("8", (8, 8)), ("6x10", (6, 10))):
        image_set = ImageSet(str(tmp_path / "odd"), "--images", text)
        taken = image_set.take([0, 44])
        for i, name in enumerate(("000", "044")):
            with Image.open(tmp_path / "odd" / f"{name}.png") as image:
                np.testing.assert_array_equal(taken[i], np.asarray(resize_crop(image, size)))
        assert image_set.describe()["image_size"] == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_becomes_the_background(tmp_path, channels):
    array = pictures(channels=channels)
    array[0, ..., -1] = 0
    images.save_npz(str(tmp_path / "alpha.npz"), array)
    for background, level in (("white", 255), ("black", 0)):
        image_set = ImageSet(str(tmp_path / "alpha.npz"), "--images", reading=ReadingConfig(background=background))
        assert image_set.channels == channels - 1
        assert (image_set.take([0]) == level).all()


def test_sixteen_bits_are_scaled(tmp_path):
    write_folder(tmp_path / "deep", pictures(44, channels=1))
    Image.fromarray(np.full((SIDE, SIDE), 257 * 100, np.uint16)).save(tmp_path / "deep" / "044.png")
    assert (ImageSet(str(tmp_path / "deep"), "--images").take([44]) == 100).all()


def test_images_that_lie_on_their_side_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = write_folder(tmp_path / "turned", pictures())
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    np.testing.assert_array_equal(ImageSet(str(folder), "--images").take(range(N)), pictures())


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_references_are_prepared_as_the_training_images(tmp_path, network, mode):
    folder = write_folder(tmp_path / "wide", pictures(N, 24, 40))
    reading = ReadingConfig(resize_mode=mode, background="red")
    image_set = ImageSet(str(folder), "--images", "16x16", reading=reading)
    taken = image_set.take(range(N))
    for i in range(3):
        with Image.open(folder / f"{i:03d}.png") as image:
            np.testing.assert_array_equal(taken[i], np.asarray(resize(image, (16, 16), reading, key=(0, i))))
    np.testing.assert_array_equal(taken, image_set.take(range(N)))
    assert extract(image_set, network, 7, "x").about["prepared"] == PREPARED[mode]


@pytest.mark.parametrize("which", [0, 30])
def test_an_unreadable_image_is_named(tmp_path, network, which):
    folder = write_folder(tmp_path / "damaged", pictures())
    path = folder / f"{which:03d}.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"{which:03d}\.png is not a readable image"):
        extract(ImageSet(str(folder), "--images"), network, 7, "x")


def test_lossy_files_are_noted_by_what_is_taken(tmp_path):
    write_folder(tmp_path / "mixed", pictures(100))
    write_folder(tmp_path / "mixed", pictures(2), "jpg")  # 000.jpg before 000.png
    assert ImageSet(str(tmp_path / "mixed"), "--images").describe()["lossy_files"] is True
    (tmp_path / "mixed" / "000.jpg").unlink()
    assert ImageSet(str(tmp_path / "mixed"), "--images", count=50).lossy is False


def test_a_set_without_a_count_says_so():
    assert FeatureSet("--reference", {"images": "r.npz"}).count is None


def test_of_very_many_images_a_selection_is_compared_in_pairs(tmp_path, network, monkeypatch):
    monkeypatch.setattr(feature_sets, "MAX_PAIRED", 10)
    array = pictures()
    images.save_npz(str(tmp_path / "images.npz"), array)
    found = extract(ImageSet(str(tmp_path / "images.npz"), "--images"), network, 7, "x", True)
    whole = network(array)
    assert found.numbers.tolist() == selection(N, 10).tolist() and found.about["compared_in_pairs"] == 10
    np.testing.assert_allclose(found.features, whole.features[found.numbers], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, whole.probabilities[found.numbers], rtol=1e-5)
    # The moments are of all.
    np.testing.assert_allclose(found.moments.mu, whole.features.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.moments.sigma, np.cov(whole.features.T), rtol=1e-4, atol=1e-4)
    assert found.count == N
    np.testing.assert_array_equal(found.take([1, 9]), array[found.numbers[[1, 9]]])


def test_a_subset_is_a_selection(tmp_path, network):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    found = extract(ImageSet(str(tmp_path / "images.npz"), "--images"), network, 7, "x", True)
    assert found.subset(N) is found
    few = found.subset(5)
    np.testing.assert_array_equal(few.features, found.features[selection(N, 5)])
    np.testing.assert_array_equal(few.probabilities, found.probabilities[selection(N, 5)])
    np.testing.assert_allclose(few.moments.sigma, np.cov(few.features.T.astype(np.float64)), rtol=1e-9)
    assert few.count == 5 and found.count == N


def test_probabilities_are_computed_where_they_are_wanted(tmp_path, network):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    assert extract(ImageSet(str(tmp_path / "images.npz"), "--images"), network, 7, "x").probabilities is None


def test_images_that_have_the_size_already_are_not_called_resized(tmp_path, network):
    images.save_npz(str(tmp_path / "images.npz"), pictures())
    for text, prepared in (("8", "as they are"), ("6", "resized and centre-cropped")):
        image_set = ImageSet(str(tmp_path / "images.npz"), "--images", text)
        assert extract(image_set, network, 7, "x").about["prepared"] == prepared
