"""The editing commands from end to end."""

import json
import os
import re

import numpy as np
import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import call, contents, pixels, refused, run, save_mask, write_images

from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.editing.encode import Encode, psnr
from improved_diffusion.editing.masks import GREY
from improved_diffusion.utils.resizing import resize_crop


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with six images, and a class-conditional model that has learned a little."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "data", 6)
    settings = tiny_settings(class_cond=True, label_drop=0.5)
    save_checkpoint(folder / "run/untrained.pt", settings, class_names=CLASSES)
    save_checkpoint(
        folder / "run/model.pt", settings, class_names=CLASSES, steps=20, images=originals(folder),
        labels=[0, 0, 0, 1, 1, 1],
    )  # fmt: skip
    return folder


def edit(place, name, *args, model="run/model.pt"):
    return call("image_edit", name, "--model_path", place / model, *args, cwd=place)


def place_of(path):
    """What PNGs are ordered by: a number of six digits, or which copy of which image."""
    number, copy = re.search(r"_(\d{6})$", path.stem), re.fullmatch(r"(.*_\d\d)_(\d+)", path.stem)
    return (0, number[1]) if number else (int(copy[2]), copy[1]) if copy else (0, path.stem)


def made(folder):
    """(the npz's arrays, the PNGs in order) of an edit."""
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        found = [arrays[name] for name in arrays.files]
    pngs = sorted((folder / "samples").iterdir(), key=place_of)
    np.testing.assert_array_equal(np.stack([pixels(p) for p in pngs]), found[0])
    return found, [p.name for p in pngs]


def originals(place):
    """The images in the folder's order, as the network sees them."""
    paths = sorted((place / "data").iterdir())
    return np.stack([np.asarray(resize_crop(Image.open(path), (8, 8))) for path in paths])


@pytest.fixture(scope="module")
def encoded(place):
    result = edit(place, "encode", "--images", "data", "--sampler", "heun", "--out_dir", "encoded").succeed()
    assert "6 images encoded and decoded" in result.out and result.err == ""
    return place / "encoded"


def test_encoded_images_come_back(place, encoded):
    with np.load(encoded / "latents.npz") as arrays:
        assert arrays["arr_0"].dtype == np.float32 and arrays["arr_0"].shape == (6, 3, 8, 8)
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
        assert json.loads(str(arrays["way"])) == dict(
            sampler="heun", steps=20, timestep_grid="karras", timestep_respacing=""
        )
    assert set(os.listdir(encoded)) == {
        "latents.npz", "log.txt", "samples", "samples.json", "samples.png", "samples_6x8x8x3.npz", ".samples.lock",
    }  # fmt: skip
    (back, labels), names = made(encoded)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and names == sorted(os.listdir(place / "data"))
    decibels = psnr(back, originals(place))
    assert decibels.min() > 25  # with as few as 20 noise levels the lowest hides something
    assert f"{decibels.mean():.1f} dB" in (encoded / "log.txt").read_text()
    sheet = pixels(encoded / "samples.png")  # each beside what it came from
    np.testing.assert_array_equal(sheet[2:50:6, 2:50:6], originals(place)[0])
    np.testing.assert_array_equal(sheet[2:50:6, 52:100:6], back[0])


def test_encoding_again_does_nothing_again(place, encoded, monkeypatch):
    before = contents(encoded)
    monkeypatch.setattr(Encode, "invert", None)
    edit(place, "encode", "--images", "data", "--sampler", "heun", "--out_dir", "encoded").succeed()
    assert contents(encoded) == before


def test_the_batch_size_and_an_interruption_change_nothing(place, encoded, monkeypatch):
    invert, done = Encode.invert, []

    def interrupted(command, numbers):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.extend(numbers)
        return invert(command, numbers)

    args = ["--images", "data", "--sampler", "heun", "--batch_size", 2, "--out_dir", "slowly"]
    monkeypatch.setattr(Encode, "invert", interrupted)
    result = edit(place, "encode", *args)
    assert result.code == 130 and f"4 of 6 latents are in {place}/slowly/latents; rerun" in result.err
    (place / "slowly/latents/000001.npy").write_bytes(b"cut")
    done.clear()
    done.append("elsewhere")
    result = edit(place, "encode", *args).succeed()
    assert done == ["elsewhere", 1, 4, 5] and "3 of 6 latents are already in" in result.out
    with np.load(encoded / "latents.npz") as expected, np.load(place / "slowly/latents.npz") as found:
        np.testing.assert_allclose(found["arr_0"], expected["arr_0"], atol=1e-4)
    assert not (place / "slowly/latents").exists()


def test_two_ranks_share_the_work(place, encoded):
    args = ["--model_path", place / "run/model.pt", "--images", "data", "--sampler", "heun", "--batch_size", 2]
    run("srun", 2, "image_edit", "encode", *args, "--out_dir", "shared", cwd=place).succeed()
    with np.load(encoded / "latents.npz") as expected, np.load(place / "shared/latents.npz") as found:
        np.testing.assert_allclose(found["arr_0"], expected["arr_0"], atol=1e-4)
    difference = made(place / "shared")[0][0].astype(int) - made(encoded)[0][0]
    assert abs(difference).max() <= 1


def test_other_images_are_not_mixed_in(place, encoded):
    result = edit(place, "encode", "--images", "data/cat_00.png", "--sampler", "heun", "--out_dir", "encoded")
    assert (
        result.code == 1
        and f"of --images {place}/data, but this command has --images {place}/data/cat_00.png" in result.err
    )


def test_latents_are_decoded_by_the_steps_that_made_them(place, encoded):
    edit(place, "decode", "--latents", "encoded/latents.npz", "--out_dir", "decoded").succeed()
    np.testing.assert_array_equal(made(place / "decoded")[0][0], made(encoded)[0][0])
    back, there = (json.loads((folder / "samples.json").read_text()) for folder in (place / "decoded", encoded))
    assert back["sampler"] == "heun" and back["steps"] == 20
    assert back["timesteps_sha256"] == there["timesteps_sha256"]


def test_respacing_is_among_the_steps_of_latents(place):
    edit(place, "encode", "--images", "data", "--timestep_respacing", "ddim10", "--out_dir", "respaced").succeed()
    edit(place, "decode", "--latents", "respaced/latents.npz", "--out_dir", "respaced_back").succeed()
    np.testing.assert_array_equal(made(place / "respaced_back")[0][0], made(place / "respaced")[0][0])


def test_latents_of_another_checkpoint_are_decoded_with_a_warning(place, encoded):
    name = "may be noise"
    assert name not in edit(place, "decode", "--latents", "encoded/latents.npz", "--out_dir", "own").succeed().out
    args = ["--latents", "encoded/latents.npz", "--out_dir", "foreign"]
    result = edit(place, "decode", *args, model="run/untrained.pt").succeed()
    assert name in result.out + result.err


def test_latents_are_decoded_as_other_classes_by_other_steps_and_with_guidance(place, encoded):
    args = ["--latents", "encoded/latents.npz", "--num_samples", 4, "--classes", "dog,cat", "--sampler", "dpmpp_2m"]
    edit(place, "decode", *args, "--steps", 5, "--guidance_scale", 2, "--out_dir", "others").succeed()
    (back, labels), names = made(place / "others")
    assert labels.tolist() == [1, 0, 1, 0] and names == sorted(os.listdir(place / "data"))[:4]
    assert psnr(back[:1], originals(place)[:1]) < 25


SEEDED = ["--steps", 10, "--batch_size", 1, "--seed", 4]


def test_the_ends_of_an_interpolation_are_the_samples_of_its_numbers(place):
    args = ["--model_path", place / "run/model.pt", "--sampler", "ddim", "--seeds", "3,8", "--out_dir", "numbered"]
    call("image_sample", *SEEDED, *args, cwd=place).succeed()
    edit(place, "interpolate", "--seeds", "3,8", "--frames", 4, *SEEDED, "--out_dir", "between").succeed()
    (frames, labels), _ = made(place / "between")
    (samples, classes), _ = made(place / "numbered")
    np.testing.assert_array_equal(frames[[0, -1]], samples)
    np.testing.assert_array_equal(labels[[0, -1]], classes)
    assert len(np.unique(frames, axis=0)) == 4
    strip = pixels(place / "between/interpolation.png")
    assert strip.shape == (52, 4 * 50 + 2, 3)
    np.testing.assert_array_equal(strip[2:50:6, 52:100:6], frames[1])
    with Image.open(place / "between/interpolation.gif") as gif:
        assert gif.n_frames == 6  # there, and back to where it starts again


def test_between_a_sample_and_itself_nothing_changes(place):
    args = ["--frames", 3, *SEEDED, "--classes", "cat", "--out_dir", "still"]
    edit(place, "interpolate", "--seeds", "3,3", *args).succeed()
    frames = made(place / "still")[0][0]
    assert (frames == frames[0]).all()


def test_an_interpolation_goes_from_one_image_to_the_other(place):
    pair = "data/cat_02.png,data/dog_03.png"
    edit(place, "interpolate", "--images", pair, "--frames", 3, "--sampler", "heun", "--out_dir", "pair").succeed()
    (frames, labels), names = made(place / "pair")
    assert labels.tolist() == [0, 0, 1] and names[2] == "dog_000002.png"
    assert psnr(frames[[0, 2]], originals(place)[[1, 4]]).min() > 25
    assert psnr(frames[[1, 1]], originals(place)[[1, 4]]).max() < 25


def test_what_is_known_stays_in_every_painting(place):
    save_mask(place / "mask.png", np.arange(16)[:, None].repeat(16, 1) >= 8)
    args = ["--images", "data", "--mask", "mask.png", "--steps", 6, "--jump_length", 2, "--resamplings", 2]
    result = edit(place, "inpaint", *args, "--num_samples", 9, "--out_dir", "painted").succeed()
    assert "ancestral, 11 steps" in result.out  # of which 5 are taken twice
    (painted, labels), names = made(place / "painted")
    sources = sorted(path.stem for path in (place / "data").iterdir())
    assert names == [f"{source}_1.png" for source in sources] + [f"{source}_2.png" for source in sources[:3]]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    for i in range(9):
        np.testing.assert_array_equal(painted[i][:4], originals(place)[i % 6][:4])
    assert (painted[0][4:] != painted[6][4:]).any()
    sheet = pixels(place / "painted/samples.png")
    assert (sheet[2:50:6, 2:50:6][4:] == GREY).all()
    edit(place, "inpaint", *args, "--batch_size", 1, "--num_samples", 9, "--out_dir", "one_by_one").succeed()
    assert abs(made(place / "one_by_one")[0][0].astype(int) - painted).max() <= 1


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m"])
def test_stronger_variations_are_less_like_the_image(place, sampler):
    found = []
    for strength in (0.05, 0.5, 1):
        out_dir = f"varied_{sampler}_{strength}"
        args = ["--images", "data", "--strength", strength, "--num_samples", 12, "--sampler", sampler, "--steps", 20]
        edit(place, "variations", *args, "--out_dir", out_dir).succeed()
        varied = made(place / out_dir)[0][0]
        assert (varied[:6] != varied[6:]).any(axis=(1, 2, 3)).all()
        found.append(psnr(varied, originals(place)[[*range(6), *range(6)]]).mean())
    assert found[0] > found[1] + 3 and found[1] > found[2] + 1


def test_steps_are_printed_along_the_commands_path(place):
    result = edit(place, "variations", "--strength", 0.5, "--steps", 5, "--print_steps").succeed()
    rows = [line.split()[1] for line in result.out.splitlines()[-5:]]
    assert rows[0] == rows[-1] == "image" and float(rows[1]) > float(rows[2]) > float(rows[3]) == 0


@pytest.mark.parametrize("name, args", [
    ("encode", ["--images", "data"]), ("decode", ["--latents", "encoded/latents.npz"]),
    ("interpolate", ["--seeds", "1,2"]), ("inpaint", ["--images", "data", "--mask", "half.png"]),
    ("variations", ["--images", "data"]),
])  # fmt: skip
def test_folders_say_what_made_them_and_by_which_scheme_of_seeds(place, encoded, name, args):
    save_mask(place / "half.png", np.eye(8))
    edit(place, name, *args, "--steps", 3, "--out_dir", f"said_{name}").succeed()
    request = json.loads((place / f"said_{name}/samples.json").read_text())
    assert request["command"] == name and "SeedSequence" in request["seed_scheme"]
    path = place / f"said_{name}/samples.json"
    path.write_text(json.dumps({key: value for key, value in request.items() if key != "seed_scheme"}))
    refused(edit(place, name, *args, "--steps", 3, "--out_dir", f"said_{name}"), "--out_dir", "scheme", "remove")


# Wrong use


def test_wrong_use_is_refused_before_a_folder_is_made(place, tmp_path):
    save_mask(tmp_path / "nothing.png", np.zeros((8, 8)))
    np.savez(tmp_path / "other.npz", np.zeros((2, 1, 8, 8), np.float32))
    np.savez(tmp_path / "objects.npz", np.array([{}]))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/1.png").write_bytes((place / "data/cat_00.png").read_bytes())
    model, data = ["--model_path", place / "run/model.pt"], ["--images", place / "data"]

    def refuse(name, *args):
        return call("image_edit", name, *model, *args, cwd=tmp_path)

    refused(call("image_edit", "encode", *data, cwd=tmp_path), "--model_path is missing")
    refused(refuse("encode"), "--images is missing")
    refused(refuse("encode", "--images", "nowhere"), "--images nowhere does not exist")
    refused(refuse("encode", "--images", "plain/1.png,plain/2.png"), "--images plain/2.png does not exist")
    refused(refuse("encode", "--images", "plain"), "--images plain has no classes among cat, dog, which")
    refused(refuse("encode", *data, "--steps", 1), "--steps 1", "at least two steps")
    refused(refuse("encode", *data, "--out_dir", place / "data/out"), "--out_dir", f"--images {place}/data")
    refused(refuse("encode", *data, "--classes", "owl"), "--classes owl: the model has the classes 0..1: cat, dog")
    refused(refuse("encode", *data, "--guidance_scale", 2), "--guidance_scale 2.0")
    refused(refuse("interpolate", *data), f"--images {place}/data: 6 images")
    refused(refuse("interpolate"), "--images", "--seeds")
    refused(refuse("inpaint", *data, "--mask", "nothing.png"), "nothing.png")
    refused(refuse("decode"), "--latents is missing")
    refused(refuse("decode", "--latents", "nowhere.npz"), "--latents nowhere.npz does not exist")
    refused(refuse("decode", "--latents", "other.npz"), "(1, 8, 8)", "(3, 8, 8)")
    refused(refuse("decode", "--latents", "objects.npz"), "could run code when loaded")
    refused(refuse("encod"), "did you mean encode?")
    assert {path.name for path in tmp_path.iterdir()} == {"nothing.png", "other.npz", "objects.npz", "plain"}


def test_checkpoints_of_other_kinds(place, tmp_path):
    plain = save_checkpoint(tmp_path / "plain.pt", tiny_settings())
    large = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    large = save_checkpoint(tmp_path / "large.pt", large)
    images_of = ["encode", "--images", place / "data", "--model_path"]
    refused(call("image_edit", *images_of, large, cwd=tmp_path), "large.pt", "super-resolution")
    result = call("image_edit", *images_of, plain, "--classes", "cat", cwd=tmp_path)
    refused(result, "--classes cat", "was trained without classes")
    call("image_edit", *images_of, plain, "--steps", 5, "--out_dir", "out", cwd=tmp_path).succeed()
    with np.load(tmp_path / "out/latents.npz") as arrays:
        assert sorted(arrays.files) == ["arr_0", "model", "names", "way"]


def test_the_same_images_under_other_names_are_not_mixed_in(place):
    pictures = [place / f"named/{name}.png" for name in ("ice cream", "猫")]
    pictures[0].parent.mkdir()
    for path in pictures:
        path.write_bytes((place / "data/cat_00.png").read_bytes())
    args = ["--classes", "cat", "--steps", 2, "--out_dir", "named_out"]
    edit(place, "variations", "--images", "named", *args).succeed()
    assert sorted(os.listdir(place / "named_out/samples")) == ["ice cream.png", "猫.png"]
    pictures[0].rename(place / "named/polar_bear.png")
    refused(edit(place, "variations", "--images", "named", *args), "images of other names", "another --out_dir")


def test_images_without_names_are_numbered(place):
    np.savez(place / "arrays.npz", arr_0=originals(place), arr_1=np.array([0, 0, 0, 1, 1, 1]))
    edit(place, "variations", "--images", "arrays.npz", "--steps", 2, "--out_dir", "from_arrays").succeed()
    assert made(place / "from_arrays")[1][::3] == ["cat_000000.png", "dog_000003.png"]
